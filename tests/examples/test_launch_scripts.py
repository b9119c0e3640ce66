"""The launch scripts for real models, as far as they go without a GPU: their flags, their faults, their clean-up."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.config.inputs import ROOT, write_hf

EXAMPLES = ROOT / "examples" / "on_policy_distillation"
SGLANG = EXAMPLES / "run-qwen3-0.6B-gsm8k-opd.sh"
MEGATRON = EXAMPLES / "run-qwen3-0.6B-gsm8k-opd-megatron.sh"
GSM8K = EXAMPLES / "run-gsm8k-qwen3-1.7B.sh"
LARGE = EXAMPLES / "run-qwen3-8B-opd.sh"
LARGE_MEGATRON = EXAMPLES / "run-qwen3-8B-opd-megatron.sh"
SETTINGS = (
    "TEACHER_URL", "TEACHER", "STUDENT", "NUM_ROLLOUT", "SGLANG_VENV", "SGLANG_FLAGS", "TEACHER_GPUS", "RAY_DASHBOARD",
    "SERVER_TIMEOUT", "ENGINE_URLS", "PROMPT_DATA", "EVAL_DATA",
)  # fmt: skip
PUBLISHED = json.loads((ROOT / "tests" / "scripts" / "fixtures" / "published_configs.json").read_text())["rows"]


def published(checkpoint: str) -> dict[str, object]:
    return next(row["config"] for row in PUBLISHED if row["checkpoint"] == checkpoint)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and prompts where the scripts look for them: the real configs, next to no weights."""
    root = tmp_path_factory.mktemp("a folder")
    write_hf(root / "models" / "Qwen3-0.6B", weights=False, **published("Qwen/Qwen3-0.6B"))
    for name in ("Qwen3-1.7B", "Qwen3-8B", "Qwen3-32B"):
        write_hf(root / "models" / name, **published(f"Qwen/{name}"))
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
    for name in SETTINGS:
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


def shown_command(output: str) -> list[str]:
    """The words of the command in the last line of a dry run."""
    line = output.splitlines()[-1]
    assert line.startswith("# ")
    return shlex.split(line[2:])


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(
    ("script", "student", "teacher", "world_size", "engines"),
    [
        (GSM8K, "Qwen3-1.7B", "Qwen3-8B", 1, 1),
        (LARGE, "Qwen3-8B", "Qwen3-32B", 4, 2),
        (LARGE_MEGATRON, "Qwen3-8B", "Qwen3-32B", 4, 4),
    ],
    ids=["gsm8k", "8B", "8B megatron"],
)
def test_scripts_with_rollouts_by_sglang(
    script: Path, student: str, teacher: str, world_size: int, engines: int, inputs: Path, tmp_path: Path
) -> None:
    done = run_script(script, inputs, tmp_path / "run", DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    printed = yaml.safe_load(done.stdout)
    assert printed["checkpoint"]["hf_checkpoint"] == str(inputs / "models" / student)
    assert printed["engine"]["rollout_engine"] == "sglang"
    assert printed["engine"]["rollout_num_engines"] == engines
    # the engines come after the trainer's devices
    assert printed["engine"]["sglang_base_gpu_id"] == printed["derived"]["world_size"] == world_size
    words = shown_command(done.stdout)
    if script == LARGE_MEGATRON:
        assert printed["opd"]["opd_teacher_load"] == str(inputs / "models" / teacher)
        assert printed["derived"]["teacher"]["num_layers"] == 64
    else:
        server = shlex.split(value(words, "--server"))
        assert value(server, "--model-path") == str(inputs / "models" / teacher)
        (devices,) = [word.partition("=")[2].split(",") for word in server if word.startswith("CUDA_VISIBLE_DEVICES=")]
        assert min(map(int, devices)) >= world_size + engines
        assert int(value(server, "--tp")) == len(devices) if "--tp" in server else len(devices) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [LARGE, LARGE_MEGATRON], ids=["sglang", "megatron"])
def test_the_job_of_the_large_scripts(script: Path, inputs: Path, tmp_path: Path) -> None:
    done = run_script(
        script, inputs, tmp_path / "run", "--lr", "2e-6",
        DRY_RUN="1", RAY_DASHBOARD="http://head:8265", **({"TEACHER_URL": "http://h:1"} if script == LARGE else {}),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    words = shown_command(done.stdout)
    job = words.index("--")
    assert words[1:5] == ["-m", "ray.scripts.scripts", "job", "submit"]
    assert value(words[:job], "--address") == "http://head:8265"
    assert words[job + 1 :][:4] == ["env", "-C", str(tmp_path), words[job + 4]]
    assert words[job + 5 :][:2] == [sys.executable, str(ROOT / "train.py")]
    assert value(words[job:], "--ray-address") == "auto"
    assert words[job:].count("--lr") == 2
    assert not any(name in done.stdout for name in ("API_KEY=", "TOKEN="))


def test_the_first_call_of_the_large_script_starts_the_teacher_for_a_second(inputs: Path, tmp_path: Path) -> None:
    done = run_script(LARGE, inputs, tmp_path / "run", "--lr", "2e-6", DRY_RUN="1")
    words = shown_command(done.stdout)
    assert words[words.index("--") + 1 :] == ["env", "TEACHER_URL={url}", str(LARGE), "--lr", "2e-6"]
    job = shlex.split(done.stdout.splitlines()[-2][2:])
    assert job[1:5] == ["-m", "ray.scripts.scripts", "job", "submit"]
    assert value(job, "--opd-teacher-url") == "{url}"
    assert job[-4:] == ["--lr", "2e-6", "--ray-address", "auto"]


def test_nodes_share_the_optimizer_and_leave_engines_and_teacher_elsewhere(inputs: Path, tmp_path: Path) -> None:
    """The estimate of a rank's part of the optimizer is halved with twice the nodes."""
    outputs = [
        run_script(
            LARGE, inputs, tmp_path / "run", "--actor-num-nodes", nodes, "--actor-num-gpus-per-node", "8",
            DRY_RUN="1", TEACHER_URL="http://h:1", ENGINE_URLS="http://a:1 http://b:2",
        ).stdout
        for nodes in ("1", "2")
    ]  # fmt: skip
    printed = yaml.safe_load(outputs[1])
    assert printed["engine"]["rollout_engine_url"] == ["http://a:1", "http://b:2"]
    assert printed["derived"]["world_size"] == 16
    one, two = (float(re.findall(r"optimizer (\d+\.\d+)", output)[-1]) for output in outputs)
    assert one == pytest.approx(2 * two, abs=0.01)


@pytest.mark.parametrize(
    ("script", "arguments", "changes", "message"),
    [
        (LARGE, "--actor-num-gpus-per-node 8", {}, "TEACHER_GPUS=6,7: the trainer has the GPUs 0 to 7"),
        (LARGE, "--rollout-num-engines=4", {}, "TEACHER_GPUS=6,7: the rollout engines have the GPUs 4 to 7"),
        (
            LARGE, "--actor-num-nodes 2 --actor-num-gpus-per-node 8", {"TEACHER_URL": "http://h:1"},
            "--sglang-base-gpu-id 4: the rollout engines would have GPUs 4 to 5 of this machine and the trainer 0 to 7",
        ),
        (LARGE, "", {"ENGINE_URLS": "http://ann:s3cret@a:1"}, "ENGINE_URLS holds a user name or password"),
        (MEGATRON, "", {"EVAL_DATA": "mine"}, "EVAL_DATA='mine': give a name and a path"),
        (MEGATRON, "", {"PYTHON": "no-such-python"}, "PYTHON names no program"),
    ],
)  # fmt: skip
def test_what_cannot_work_ends_the_script(
    script: Path, arguments: str, changes: dict[str, str], message: str, inputs: Path, tmp_path: Path
) -> None:
    done = run_script(script, inputs, tmp_path / "run", *arguments.split(), DRY_RUN="1", **changes)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "s3cret" not in done.stdout + done.stderr


def test_an_interpreter_is_named_whole(inputs: Path, tmp_path: Path) -> None:
    """A job has the cluster's PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    changes = {"PYTHON": Path(sys.executable).name, "PATH": path, "TEACHER_URL": "http://h:1"}
    done = run_script(LARGE, inputs, tmp_path / "run", DRY_RUN="1", **changes)
    words = shown_command(done.stdout)
    assert words[0] == words[words.index(str(ROOT / "train.py")) - 1] == sys.executable


def test_without_an_active_environment_the_one_with_cuda_comes_first(tmp_path: Path) -> None:
    common = tmp_path / "examples" / "scripts" / "common.sh"
    common.parent.mkdir(parents=True)
    common.write_text((EXAMPLES / "common.sh").read_text())
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    for name in (".venv", ".venv-gpu"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        command = ["bash", "-c", 'source "$0" && echo "$PYTHON"', str(common)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(python)


def test_data_of_ones_own_is_not_joined_by_gsm8k(inputs: Path, tmp_path: Path) -> None:
    mine = inputs / "mine.jsonl"
    mine.write_text((inputs / "data" / "gsm8k_train.jsonl").read_text())
    changes = {"DRY_RUN": "1", "DATA": str(tmp_path / "none"), "PROMPT_DATA": str(mine)}
    alone = run_script(MEGATRON, inputs, tmp_path / "run", **changes)
    assert (alone.returncode, alone.stderr) == (0, "")
    assert yaml.safe_load(alone.stdout)["evaluation"]["eval_prompt_data"] == []
    both = run_script(MEGATRON, inputs, tmp_path / "run", **changes, EVAL_DATA=f"mine {mine}")
    printed = yaml.safe_load(both.stdout)
    assert printed["data"]["prompt_data"] == str(mine)
    assert printed["evaluation"]["eval_prompt_data"] == [["mine", str(mine)]]


@pytest.mark.parametrize(
    ("changes", "arguments", "made"),
    [({}, "", "train test"), ({"PROMPT_DATA": "x"}, "", ""), ({"EVAL_DATA": "m x"}, "", "train"),
     ({}, "--prompt-data x", "test")],
)  # fmt: skip
def test_gsm8k_is_made_where_it_is_read(
    changes: dict[str, str], arguments: str, made: str, inputs: Path, tmp_path: Path
) -> None:
    """The interpreter writes down what is made, in place of making it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 != */prepare_gsm8k.py ]] || printf "%s " "$3" >>"{tmp_path}/made"\n')
    python.chmod(0o755)
    changes = {"DATA": str(tmp_path / "data"), "PYTHON": str(python)} | changes
    run_script(MEGATRON, inputs, tmp_path / "run", *arguments.split(), **changes)
    found = (tmp_path / "made").read_text() if (tmp_path / "made").exists() else ""
    assert found.split() == made.split()


@pytest.mark.parametrize("script", [SGLANG, LARGE_MEGATRON], ids=["sglang", "megatron"])
def test_what_is_not_there_is_named_with_the_command_that_gets_it(script: Path, inputs: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    done = run_script(script, inputs, tmp_path / "run", DRY_RUN="1", MODELS=str(none), DATA=str(none))
    assert done.returncode == 2
    assert f"--hf-checkpoint {none}" in done.stderr
    student, teacher = ("Qwen3-0.6B", "Qwen3-1.7B") if script == SGLANG else ("Qwen3-8B", "Qwen3-32B")
    for model in (student, teacher):
        assert f"hint: hf download Qwen/{model} --local-dir {none}/{model}" in done.stderr
    for split in ("train", "test"):
        assert f"tools/prepare_gsm8k.py --split {split} --output {none}/gsm8k_{split}.jsonl" in done.stderr


def test_a_missing_teacher_ends_the_script_before_a_server(inputs: Path, tmp_path: Path) -> None:
    done = run_script(SGLANG, inputs, tmp_path / "run", DRY_RUN="1", TEACHER=str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: the teacher {tmp_path / 'none'} does not exist")


def test_every_variable_is_described() -> None:
    """Those that the scripts read with a default, in the comment that begins them and on the page."""
    head, page = (EXAMPLES / "common.sh").read_text().split("\n\n", 1)[0], (ROOT / "docs" / "teachers.md").read_text()
    not_settings = {"VIRTUAL_ENV", "CONDA_PREFIX", "STUDENT_MODEL", "TEACHER_MODEL"}
    for script in EXAMPLES.glob("*.sh"):
        text = script.read_text()
        comment = text.partition("\nset -euo")[0]
        for name in set(re.findall(r"\$\{([A-Z_]+):-", text)) - not_settings:
            assert re.search(rf"^#   {name}\b", head + "\n" + comment, re.MULTILINE), (script, name)
            assert f"`{name}`" in page, name


def test_a_script_that_is_told_to_end_stops_its_job_by_its_id(inputs: Path, tmp_path: Path) -> None:
    """The client of Ray stands in for itself: it writes down how it is called, and ends when the job is stopped."""
    calls = tmp_path / "calls"
    calls.mkdir()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f'[[ $2 == ray.scripts.scripts ]] || exec "{sys.executable}" "$@"\n'
        f'printf "%s\\n" "$@" >"{calls}/$4.part" && mv "{calls}/$4.part" "{calls}/$4"\n'
        f'[[ $4 == stop ]] || until [[ -e "{calls}/stop" ]]; do sleep 0.05; done\n'
        "[[ $4 == stop ]] || exit 7\n"
    )
    python.chmod(0o755)
    environment = os.environ | {
        "MODELS": str(inputs / "models"), "DATA": str(inputs / "data"), "RUN_DIR": str(tmp_path / "run"),
        "PYTHON": str(python), "TEACHER_URL": "http://h:1",
    }  # fmt: skip
    process = subprocess.Popen([str(LARGE)], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (calls / "submit").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 7
    finally:
        process.kill()
    submitted, stopped = ((calls / name).read_text().splitlines() for name in ("submit", "stop"))
    assert stopped[-1] == value(submitted, "--submission-id")


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TEACHER_URL": "http://ann:s3cret@h:1"}, "--opd-teacher-api-key-env"),
        ({"SGLANG_FLAGS": "--tp 2 --api-key s3cret"}, "SGLANG_FLAGS holds --api-key"),
        ({"SGLANG_FLAGS": "--admin-api=s3cret"}, "SGLANG_FLAGS holds --admin-api-key"),
    ],
)
def test_a_secret_that_would_stand_on_a_command_line_ends_the_script_unshown(
    inputs: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    done = run_script(SGLANG, inputs, tmp_path / "run", DRY_RUN="1", **changes)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "s3cret" not in done.stdout + done.stderr


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
