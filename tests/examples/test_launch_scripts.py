"""The launch scripts for real models, as far as they go without a GPU: their flags, their faults, their clean-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.config.inputs import ROOT, write_hf

EXAMPLES = ROOT / "examples" / "on_policy_distillation"
SGLANG = EXAMPLES / "run-qwen3-0.6B-gsm8k-opd.sh"
MEGATRON = EXAMPLES / "run-qwen3-0.6B-gsm8k-opd-megatron.sh"
PUBLISHED = json.loads((ROOT / "tests" / "scripts" / "fixtures" / "published_configs.json").read_text())["rows"]


def published(checkpoint: str) -> dict[str, object]:
    return next(row["config"] for row in PUBLISHED if row["checkpoint"] == checkpoint)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and prompts where the scripts look for them: the real configs, next to no weights."""
    root = tmp_path_factory.mktemp("a folder")
    write_hf(root / "models" / "Qwen3-0.6B", weights=False, **published("Qwen/Qwen3-0.6B"))
    write_hf(root / "models" / "Qwen3-1.7B", **published("Qwen/Qwen3-1.7B"))
    row = {"prompt": [{"role": "user", "content": "What is 1 + 1?"}], "label": "2"}
    (root / "data").mkdir()
    for split in ("train", "test"):
        (root / "data" / f"gsm8k_{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 256)
    return root


def run_script(script: Path, inputs: Path, run: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "MODELS": str(inputs / "models"),
        "DATA": str(inputs / "data"),
        "RUN_DIR": str(run),
        "PYTHON": sys.executable,
    }
    for name in ("TEACHER_URL", "TEACHER", "STUDENT", "NUM_ROLLOUT", "SGLANG_VENV", "SGLANG_FLAGS"):
        environment.pop(name, None)
    return subprocess.run(
        [str(script), *arguments],
        env=environment | changes, cwd=run.parent, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("script", [SGLANG, MEGATRON], ids=["sglang", "megatron"])
def test_the_flags_are_accepted(script: Path, inputs: Path, tmp_path: Path) -> None:
    done = run_script(script, inputs, tmp_path / "run", DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    printed = yaml.safe_load(done.stdout)
    assert printed["opd"]["use_opd"] is True
    assert printed["objective"]["advantage_estimator"] == "grpo"
    assert printed["derived"]["student"]["num_layers"] == 28
    assert printed["derived"]["world_size"] == 1
    assert printed["derived"]["steps_per_rollout"] == 1
    assert json.loads(printed["data"]["apply_chat_template_kwargs"]) == {"enable_thinking": False}
    if script == MEGATRON:
        assert printed["derived"]["teacher"]["hidden_size"] == 2048
    else:
        assert printed["opd"]["opd_teacher_url"] == ["http://127.0.0.1:30000"]
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_the_script_win(inputs: Path, tmp_path: Path) -> None:
    done = run_script(
        SGLANG, inputs, tmp_path / "run", "--lr", "2e-6", DRY_RUN="1", TEACHER_URL="http://h:1", NUM_ROLLOUT="7"
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = yaml.safe_load(done.stdout)
    assert printed["optimizer"]["lr"] == 2e-6
    assert printed["data"]["num_rollout"] == 7
    assert printed["opd"]["opd_teacher_url"] == ["http://h:1"]


def fake_sglang(folder: Path, program: str) -> Path:
    """An environment whose interpreter runs ``program`` in place of the server."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o755)
    return folder


def test_bad_options_end_before_a_server_is_started(inputs: Path, tmp_path: Path) -> None:
    environment = fake_sglang(tmp_path / "environment", f"touch {tmp_path}/started")
    done = run_script(SGLANG, inputs, tmp_path / "run", "--lrr", "1", SGLANG_VENV=str(environment))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --lrr: unknown flag")
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "run").exists()


def test_a_missing_environment_says_what_to_set(inputs: Path, tmp_path: Path) -> None:
    done = run_script(SGLANG, inputs, tmp_path / "run", SGLANG_VENV=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "SGLANG_VENV" in done.stderr
    assert "TEACHER_URL" in done.stderr


def test_a_server_that_dies_shows_its_log_and_leaves_no_process(inputs: Path, tmp_path: Path) -> None:
    """The server gets its arguments whole, although the folders have spaces in their names."""
    program = 'printf "%s\\n" "$@"\nsleep 600 &\necho "child $!"\necho "out of memory, says the server"\nexit 3'
    environment = fake_sglang(tmp_path / "the environment", program)
    done = run_script(SGLANG, inputs, tmp_path / "run", SGLANG_VENV=str(environment), SGLANG_FLAGS="--tp 2")
    assert done.returncode == 2
    assert "out of memory, says the server" in done.stdout + done.stderr
    assert "ended while starting" in done.stderr
    log = (tmp_path / "run" / "teacher.log").read_text().splitlines()
    assert log[:4] == ["-m", "sglang.launch_server", "--model-path", str(inputs / "models" / "Qwen3-1.7B")]
    assert log[4:7] == ["--host", "127.0.0.1", "--port"]
    assert log[7].isdecimal()
    assert log[8:10] == ["--tp", "2"]
    child = Path("/proc", next(line for line in log if line.startswith("child")).split()[1])
    assert not child.exists() or "State:\tZ" in (child / "status").read_text()


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_scripts_are_bash_that_ends_nothing_by_name(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = script.read_text()
    for word in ("pkill", "killall", "/root"):
        assert word not in text
    if text.startswith("#!"):
        assert "set -euo pipefail" in text
        assert os.access(script, os.X_OK)
