"""Ctrl-C on a terminal reaches every process of a run; what the user sees is one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.processes import interrupt_twice, start_run, wait_for, wait_for_step
from tests.e2e.support import base_arguments

LAST_LINE = "interrupted: stopped at once, what is not in a checkpoint is lost"


@pytest.mark.parametrize("mapped", ["libtorch_cpu", "safetensors"])
def test_ctrl_c_during_the_start_is_one_line(student: Path, prompts: Path, tmp_path: Path, mapped: str) -> None:
    """While torch is being imported, and later."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = start_run(base_arguments(student, prompts, run), log)
    try:
        maps = Path("/proc", str(process.pid), "maps")
        wait_for(lambda: mapped in maps.read_text(), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
    assert log.read_text().splitlines()[-1] == LAST_LINE
    assert "Traceback" not in log.read_text()
    assert not run.exists()


def test_a_second_ctrl_c_is_one_line(student: Path, prompts: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    # a step of it takes long enough to be interrupted twice
    slow = {"rollout_batch_size": 512, "n_samples_per_prompt": 8, "num_rollout": 100_000}
    process = start_run(base_arguments(student, prompts, run, **slow, rm_type="math"), log)
    try:
        wait_for_step(process, run, 1)
        assert interrupt_twice(process, log) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
    assert log.read_text().splitlines()[-1] == LAST_LINE
    assert "Traceback" not in log.read_text()
