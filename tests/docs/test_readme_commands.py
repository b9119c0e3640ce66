"""Every ``bash`` block of README and docs is executed, in a sandbox where what it names exists.

``train.py`` really runs, with ``--dry-run``; the launch scripts run with ``DRY_RUN=1``; see ``shim.py`` for the rest.
A block that is not meant to be executed is fenced as ``text`` or ``console``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.inputs import hf_config, write_hf, write_step
from tests.docs.declared import PAGES, ROOT, code_blocks

PROGRAMS = ("python", "python3", "make", "torchrun", "hf")
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(code_blocks(page, "bash"), start=1)
]
CONFIGURATION = """
hf_checkpoint: models/Qwen3-0.6B
prompt_data: data/gsm8k_train.jsonl
apply_chat_template: true
rm_type: gsm8k
rollout_batch_size: 32
num_rollout: 200
"""


def published(checkpoint: str) -> dict[str, object]:
    rows = json.loads((ROOT / "tests" / "scripts" / "fixtures" / "published_configs.json").read_text())["rows"]
    return next(row["config"] for row in rows if row["checkpoint"] == checkpoint)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project with models (the real configs, next to no weights), prompts and an earlier run."""
    root = tmp_path_factory.mktemp("sandbox")
    for name in ("train.py", "tools", "scripts", "examples", "pyproject.toml", "constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    small, large = published("Qwen/Qwen3-0.6B"), published("Qwen/Qwen3-1.7B")
    write_hf(root / "models" / "Qwen3-0.6B", **small)
    write_hf(root / "models" / "Qwen3-1.7B", **large)
    for name in ("Qwen3-8B", "Qwen3-32B"):
        write_hf(root / "models" / name, **published(f"Qwen/{name}"))
    for folder, step, config in (
        (root / "models" / "Qwen3-1.7B_torch_dist", "release", large),
        (root / "runs" / "mine" / "checkpoints", "iter_0000200", small),
    ):
        write_step(folder / step)
        (folder / "latest_checkpointed_iteration.txt").write_text(step.removeprefix("iter_").lstrip("0"))
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text(json.dumps(hf_config(**config)))
    row = {"prompt": [{"role": "user", "content": "What is 1 + 1?"}], "label": "2"}
    (root / "data").mkdir()
    for split in ("train", "test"):
        (root / "data" / f"gsm8k_{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 256)
    (root / "tokens.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    (root / "my_run.yaml").write_text(CONFIGURATION)
    (root / "runs" / "mine" / "config.yaml").write_text(CONFIGURATION)
    for name in (".venv", ".venv-gpu"):
        (root / name / "bin").mkdir(parents=True)
        (root / name / "bin" / "activate").write_text("")
    for name in ("student_before_hf", "teacher_hf"):
        write_hf(root / "runs" / "quickstart" / name)
    (root / "runs" / "quickstart" / "data").mkdir()
    for name in ("prompts", "dev"):
        (root / "runs" / "quickstart" / "data" / f"{name}.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    (root / "shims").mkdir()
    for name in PROGRAMS:
        shim = root / "shims" / name
        shim.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{ROOT}/tests/docs/shim.py" {name} "$@"\n')
        shim.chmod(0o755)
    return root


def run_block(block: str, sandbox: Path) -> subprocess.CompletedProcess[str]:
    machine = os.environ["PATH"]
    changes = {
        "PATH": f"{sandbox / 'shims'}:{machine}",
        "PATH_OF_THE_MACHINE": machine,
        "PYTHON": sys.executable,
        "DRY_RUN": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("MODELS", "DATA", "RUN_DIR")}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=sandbox, env=environment | changes, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_of_the_documentation(block: str, sandbox: Path) -> None:
    if "--run-dir runs/mine" in block:
        # what the text has the reader do for the first time must not meet the run of the later examples
        block = block.replace("runs/mine", "runs/first")
    done = run_block(block, sandbox)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "make quickstat",
        "python train.py --use-opd",
        "python tools/score.py --load runs/mine/checkpoints --input tokens.jsonl --outptu scores.jsonl",
        "python tools/convert_torch_dist_to_hf.py --load runs/other --save out",
        "python -m pip install -e '.[gpus]' -c constraints.txt",
        "hf upload Qwen/Qwen3-0.6B",
    ],
)
def test_a_wrong_command_is_noticed(command: str, sandbox: Path) -> None:
    assert run_block(command, sandbox).returncode != 0


def test_the_two_commands_come_first() -> None:
    assert [block.strip() for block in code_blocks(ROOT / "README.md", "bash")[:2]] == ["make quickstart", "make test"]
