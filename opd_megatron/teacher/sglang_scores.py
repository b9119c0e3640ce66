"""From what a server says about given tokens to the scores of a sample."""

from __future__ import annotations

import numpy as np

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.sglang_answer import Reading, TopK


def scores_of(sample: Sample, reading: Reading | None, unscored: int, teacher: str) -> TeacherScores:
    """What ``reading`` says of the response tokens but the first ``unscored``, which are not valid."""
    length = sample.response_length
    return TeacherScores(
        _padded(length, unscored, None if reading is None else reading.log_probs_N),
        np.arange(length) >= unscored,
        teacher=teacher,
        weight_version="" if reading is None else reading.weight_version,
    )


def take_record(scores: TeacherScores, unscored: int, k: int, top: TopK | None) -> None:
    """Give the scores a record of ``k`` tokens for each position, all zeros where there is no score."""
    length = len(scores.log_probs_T)
    scores.top_ids_TK = _padded(length, unscored, None if top is None else top.ids_NK, k).astype(np.int32)
    scores.top_log_probs_TK = _padded(length, unscored, None if top is None else top.log_probs_NK, k)
    scores.tail_log_mass_T = _padded(length, unscored, None if top is None else top.tail_log_mass_N)


def _padded(length: int, unscored: int, values_N: np.ndarray | None, *shape: int) -> np.ndarray:
    """``values_N`` for the tokens that have a score, after zeros for those that have none."""
    array = np.zeros((length, *shape), dtype=np.float32 if values_N is None else values_N.dtype)
    if values_N is not None:
        array[unscored:] = values_N
    return array
