"""Where the time goes: seconds per phase, tokens per second, peak memory; a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

RECENT_STEPS = 20
"""Steps that the estimate of the remaining time averages over."""


class PhaseTimer:
    """Adds up wall-clock seconds by the name of a phase; a phase inside another counts in both."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._start = clock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; it counts although the block raises."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def collect(self) -> dict[str, float]:
        """``perf/<phase>_seconds`` and ``perf/step_seconds`` (everything) since the last call, and start anew."""
        now = self._clock()
        collected = {f"perf/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        collected["perf/step_seconds"] = now - self._start
        self._seconds, self._start = {}, now
        return collected


def peak_memory_gib() -> float:
    """Largest memory of this process so far, in GiB: of its current CUDA device if it uses one, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # unlike ru_maxrss, this does not start from the peak of the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def format_seconds(seconds: float) -> str:
    """``4:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Progress of ``total`` steps, of which ``done`` are behind us; use it as a context manager.

    On a terminal it is a bar with the current phase; elsewhere it is a line at most every ``line_interval`` seconds,
    and always one for the first and the last step::

        with Progress("train", total=400) as progress:
            for step in range(400):
                with progress.phase("rollout"):
                    ...
                metrics.update(progress.finish_step(tokens=5200, shown={"reward": 0.31}))
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        line_interval: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._description, self._total, self._done, self._first = description, total, done, done
        self._stream, self._line_interval, self._clock = stream, line_interval, clock
        self._timer = PhaseTimer(clock)
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_line: float | None = None
        self._bar: _Bar | None = None

    def __enter__(self) -> Progress:
        stream = self._stream or sys.stdout
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _Bar(self._description, self._total, self._done, stream)
        self._timer.collect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block under ``perf/<name>_seconds`` and show its name meanwhile."""
        if self._bar is not None:
            self._bar.show_phase(name)
        with self._timer.phase(name):
            yield

    def finish_step(
        self, *, tokens: int | None = None, shown: Mapping[str, float] | None = None, always: bool = False
    ) -> dict[str, float]:
        """Count one step and return its metrics.

        These are ``perf/<phase>_seconds``, ``perf/step_seconds``, ``perf/peak_memory_gib`` and, where ``tokens`` says
        how many the step trained on or made, ``perf/tokens_per_second``. ``shown`` are numbers for the eye only,
        and ``always`` makes a line of them that comes soon after another.
        """
        metrics = self._timer.collect()
        seconds = metrics["perf/step_seconds"]
        phases = {name[5:-8]: value for name, value in metrics.items() if name != "perf/step_seconds"}
        metrics["perf/peak_memory_gib"] = peak_memory_gib()
        if tokens is not None:
            metrics["perf/tokens_per_second"] = tokens / seconds if seconds > 0 else 0.0
        self._done += 1
        self._recent.append(seconds)
        remaining = max(0, self._total - self._done) * sum(self._recent) / len(self._recent)
        parts = [f"{seconds:.2f} s", f"ETA {format_seconds(remaining)}"]
        if tokens is not None:
            parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tokens/s")
        if shown:
            parts.append(", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        if phases:
            # last, because a narrow terminal cuts the line
            parts.append(", ".join(f"{name} {value:.2f} s" for name, value in phases.items()))
        self._show(" | ".join(parts), always)
        return metrics

    def _show(self, text: str, always: bool) -> None:
        if self._bar is not None:
            self._bar.advance(text)
            return
        now = self._clock()
        edge = self._done in (self._first + 1, self._total)
        if always or edge or self._last_line is None or now - self._last_line >= self._line_interval:
            self._last_line = now
            stream = self._stream or sys.stdout
            print(f"{self._description} {self._done}/{self._total} | {text}", file=stream, flush=True)


class _Bar:
    """A rich progress bar; what is printed meanwhile appears above it."""

    def __init__(self, description: str, total: int, done: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self._progress: Any = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}", style="cyan", markup=False),
            # takes what the others leave of the line and is cut there
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=Console(file=stream),
            expand=True,
        )
        self._task = self._progress.add_task(description, total=total, completed=done, phase="", text="")
        self._progress.start()

    def show_phase(self, name: str) -> None:
        self._progress.update(self._task, phase=name)

    def advance(self, text: str) -> None:
        self._progress.update(self._task, advance=1, phase="", text=text)

    def close(self) -> None:
        self._progress.stop()


def track(items: Iterable[Item], description: str, total: int, *, stream: TextIO | None = None) -> Iterator[Item]:
    """Iterate over ``items``, ``total`` in number, and show how far it is."""
    with Progress(description, total, stream=stream) as progress:
        for item in items:
            yield item
            progress.finish_step()
