"""Two processes never work in one run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.observe.run_folder import read_metrics
from tests.config.inputs import run_train
from tests.e2e.processes import start_run, wait_for_step
from tests.e2e.support import base_arguments, run_training


def test_a_second_run_is_kept_out_and_a_killed_one_leaves_no_lock(student: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    resumable = {"save_interval": 2, "load": run / "checkpoints", "lr_decay_style": "constant"}
    process = start_run(base_arguments(student, prompts, run, num_rollout=100_000, **resumable), tmp_path / "log")
    try:
        wait_for_step(process, run, 2)
        config = (run / "config.yaml").stat()
        second = run_train(base_arguments(student, prompts, run, num_rollout=5, **resumable), tmp_path)
        assert second.code == 2
        assert second.err == second.last_line + "\n"
        assert f"--run-dir {run} is in use by another run (process {process.pid} on " in second.last_line
        assert (run / "config.yaml").stat() == config
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    done = read_metrics(run / "metrics.jsonl")[-1]["step"]
    resumed = run_training(student, prompts, run, **resumable, num_rollout=done + 1)
    assert [line["step"] for line in resumed] == list(range(1, done + 2))
    assert not (run / ".lock").exists()


def test_a_run_refused_while_it_is_built_leaves_nothing(student: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        run_training(student, prompts, tmp_path / "new" / "run", apply_chat_template=True)
    assert list(tmp_path.iterdir()) == []
