"""The estimate of a teacher's speed: what is measured, and that its units fit together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.throughput import RunSizes, Throughput, duration, measure


class Clocked:
    """A teacher whose clock moves by ``seconds`` for every token that it scores."""

    name = "clocked"

    def __init__(self, seconds: float) -> None:
        self.now = 100.0
        self.calls: list[list[Sample]] = []
        self._seconds = seconds

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        self.calls.append(list(samples))
        self.now += self._seconds * sum(sample.response_length for sample in samples)
        return [TeacherScores(np.zeros(sample.response_length)) for sample in samples]

    def close(self) -> None:
        pass


def test_the_measurement_has_the_sizes_of_the_run() -> None:
    teacher = Clocked(0.01)
    sizes = RunSizes(samples=256, group=4, prompt_tokens=30, response_tokens=20, steps=50)
    found = measure(teacher, sizes, range(5, 90), clock=lambda: teacher.now)
    warm_up, timed = teacher.calls
    assert (len(warm_up), len(timed)) == (1, 64)
    assert {(len(sample.prompt_tokens), sample.response_length) for sample in timed} == {(30, 20)}
    prompts = {tuple(sample.prompt_tokens) for sample in timed}
    assert len(prompts) == len({sample.group_index for sample in timed}) == 16
    assert tuple(warm_up[0].prompt_tokens) not in prompts
    assert min(sample.tokens.min() for sample in timed) >= 5
    # 0.2 s a sample, so 5 samples and 100 tokens a second, 51.2 s a step
    assert found.seconds == pytest.approx(64 * 0.2)
    assert found.samples_per_second == pytest.approx(5.0)
    assert found.tokens_per_second == pytest.approx(100.0)
    assert found.seconds_per_step == pytest.approx(51.2)
    assert "a step of 256 samples takes the teacher 51.2 s, 50 steps 42.7 min" in found.describe()


@pytest.mark.parametrize(
    ("sizes", "measured"),
    [
        (RunSizes(samples=8, group=4, prompt_tokens=10, response_tokens=10), 8),
        (RunSizes(samples=4096, group=16, prompt_tokens=1000, response_tokens=3096), 16),
        (RunSizes(samples=4096, group=1, prompt_tokens=1, response_tokens=100_000), 1),
        (RunSizes(samples=4096, group=100, prompt_tokens=10, response_tokens=10), 100),
    ],
    ids=["all of a small step", "within the tokens", "one long sample", "one large group"],
)
def test_a_measurement_is_bounded(sizes: RunSizes, measured: int) -> None:
    assert sizes.measured == measured


def test_units_are_consistent_and_readable() -> None:
    sizes = RunSizes(samples=128, group=1, prompt_tokens=10, response_tokens=40)
    found = Throughput(sizes, 64, 4.0)
    assert found.seconds_per_step == sizes.samples / found.samples_per_second == 8.0
    assert found.tokens_per_second == 40 * found.samples_per_second
    assert "steps" not in found.describe()
    assert [duration(seconds) for seconds in (0.1234, 119, 120, 7199, 7200)] == [
        "0.123 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
    ]
