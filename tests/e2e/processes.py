"""Runs of ``train.py`` in a process of their own, and Ctrl-C as a terminal sends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start_run(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, as a shell starts it; ``log`` gets what it prints."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
            process_group=0,
        )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds; fails where the process ends before, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int, seconds: float = 120.0) -> None:
    """Wait until the run has logged ``step`` steps."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step, process, seconds)


def interrupt_twice(process: subprocess.Popen[bytes], log: Path) -> int:
    """The exit code after two Ctrl-C, the second of which comes when the first was noted."""
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: "once more to stop at once" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(60)
