"""An engine, rewards and a teacher for the tests of the flow, whose answers come when and as the test wants them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd_megatron.flow import Rollout, RolloutFlow, Stages
from opd_megatron.rollout.prompt import new_sample
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure
from tests.rollout.records import Record

Delay = Callable[[Sample], float]


class Prompts:
    """Endless prompts; the label is the prompt's number."""

    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, n: int) -> list[Record]:
        self.drawn += n
        return [Record("1+1=", label=number, index=number) for number in range(self.drawn - n, self.drawn)]


@dataclass
class Source:
    """Finishes the samples in the order of their delays; those of one delay in a burst."""

    copies: int
    delay: Delay = lambda sample: 0.0
    finished: list[int] = field(default_factory=list)
    closed: int = 0

    async def stream(
        self, records: Sequence[Any], rollout_id: int, first_group: int = 0
    ) -> AsyncGenerator[Sample, None]:
        samples = [
            new_sample(record, group * self.copies + copy, group)
            for group, record in enumerate(records, start=first_group)
            for copy in range(self.copies)
        ]
        try:
            clock = 0.0
            for sample in sorted(samples, key=lambda sample: (self.delay(sample), sample.index)):
                if self.delay(sample) > clock:
                    await asyncio.sleep(self.delay(sample) - clock)
                clock = self.delay(sample)
                length = 1 + sample.index % 3
                sample.response_tokens = np.full(length, 3)
                sample.loss_mask = np.ones(length, dtype=bool)
                self.finished.append(sample.index)
                yield sample
        finally:
            self.closed += 1


@dataclass
class Reward:
    """The reward of sample ``i`` is ``value(sample)``."""

    value: Callable[[Sample], float] = lambda sample: float(sample.index % 2)
    takes_groups: bool = False
    delay: Delay = lambda sample: 0.0
    calls: list[list[int]] = field(default_factory=list)

    def score(self, samples: Sequence[Sample]) -> None:
        self.calls.append([sample.index for sample in samples])
        for sample in samples:
            sample.reward = self.value(sample)

    async def score_async(self, samples: Sequence[Sample]) -> None:
        await asyncio.sleep(max(map(self.delay, samples)))
        self.score(samples)

    def close(self) -> None:
        pass


@dataclass
class Teacher:
    """Answers sample ``i`` with log-probabilities of ``-i``; ``fails`` says which it cannot score, and why."""

    delay: Delay = lambda sample: 0.0
    fails: Callable[[Sample], FailureKind | None] = lambda sample: None
    name: str = "scripted"
    asked: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    abandoned: list[int] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    is_closed: bool = False
    changed: bool = False
    """Whether its weights turn out to be others as a step ends."""
    proved: list[int] = field(default_factory=list)
    """How many answers had been given at each proof."""

    async def score_one(self, sample: Sample) -> TeacherScores:
        self.asked.append(sample.index)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.delay(sample))
        except asyncio.CancelledError:
            self.abandoned.append(sample.index)
            raise
        finally:
            self.open -= 1
        kind = self.fails(sample)
        if kind is not None:
            raise TeacherFailure(f"sample {sample.index} of no use", kind)
        self.answered.append(sample.index)
        return TeacherScores(np.full(sample.response_length, -float(sample.index)), teacher=self.name)

    def begin_step(self, deadline: float | None) -> None:
        pass

    async def end_step(self, deadline: float | None) -> None:
        self.proved.append(len(self.answered))
        if self.changed:
            raise TeacherFailure("other weights", FailureKind.CHANGED_MODEL)

    def statistics(self) -> dict[str, float]:
        return dict.fromkeys(("requests", "retries", "samples", "wait_seconds", "in_flight_limit"), 0.0)

    async def aclose(self) -> None:
        self.is_closed = True


def make(stages: Stages, rollout_id: int = 0) -> Rollout:
    flow = RolloutFlow(stages)
    try:
        return flow.make(rollout_id)
    finally:
        flow.close()
