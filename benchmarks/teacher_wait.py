"""How long a step waits for the teacher alone, at sizes that do not fit here: simulated rates, the real pipeline.

    python benchmarks/teacher_wait.py --train-seconds 60

The engine decodes all responses at once, ``--decode-rate`` tokens per second and sequence, so a sample is finished
after its length; lengths are log-normal, cut at ``--max-tokens``. The teacher has ``--in-flight`` requests open, which
share its rate evenly. Time runs ``--speed`` times as fast as on the wall. A row of the table is a
teacher that is faster or slower than the engine by ``ratio``; ``after the rollout`` is the share of the step that the
same teacher costs when it is asked when all samples are finished.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from opd_megatron.flow import RolloutFlow, Stages
from opd_megatron.sample import Sample, TeacherScores


class Prompts:
    """As many as are asked for."""

    def next_batch(self, n: int) -> list[Any]:
        return [None] * n


class Engine:
    """Finishes samples in the order of their lengths."""

    def __init__(self, lengths: np.ndarray, seconds_per_token: float) -> None:
        self.lengths = lengths
        self.seconds_per_token = seconds_per_token

    async def stream(
        self, records: Sequence[Any], rollout_id: int, first_group: int = 0
    ) -> AsyncGenerator[Sample, None]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        copies = len(self.lengths) // len(records)
        for index in np.argsort(self.lengths, kind="stable").tolist():
            length = int(self.lengths[index])
            await asyncio.sleep(max(0.0, began + length * self.seconds_per_token - loop.time()))
            yield Sample(index, index // copies, "", np.arange(8), response_tokens=np.zeros(length))


class Teacher:
    """``in_flight`` requests at a time that share the rate evenly."""

    name = "simulated"

    def __init__(self, seconds_per_token: float, in_flight: int) -> None:
        self.seconds_per_token = seconds_per_token * in_flight
        self.room = asyncio.Semaphore(in_flight)

    async def score_one(self, sample: Sample) -> TeacherScores:
        async with self.room:
            await asyncio.sleep(sample.response_length * self.seconds_per_token)
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
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--copies", type=int, default=8, help="samples per prompt")
    parser.add_argument("--mean-tokens", type=float, default=2000.0)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--decode-rate", type=float, default=50.0, help="tokens per second of one sequence")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 4.0])
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--train-seconds", type=float, default=60.0, help="rest of the step")
    parser.add_argument("--speed", type=float, default=100.0)
    arguments = parser.parse_args()
    drawn = np.random.default_rng(0).lognormal(np.log(arguments.mean_tokens) - 0.32, 0.8, (64, 8))
    drawn = np.resize(drawn, arguments.prompts * arguments.copies)
    lengths = np.minimum(drawn, arguments.max_tokens).astype(np.int64) + 1
    rollout = lengths.max() / arguments.decode_rate
    rate = lengths.sum() / rollout
    print(
        f"{len(lengths)} samples, {lengths.sum():,} tokens; the rollout takes {rollout:.0f} s at {rate:,.0f} tokens/s"
    )
    print("| teacher's rate / engine's | teacher tokens/s | waiting, streamed | after the rollout |\n|--:|--:|--:|--:|")
    for ratio in arguments.ratios:
        teacher_rate = ratio * rate
        parts = Stages(
            source=Engine(lengths, 1 / arguments.decode_rate / arguments.speed),
            prompts=Prompts(),
            batch=arguments.prompts,
            copies=arguments.copies,
            teacher=Teacher(1 / teacher_rate / arguments.speed, arguments.in_flight),
        )
        flow = RolloutFlow(parts)
        wait = flow.make(0).metrics["perf/teacher_wait_seconds"] * arguments.speed
        flow.close()
        after = lengths.sum() / teacher_rate
        streamed = wait / (rollout + wait + arguments.train_seconds)
        later = after / (rollout + after + arguments.train_seconds)
        print(f"| {ratio:g} | {teacher_rate:,.0f} | {streamed:.1%} | {later:.1%} |")


if __name__ == "__main__":
    main()
