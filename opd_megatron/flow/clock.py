"""What the stages of a rollout were busy with, and how much of it was waiting for the teacher alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

Stage = Literal["sampling", "reward", "teacher"]


class StageClock:
    """Seconds in which each stage had something to do; they overlap.

    :attr:`teacher_wait` are those in which only the teacher had: nothing was being sampled or judged.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._busy: dict[Stage, int] = {"sampling": 0, "reward": 0, "teacher": 0}
        self._seconds: dict[Stage, float] = {"sampling": 0.0, "reward": 0.0, "teacher": 0.0}
        self._waited = 0.0
        self._last = clock()

    @contextlib.contextmanager
    def at_work(self, stage: Stage) -> Iterator[None]:
        """Something is being done in ``stage`` while the block runs; blocks may overlap."""
        self._tick()
        self._busy[stage] += 1
        try:
            yield
        finally:
            self._tick()
            self._busy[stage] -= 1

    @contextlib.contextmanager
    def held_up(self, stage: Stage) -> Iterator[None]:
        """Inside :meth:`at_work`: nothing is done in ``stage`` while the block runs."""
        self._tick()
        self._busy[stage] -= 1
        try:
            yield
        finally:
            self._tick()
            self._busy[stage] += 1

    @property
    def teacher_wait(self) -> float:
        self._tick()
        return self._waited

    def metrics(self) -> dict[str, float]:
        """``perf/sampling_seconds``, ``perf/reward_seconds``, ``perf/teacher_seconds``, ``perf/teacher_wait_seconds``.

        A stage that had nothing to do is left out.
        """
        self._tick()
        found = {f"perf/{stage}_seconds": seconds for stage, seconds in self._seconds.items() if seconds > 0}
        return found | ({"perf/teacher_wait_seconds": self._waited} if self._seconds["teacher"] > 0 else {})

    def _tick(self) -> None:
        now = self._clock()
        passed, self._last = now - self._last, now
        for stage, count in self._busy.items():
            if count:
                self._seconds[stage] += passed
        if self._busy["teacher"] and not self._busy["sampling"] and not self._busy["reward"]:
            self._waited += passed


def teacher_wait(metrics: dict[str, float]) -> dict[str, float]:
    """``perf/teacher_wait_*`` of a finished step; all time of a teacher that scores whole rollouts is waiting."""
    seconds = metrics.get("perf/teacher_wait_seconds", metrics.get("perf/teacher_seconds"))
    if seconds is None:
        return {}
    total = metrics["perf/step_seconds"]
    return {"perf/teacher_wait_seconds": seconds, "perf/teacher_wait_frac": seconds / total if total > 0 else 0.0}
