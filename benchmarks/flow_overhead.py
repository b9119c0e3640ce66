"""Time that the pipeline itself takes per sample: engine, reward and teacher answer at once.

    python benchmarks/flow_overhead.py --prompts 256 --copies 8

Prints the fastest and the median of the repetitions for the ways a rollout can take, on the clock and in CPU time,
which depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from opd_megatron.flow import RolloutFlow, Stages
from opd_megatron.flow.filters import unequal_rewards
from opd_megatron.reward.base import CheckedReward, PerSample
from opd_megatron.sample import Sample, TeacherScores


class InstantPrompts:
    """As many prompts as are asked for; a prompt is its number."""

    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, n: int) -> list[Any]:
        self.drawn += n
        return list(range(self.drawn - n, self.drawn))


class InstantEngine:
    """Finished samples of ``tokens`` tokens."""

    def __init__(self, copies: int, tokens: int) -> None:
        self.copies = copies
        self.response = np.arange(tokens)

    async def stream(
        self, records: Sequence[Any], rollout_id: int, first_group: int = 0
    ) -> AsyncGenerator[Sample, None]:
        for group in range(first_group, first_group + len(records)):
            for copy in range(self.copies):
                index, response = group * self.copies + copy, self.response
                yield Sample(index, group, "", np.arange(8), response_tokens=response, response=str(copy))


class InstantTeacher:
    """The same scores for every sample."""

    name = "instant"

    async def score_one(self, sample: Sample) -> TeacherScores:
        return TeacherScores(np.zeros(sample.response_length, dtype=np.float32))

    def begin_step(self, deadline: float | None) -> None:
        """Nothing to bound."""

    async def end_step(self, deadline: float | None) -> None:
        """Nothing to prove."""

    def statistics(self) -> dict[str, float]:
        return dict.fromkeys(("requests", "retries", "samples", "wait_seconds", "in_flight_limit"), 0.0)

    async def aclose(self) -> None:
        """Nothing is open."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--copies", type=int, default=8, help="samples per prompt")
    parser.add_argument("--tokens", type=int, default=512, help="response tokens per sample")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    count = arguments.prompts * arguments.copies
    base: dict[str, Any] = {"batch": arguments.prompts, "copies": arguments.copies}
    reward = CheckedReward(PerSample(lambda sample: float(sample.index % 2)), "stop", 0.0)
    ways: dict[str, dict[str, Any]] = {
        "making samples alone": {},
        "reward": {"reward": reward},
        "reward and teacher": {"reward": reward, "teacher": InstantTeacher()},
        "reward, filter and teacher": {"reward": reward, "teacher": InstantTeacher(), "keep": unequal_rewards},
    }
    print(
        f"{arguments.prompts} prompts x {arguments.copies} samples of {arguments.tokens} tokens; {os.cpu_count()} "
        f"{platform.processor() or platform.machine()} cores, load {os.getloadavg()[0]:.1f}"
    )
    for name, parts in ways.items():
        walls, cpus = [], []
        for _ in range(arguments.repetitions):
            engine = InstantEngine(arguments.copies, arguments.tokens)
            flow = RolloutFlow(Stages(source=engine, prompts=InstantPrompts(), **base, **parts))
            wall, cpu = time.perf_counter(), time.process_time()
            flow.make(0)
            walls.append((time.perf_counter() - wall) / count * 1e3)
            cpus.append((time.process_time() - cpu) / count * 1e3)
            flow.close()
        print(
            f"{name:>27}: fastest {min(walls):.3f} ms, median {statistics.median(walls):.3f} ms; CPU "
            f"{min(cpus):.3f} ms, median {statistics.median(cpus):.3f} ms per sample"
        )


if __name__ == "__main__":
    main()
