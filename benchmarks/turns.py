"""How a benchmark's driver and its measured processes take turns: one line asks for a step, one line answers.

Imported by programs of two environments, so it uses the standard library alone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Turns:
    """The measured process's end. What anything else prints goes to stderr, so that answers stay readable."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._started = self._cpu_started = 0.0

    def ready(self, **facts: Any) -> None:
        """Tell the driver that everything is built; ``facts`` are versions and settings."""
        self._answer({**facts, "peak_memory_bytes": peak_memory_bytes()})

    def wait(self) -> bool:
        """Sleep until the driver asks for a step and start the clock; False when it wants no more."""
        asked = sys.stdin.readline().strip() == "step"
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        return asked

    def done(self, **found: Any) -> None:
        """Stop the clock and report the step."""
        seconds, cpu_seconds = time.perf_counter() - self._started, time.process_time() - self._cpu_started
        self._answer(
            {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_memory_bytes": peak_memory_bytes(), **found}
        )

    def _answer(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
