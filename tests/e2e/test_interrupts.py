"""Ctrl-C on a terminal reaches every process of a run; what the user sees is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.support import base_arguments
from tests.e2e.test_resume import ROOT, wait_for_step

LAST_LINE = "interrupted: stopped at once, what is not in a checkpoint is lost"


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, as a shell starts it."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            process_group=0,
        )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("mapped", ["libtorch_cpu", "safetensors"])
def test_ctrl_c_during_the_start_is_one_line(student: Path, prompts: Path, tmp_path: Path, mapped: str) -> None:
    """While torch is being imported, and later."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(base_arguments(student, prompts, run), log)
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
    process = start(base_arguments(student, prompts, run, **slow, rm_type="math"), log)
    try:
        wait_for_step(process, run, 1)
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: "once more to stop at once" in log.read_text(), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
    assert log.read_text().splitlines()[-1] == LAST_LINE
    assert "Traceback" not in log.read_text()
