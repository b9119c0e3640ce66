"""How long a teacher will take: a few requests of the run's sizes, timed, and what they mean for a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opd_megatron.sample import Sample
from opd_megatron.teacher.protocol import Teacher

MOST_SAMPLES = 64
"""Samples of one measurement: enough to keep a server busy."""
MOST_TOKENS = 65536
"""Tokens of one measurement, prompts included, unless one group alone has more: seconds on a large teacher."""


@dataclass(frozen=True)
class RunSizes:
    """What one step asks of the teacher: ``samples`` in groups of ``group`` with one prompt, of so many tokens.

    ``steps`` is the length of the run, None where it is not known.
    """

    samples: int
    group: int
    prompt_tokens: int
    response_tokens: int
    steps: int | None = None

    @property
    def measured(self) -> int:
        """Samples of a measurement: whole groups, no more than a step has."""
        budget = min(MOST_SAMPLES, MOST_TOKENS // (self.prompt_tokens + self.response_tokens))
        return min(self.samples, max(1, budget // self.group) * self.group)


@dataclass(frozen=True)
class Throughput:
    """``samples`` of ``sizes`` were scored in ``seconds``."""

    sizes: RunSizes
    samples: int
    seconds: float

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Response tokens that get a score."""
        return self.samples_per_second * self.sizes.response_tokens

    @property
    def seconds_per_step(self) -> float:
        """Time of the teacher for all samples of a step, were it to do nothing else."""
        return self.sizes.samples / self.samples_per_second

    def describe(self) -> str:
        """The measurement and what it means, on one line."""
        sizes = self.sizes
        text = (
            f"{self.samples} samples of {sizes.prompt_tokens} + {sizes.response_tokens} tokens in {self.seconds:.2f} s "
            f"({self.samples_per_second:.3g} samples/s, {self.tokens_per_second:.3g} scored tokens/s): a step of "
            f"{sizes.samples} samples takes the teacher {duration(self.seconds_per_step)}"
        )
        if sizes.steps is not None:
            text += f", {sizes.steps} steps {duration(self.seconds_per_step * sizes.steps)}"
        return text + "; no step is shorter than that, however much of it overlaps with sampling"


def duration(seconds: float) -> str:
    """``seconds`` in the unit that reads best."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def measure(
    teacher: Teacher, sizes: RunSizes, ids: Sequence[int], *, clock: Callable[[], float] = time.perf_counter
) -> Throughput:
    """Time ``teacher`` on samples of random ``ids``, in one call as a step makes it; one sample before warms it up.

    The ids are new each time, so a server's prefix cache holds no more of them than it would of a step's samples.
    Raises :class:`~opd_megatron.teacher.protocol.TeacherError` if one of them cannot be scored.
    """
    generator = np.random.default_rng()  # not seeded: the same ids again would be answered from a cache
    pool = np.asarray(ids, dtype=np.int64)
    samples: list[Sample] = []
    for index in range(sizes.measured + 1):
        # Index 0 is the warm-up, in a group of its own.
        group = 0 if index == 0 else 1 + (index - 1) // sizes.group
        if not samples or group != samples[-1].group_index:
            prompt = generator.choice(pool, sizes.prompt_tokens)
        response = generator.choice(pool, sizes.response_tokens)
        samples.append(Sample(index, group, "", prompt_tokens=prompt, response_tokens=response))
    teacher.score(samples[:1])
    began = clock()
    teacher.score(samples[1:])
    return Throughput(sizes, sizes.measured, max(clock() - began, 1e-9))
