from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from opd_megatron.observe.progress import PhaseTimer, Progress, format_seconds, peak_memory_gib, track


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_start_anew_after_collect():
    clock = Clock()
    timer = PhaseTimer(clock)
    for seconds in (1.0, 2.0):
        with timer.phase("rollout"):
            clock.now += seconds
    with contextlib.suppress(RuntimeError), timer.phase("train"):
        clock.now += 4.0
        raise RuntimeError
    clock.now += 0.5
    assert timer.collect() == {"perf/rollout_seconds": 3.0, "perf/train_seconds": 4.0, "perf/step_seconds": 7.5}
    assert timer.collect() == {"perf/step_seconds": 0.0}


def test_step_metrics():
    clock = Clock()
    with Progress("train", total=2, stream=io.StringIO(), clock=clock) as progress:
        clock.now += 1.0
        with progress.phase("train"):
            clock.now += 3.0
        metrics = progress.finish_step(tokens=1000)
    assert metrics.pop("perf/peak_memory_gib") > 0
    assert metrics == {"perf/train_seconds": 3.0, "perf/step_seconds": 4.0, "perf/tokens_per_second": 250.0}


def test_time_before_the_first_step_is_not_its_time():
    clock = Clock()
    progress = Progress("train", total=1, stream=io.StringIO(), clock=clock)
    clock.now += 50.0
    with progress:
        clock.now += 2.0
        assert progress.finish_step()["perf/step_seconds"] == 2.0


def test_plain_lines_are_limited_in_rate_and_show_first_and_last_step():
    clock, stream = Clock(), io.StringIO()
    with Progress("sft", total=30, done=10, stream=stream, line_interval=5.0, clock=clock) as progress:
        for _ in range(20):
            with progress.phase("train"):
                clock.now += 1.5
            clock.now += 0.5
            progress.finish_step(tokens=8000, shown={"loss": 0.123456})
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "sft 11/30", "sft 14/30", "sft 17/30", "sft 20/30", "sft 23/30", "sft 26/30", "sft 29/30", "sft 30/30"
    ]  # fmt: skip
    assert lines[0] == "sft 11/30 | 2.00 s | ETA 0:38 | 4,000 tokens/s | loss 0.1235 | train 1.50 s"
    assert lines[-1].split(" | ")[2] == "ETA 0:00"


def test_a_step_that_asks_for_a_line_has_one():
    stream = io.StringIO()
    with Progress("train", total=5, stream=stream, clock=Clock()) as progress:
        for step in range(5):
            progress.finish_step(shown={"dev pass@1": 0.25}, always=step == 2)
    assert [line.split(" | ")[0] for line in stream.getvalue().splitlines()] == ["train 1/5", "train 3/5", "train 5/5"]


def test_a_terminal_gets_a_bar_with_the_phase_and_prints_stay_readable():
    leader, follower = os.openpty()
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the other end is closed
                return
            received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as terminal, Progress("train", total=3, stream=terminal) as progress:
        for _ in range(3):
            with progress.phase("rollout"):
                progress._bar._progress.refresh()
            progress.finish_step(tokens=10)
    reader.join(timeout=30)
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(received).decode())
    assert "3/3" in text
    assert re.search(r"1/3 +rollout", text)
    assert "ETA 0:00" in text
    assert "train 1/3 |" not in text


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_gib()
    held = np.ones(int((before + 0.1) * 2**30 / 8))
    after = peak_memory_gib()
    assert after >= held.nbytes / 2**30
    assert after > before


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_peak_memory_is_not_inherited_from_the_parent():
    held = np.ones(2**26)
    script = "from opd_megatron.observe.progress import peak_memory_gib; print(peak_memory_gib())"
    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert float(child.stdout) < held.nbytes / 2**30 / 2


def test_format_seconds():
    assert [format_seconds(value) for value in (0, 5.4, 65, 3723)] == ["0:00", "0:05", "1:05", "1:02:03"]


def test_track_yields_everything_in_order():
    stream = io.StringIO()
    assert list(track("abc", "files", 3, stream=stream)) == ["a", "b", "c"]
    assert stream.getvalue().splitlines()[-1].startswith("files 3/3 |")
