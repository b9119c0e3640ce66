"""What student and teacher think at each response token, measured in one forward pass without gradient.

Every quantity comes from the vocabulary head in chunks; the logits of a micro-batch never exist. Shape legend: ``N``
response tokens that this rank predicts, ``K`` listed tokens, ``C`` quantities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.options import Options
from opd_megatron.megatron.distribution import Side
from opd_megatron.megatron.forward import head_log_probs, run_micro_batches
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.scoring import merge_parts
from opd_megatron.megatron.teacher_rows import TeacherRows
from opd_megatron.megatron.vocab_head import full_divergence, selected_log_probs, top_k
from opd_megatron.objectives.diagnostics import OF_RECORD, OF_STUDENT, OF_TEACHER
from opd_megatron.objectives.divergences import forward_kl, jensen_shannon, reverse_kl
from opd_megatron.sample import Sample

Columns = dict[str, Tensor]
"""``[N]`` each, by the name of the quantity."""


@torch.no_grad()
def token_diagnostics(
    chunks: Sequence[HiddenStateModel],
    options: Options,
    samples: Sequence[Sample],
    micro_batches: Sequence[tuple[int, ...]],
    teacher_rows: TeacherRows | None,
) -> dict[int, np.ndarray]:
    """A structured float32 array ``[T]`` of each response of this rank's ``micro_batches``, by its place.

    Its fields: those of :data:`~opd_megatron.objectives.diagnostics.OF_STUDENT`; with ``teacher_rows``
    :data:`~opd_megatron.objectives.diagnostics.OF_TEACHER`, and without, where all samples hold a server's top-k,
    :data:`~opd_megatron.objectives.diagnostics.OF_RECORD`. They come from the ranks that report; all ranks call it.
    """
    student = chunks[-1]
    head = {
        "temperature": options.rollout.rollout_temperature,
        "vocab_size": min([student.architecture.vocab_size, *([teacher_rows.vocab_size] if teacher_rows else [])]),
        "group": parallel_state.get_tensor_model_parallel_group(),
    }
    records = [None if sample.teacher_scores is None else sample.teacher_scores.top_ids_TK for sample in samples]
    top_ids = [record for record in records if record is not None]
    # tokens that the student named say nothing of what the teacher finds likeliest
    recorded = len(top_ids) == len(samples) and options.opd.opd_support != "student_topk"
    names = (*OF_STUDENT, *(OF_TEACHER if teacher_rows is not None else OF_RECORD if recorded else ()))

    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> dict[int, np.ndarray]:
        log_probs_N, entropy_N = head_log_probs(student, batch, rows_Nh, head["temperature"])
        found: Columns = {"student_log_prob": log_probs_N, "student_entropy": entropy_N}
        own = Side(rows_Nh, student.head_weight())
        if teacher_rows is not None:
            teacher = Side(*teacher_rows.of(batch))
            found |= _against_teacher(own, teacher, min(options.opd.opd_diagnostics_top_k, head["vocab_size"]), head)
        elif recorded:
            found |= _against_record(own, batch.join(top_ids).long(), head)
        return batch.split(torch.stack([found[name].float() for name in names], dim=1))

    parts = run_micro_batches(chunks, student, samples, micro_batches, last_stage, with_gradients=False)
    fields = np.dtype([(name, np.float32) for name in names])
    return {place: np.ascontiguousarray(table_TC).view(fields)[:, 0] for place, table_TC in merge_parts(parts).items()}


def _against_teacher(student: Side, teacher: Side, k: int, head: dict[str, Any]) -> Columns:
    """Of both whole distributions."""
    divergences = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jensen_shannon(0.5)}
    found = {name: full_divergence(*student, *teacher, kind, **head) for name, kind in divergences.items()}
    student_ids_NK, teacher_ids_NK = (top_k(*side, k, **head).ids_NK for side in (student, teacher))
    teacher_NK, _, found["teacher_entropy"] = selected_log_probs(*teacher, student_ids_NK, **head)
    found["teacher_mass"] = teacher_NK.exp().sum(-1)
    found["student_mass"] = selected_log_probs(*student, teacher_ids_NK, **head)[0].exp().sum(-1)
    found["overlap"] = _shared(student_ids_NK, teacher_ids_NK)
    return found


def _against_record(student: Side, teacher_ids_NK: Tensor, head: dict[str, Any]) -> Columns:
    """Of the student's distribution and the tokens that a server listed."""
    student_ids_NK = top_k(*student, min(teacher_ids_NK.shape[1], head["vocab_size"]), **head).ids_NK
    student_NK = selected_log_probs(*student, teacher_ids_NK, **head)[0]
    return {"student_mass": student_NK.exp().sum(-1), "overlap": _shared(student_ids_NK, teacher_ids_NK)}


def _shared(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Share of the tokens of one list that are in the other, ``[N]``."""
    return (a_NK[:, :, None] == b_NK[:, None, :]).any(-1).float().mean(-1)
