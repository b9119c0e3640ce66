"""A run that stops, by itself, by a signal or by a kill, goes on as if it had not."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.cli import run_cli
from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from opd_megatron.interrupt import resume_command
from opd_megatron.observe.run_folder import read_metrics
from tests.e2e.processes import start_run, wait_for_step
from tests.e2e.support import base_arguments, run_training
from tests.megatron.support import stored_tensors


def assert_same_checkpoint(one: Path, two: Path) -> None:
    first, second = stored_tensors(one), stored_tensors(two)
    assert first.keys() == second.keys()
    assert any("exp_avg" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("distributed", [False, True])
def test_three_and_three_steps_are_six(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, distributed: bool
) -> None:
    common: dict[str, Any] = {
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": teacher,
        "advantage_estimator": "grpo",
        "rm_type": None,
        "custom_rm_path": "tests.e2e.rewards:count_sevens",
        "use_distributed_optimizer": distributed,
        "num_rollout": 6,
        "rollout_batch_size": 12,
        "global_batch_size": 8,
        "lr_warmup_iters": 4,
    }
    straight = run_training(student, prompts, tmp_path / "straight", **common, save_interval=3)
    # The second run goes back to its third rollout; what it wrote beyond that is forgotten.
    run_training(student, prompts, tmp_path / "parts", **common, save_interval=3)
    checkpoints = tmp_path / "parts" / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000006")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = run_training(student, prompts, tmp_path / "parts", **common, load=checkpoints)
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["rollouts"] == 6
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(straight, resumed, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr", "opd/reverse_kl", "reward/mean"):
            assert one[name] == two[name], (one["step"], name)
    assert_same_checkpoint(tmp_path / "straight" / "checkpoints" / "iter_0000006", checkpoints / "iter_0000006")


def test_the_schedule_keeps_its_place_when_a_rollout_comes_to_have_other_steps(
    student: Path, prompts: Path, tmp_path: Path
) -> None:
    """The rates of student and critic are those of a run that had the new options from the start."""
    ppo: dict[str, Any] = {
        "advantage_estimator": "ppo",
        "rm_type": None,
        "custom_rm_path": "tests.e2e.rewards:count_sevens",
        "critic_lr": 2e-3,
    }
    saved = tmp_path / "saved"
    run_training(student, prompts, saved, **ppo, num_rollout=2, micro_batch_size=2, global_batch_size=2)
    checkpoints = saved / "checkpoints"
    for changes, rates, critic_rates in (
        ({}, [5e-4, 2.5e-4], [1e-3, 5e-4]),
        ({"global_batch_size": 4}, [4.375e-4, 1.875e-4], [8.75e-4, 3.75e-4]),
        ({"num_critic_only_steps": 1}, [1e-3 * 2 / 3, 1e-3 / 3], [1e-3, 5e-4]),
        ({"lr_decay_iters": 16, "critic_lr_decay_iters": 16}, [5e-4, 4.375e-4], [1e-3, 8.75e-4]),
    ):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        settings = {"num_rollout": 4, "load": checkpoints, "save_interval": 100, **ppo, **changes}
        lines = run_training(student, prompts, run, **settings)
        assert [line["step"] for line in lines] == [3, 4]
        assert [line["train/lr"] for line in lines] == pytest.approx(rates), changes
        assert [line["train/critic_lr"] for line in lines] == pytest.approx(critic_rates), changes


def test_sigterm_saves_and_says_how_to_go_on(student: Path, prompts: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start_run(base_arguments(student, prompts, run, num_rollout=100_000), log)
    try:
        wait_for_step(process, run, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert inspect_checkpoint(run / "checkpoints").latest == steps[-1]
    last = log.read_text().strip().splitlines()[-1]
    assert "resume with: python" in last
    assert f"--load {run / 'checkpoints'}" in last


def test_kill_while_saving_leaves_the_previous_checkpoint_good(student: Path, prompts: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start_run(base_arguments(student, prompts, run, num_rollout=100_000, save_interval=1), log)
    try:
        wait_for_step(process, run, 3)
        deadline = time.monotonic() + 60
        while not list((run / "checkpoints").glob("*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.0005)
    finally:
        process.kill()
        process.wait()
    info = inspect_checkpoint(run / "checkpoints")
    assert info.problem is None
    assert isinstance(info.latest, int)
    resumed = run_training(
        student, prompts, run, num_rollout=info.latest + 2, load=run / "checkpoints", lr_decay_style="constant"
    )
    assert [line["step"] for line in resumed] == list(range(1, info.latest + 3))


def test_resume_command_names_the_new_checkpoint_and_no_secret(tmp_path: Path) -> None:
    arguments = [
        "--run-dir",
        str(tmp_path),
        "--load",
        "old",
        "--ckpt-step=3",
        "--opd-teacher-url",
        "http://me:pw@host:1",
    ]
    arguments += ["--finetune", "--no-load-rng", "--no-load-optim"]
    command = resume_command(parse_options(["--run-dir", str(tmp_path)]), ["train.py", *arguments])
    assert command.endswith(f"--load {tmp_path / 'checkpoints'}")
    assert not any(flag in command for flag in ("--finetune", "--no-load"))
    assert "--ckpt-step" not in command
    assert "old" not in command
    assert "pw" not in command
    without = resume_command(parse_options(["--run-dir", str(tmp_path), "--no-save-optim"]), ["train.py"])
    assert without.endswith(f"--load {tmp_path / 'checkpoints'} --no-load-optim")


def test_an_optimizer_of_another_kind_is_one_line(student: Path, prompts: Path, tmp_path: Path) -> None:
    run_training(student, prompts, tmp_path / "run", num_rollout=1)
    checkpoints = tmp_path / "run" / "checkpoints"
    for change in ({"optimizer": "sgd"}, {"bf16": True}):
        with pytest.raises(UserError, match="its optimizer was saved with"):
            run_training(student, prompts, tmp_path / "run", num_rollout=2, load=checkpoints, **change)
    resumed = run_training(
        student, prompts, tmp_path / "run", num_rollout=2, load=checkpoints, use_distributed_optimizer=True
    )
    assert [line["step"] for line in resumed] == [1, 2]
    run_training(
        student, prompts, tmp_path / "run", num_rollout=3, load=checkpoints, optimizer="sgd", no_load_optim=True
    )
    assert inspect_checkpoint(checkpoints).steps == [1, 2, 3]


def test_finetuning_begins_a_run_with_the_weights_of_another(student: Path, prompts: Path, tmp_path: Path) -> None:
    run_training(student, prompts, tmp_path / "first", num_rollout=2)
    checkpoints = tmp_path / "first" / "checkpoints"
    found = run_training(student, prompts, tmp_path / "tuned", num_rollout=2, load=checkpoints, finetune=True)
    expected = run_training(student, prompts, tmp_path / "expected", num_rollout=2, ref_load=checkpoints)
    assert [line["step"] for line in found] == [1, 2]
    for one, two in zip(found, expected, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr", "rollout/response_length_mean"):
            assert one[name] == two[name], name
    with pytest.raises(UserError, match=r"holds a run already: resume it .* without --finetune"):
        run_training(student, prompts, tmp_path / "first", num_rollout=4, load=checkpoints, finetune=True)


def test_old_checkpoints_are_removed_as_told(student: Path, prompts: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_interval": 1, "save_keep_last": 2, "save_retain_interval": 3}
    run_training(student, prompts, tmp_path / "run", num_rollout=6, **settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert inspect_checkpoint(checkpoints).steps == [3, 5, 6]
    run_training(student, prompts, tmp_path / "run", num_rollout=5, load=checkpoints, ckpt_step=3, **settings)
    assert (inspect_checkpoint(checkpoints).steps, inspect_checkpoint(checkpoints).latest) == ([3, 4, 5, 6], 5)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(
    student: Path, prompts: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(student, prompts, tmp_path / "run", num_rollout=2, save_interval=1)
    checkpoints = tmp_path / "run" / "checkpoints"
    path = checkpoints / "iter_0000002" / file
    path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    arguments = base_arguments(student, prompts, tmp_path / "run", num_rollout=3, load=checkpoints)
    assert run_cli(train.main, arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "iter_0000002" in line
    assert file in line or "*.distcp" in line
    assert "step 1 is complete: load it with --ckpt-step 1" in line
    assert run_cli(train.main, [*arguments, "--ckpt-step", "1"]) == 0
    assert inspect_checkpoint(checkpoints).latest == 3
