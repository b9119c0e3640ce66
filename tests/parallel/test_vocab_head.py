"""The vocabulary head over tensor- and context-parallel ranks equals dense float64 arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel import vocab_head_work as work
from tests.parallel.pool import WorkerPool

pytestmark = pytest.mark.parallel

# student's and teacher's shards start at different columns; ranks hold padding only; no padding at all
VOCABULARIES: dict[str, dict[str, Any]] = {
    "same-padding": {"vocab_size": 11, "padded": 16, "teacher_padded": 16},
    "teacher-padded-further": {"vocab_size": 11, "padded": 12, "teacher_padded": 24, "temperature": 1.0},
    "student-padded-further": {"vocab_size": 7, "padded": 24, "teacher_padded": 8, "temperature": 1.7},
    "no-padding": {"vocab_size": 16, "padded": 16, "teacher_padded": 20},
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
every_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES)
every_precision = pytest.mark.parametrize("dtype", TOLERANCES)


def check(pool: WorkerPool, vocabulary: str, tensor_parallel: int, first_tokens: int, dtype: torch.dtype) -> None:
    settings = VOCABULARIES[vocabulary]
    for errors in pool.run(work.errors, settings, tensor_parallel, first_tokens, dtype):
        assert {name: error for name, error in errors.items() if not error < TOLERANCES[dtype]} == {}
    if dtype == torch.float64:
        for k in (1, 5, settings["vocab_size"]):
            for errors in pool.run(work.top_k_errors, settings, tensor_parallel, first_tokens, k):
                assert errors.pop("ids") == 0
                assert max(errors.values()) < 1e-10, errors


@every_precision
@every_vocabulary
def test_two_tensor_parallel_ranks(two: WorkerPool, vocabulary: str, dtype: torch.dtype) -> None:
    check(two, vocabulary, 2, 0, dtype)


@every_precision
@every_vocabulary
def test_four_tensor_parallel_ranks(four: WorkerPool, vocabulary: str, dtype: torch.dtype) -> None:
    check(four, vocabulary, 4, 0, dtype)


@every_precision
@pytest.mark.parametrize("first_tokens", [4, 0])
def test_two_context_parallel_ranks(two: WorkerPool, first_tokens: int, dtype: torch.dtype) -> None:
    """With no tokens on the first rank too."""
    check(two, "same-padding", 1, first_tokens, dtype)


@every_precision
@pytest.mark.parametrize("first_tokens", [4, 0])
def test_two_by_two_ranks(four: WorkerPool, first_tokens: int, dtype: torch.dtype) -> None:
    check(four, "teacher-padded-further", 2, first_tokens, dtype)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_shared_embedding(two: WorkerPool, tensor_parallel: int) -> None:
    for errors in two.run(work.shared_embedding_errors, tensor_parallel):
        assert max(errors.values()) < 1e-10, errors


def test_only_the_rows_of_other_ranks_are_sent(four: WorkerPool) -> None:
    """Of 6 rows a rank and 3 wanted: rank 0 has its own; ranks 1 and 2 want 3-5 and 6-8; rank 3 wants 9 and 10."""
    assert four.run(work.foreign_rows, VOCABULARIES["teacher-padded-further"], 4) == [(0, 3), (3, 3), (3, 3), (2, 2)]
    assert four.run(work.foreign_rows, VOCABULARIES["same-padding"], 4) == [(0, 4), (0, 4), (0, 3), (0, 0)]
