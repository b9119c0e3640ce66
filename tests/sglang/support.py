"""What the tests of faults share: samples, scores of all of them or the failure of each, and conditions to wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import StreamingTeacher, TeacherFailure
from tests.sglang.conftest import Served

Outcome = TeacherScores | TeacherFailure
LIMIT = 60.0
"""Seconds that scoring a handful of samples may take, faults and retries included."""


def mixed_samples(served: Served, count: int, seed: int = 21) -> list[Sample]:
    """Samples of many shapes; every fourth one starts a group with a prompt of its own, one in ten has no response."""
    generator = np.random.default_rng(seed)
    samples: list[Sample] = []
    for index in range(count):
        if index % 4 == 0:
            prompt = generator.integers(served.vocab_size, size=int(generator.integers(1, 20)))
        length = 0 if index % 10 == 3 else int(generator.integers(1, 40))
        response = generator.integers(served.vocab_size, size=length)
        samples.append(Sample(index, index // 4, "", prompt_tokens=prompt, response_tokens=response))
    return samples


def score_all(teacher: StreamingTeacher, samples: Sequence[Sample], limit: float = LIMIT) -> list[Outcome]:
    """Scores or failure of each sample, all asked for at once; raises ``TimeoutError`` after ``limit`` seconds."""

    async def ask() -> list[Outcome | BaseException]:
        try:
            async with asyncio.timeout(limit):
                return await asyncio.gather(*map(teacher.score_one, samples), return_exceptions=True)
        finally:
            await teacher.aclose()

    outcomes: list[Outcome] = []
    for outcome in asyncio.run(ask()):
        if not isinstance(outcome, TeacherScores | TeacherFailure):
            assert isinstance(outcome, BaseException)
            raise outcome
        outcomes.append(outcome)
    return outcomes


def assert_same_scores(found: Sequence[Outcome], expected: Sequence[Outcome], atol: float = 0.0) -> None:
    """Every sample is scored, and by the same numbers: bit by bit unless ``atol`` is given."""
    for one, two in zip(found, expected, strict=True):
        assert isinstance(one, TeacherScores), one
        assert isinstance(two, TeacherScores), two
        np.testing.assert_array_equal(one.valid_T, two.valid_T)
        np.testing.assert_allclose(one.log_probs_T, two.log_probs_T, rtol=0, atol=atol)
        for mine, theirs in (
            (one.top_ids_TK, two.top_ids_TK),
            (one.top_log_probs_TK, two.top_log_probs_TK),
            (one.tail_log_mass_T, two.tail_log_mass_T),
        ):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None and not atol:
                np.testing.assert_array_equal(mine, theirs)


def wait_until(condition: Callable[[], bool], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
