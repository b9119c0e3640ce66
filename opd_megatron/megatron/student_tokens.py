"""What the student makes of each response token, and how far it is from the teacher there: one pass for everything.

There is no gradient. Every quantity comes from the vocabulary head in chunks; the logits of a micro-batch never exist.
Shape legend: ``N`` response tokens that this rank predicts, ``K`` listed tokens, ``C`` quantities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.options import Options
from opd_megatron.config.targets import more_teachers
from opd_megatron.megatron.distribution import Side
from opd_megatron.megatron.forward import head_log_probs, run_micro_batches
from opd_megatron.megatron.loss_inputs import LossInputs, StepLoss
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.scoring import merge_parts
from opd_megatron.megatron.teacher_rows import TeacherRows
from opd_megatron.megatron.vocab_head import selected_log_probs, target_divergence, top_k
from opd_megatron.objectives.diagnostics import OF_CHOICE, OF_RECORD, OF_STUDENT, OF_TEACHER
from opd_megatron.objectives.divergences import forward_kl, jensen_shannon, reverse_kl
from opd_megatron.questions import StudentTokens
from opd_megatron.sample import Sample

Columns = dict[str, Tensor]
"""``[N]`` each, by the name of the quantity."""


@torch.no_grad()
def student_tokens(
    chunks: Sequence[HiddenStateModel],
    options: Options,
    samples: Sequence[Sample],
    micro_batches: Sequence[tuple[int, ...]],
    kept_rows: Mapping[str, TeacherRows],
    question: StudentTokens,
) -> dict[int, np.ndarray]:
    """The answer to ``question`` for each response of this rank's ``micro_batches``, by its place in ``samples``.

    ``kept_rows`` are those of Megatron teachers. Answers come from the ranks that report; all ranks call it.
    """
    student, step = chunks[-1], StepLoss(options, chunks[-1], samples, (), kept_rows)
    closer_look = _CloserLook(options, student, samples, kept_rows) if question.diagnostics else None
    names = (*OF_STUDENT, *OF_CHOICE * question.divergence, *(() if closer_look is None else closer_look.names))

    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> dict[int, np.ndarray]:
        log_probs_N, entropy_N = head_log_probs(student, batch, rows_Nh, options.rollout.rollout_temperature)
        found: Columns = {"student_log_prob": log_probs_N, "student_entropy": entropy_N}
        if question.divergence:
            found["divergence"] = LossInputs(step, batch, rows_Nh).jensen_shannon_N
        if closer_look is not None:
            found |= closer_look(batch, rows_Nh)
        return batch.split(torch.stack([found[name].float() for name in names], dim=1))

    parts = run_micro_batches(chunks, student, samples, micro_batches, last_stage, with_gradients=False)
    fields = np.dtype([(name, np.float32) for name in names])
    return {place: np.ascontiguousarray(table_TC).view(fields)[:, 0] for place, table_TC in merge_parts(parts).items()}


class _CloserLook:
    """The diagnostics of a micro-batch: the teacher's hidden rows are compared with, else what a server recorded."""

    def __init__(
        self,
        options: Options,
        student: HiddenStateModel,
        samples: Sequence[Sample],
        kept_rows: Mapping[str, TeacherRows],
    ) -> None:
        self._student = student
        self._teacher_rows = None if more_teachers(options) else kept_rows.get("teacher")
        sizes = [student.architecture.vocab_size]
        if self._teacher_rows is not None:
            sizes.append(self._teacher_rows.vocab_size)
        self._head: dict[str, Any] = {
            "temperature": options.rollout.rollout_temperature,
            "vocab_size": min(sizes),
            "group": parallel_state.get_tensor_model_parallel_group(),
        }
        self._k = min(options.opd.opd_diagnostics_top_k, min(sizes))
        records = [None if sample.teacher_scores is None else sample.teacher_scores.top_ids_TK for sample in samples]
        self._top_ids = [record for record in records if record is not None]
        # tokens that the student named say nothing of what the teacher finds likeliest
        recorded = len(self._top_ids) == len(samples) and options.opd.opd_support != "student_topk"
        self.names = OF_TEACHER if self._teacher_rows is not None else OF_RECORD if recorded else ()

    def __call__(self, batch: MicroBatch, rows_Nh: Tensor) -> Columns:
        own = Side(rows_Nh, self._student.head_weight())
        if self._teacher_rows is not None:
            return self._against_teacher(own, Side(*self._teacher_rows.of(batch)))
        return self._against_record(own, batch.join(self._top_ids).long()) if self.names else {}

    def _against_teacher(self, student: Side, teacher: Side) -> Columns:
        """Of both whole distributions."""
        divergences = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jensen_shannon(0.5)}
        found = {name: target_divergence(*student, teacher, kind, **self._head) for name, kind in divergences.items()}
        student_ids_NK, teacher_ids_NK = (top_k(*side, self._k, **self._head).ids_NK for side in (student, teacher))
        teacher_NK, _, found["teacher_entropy"] = selected_log_probs(*teacher, student_ids_NK, **self._head)
        found["teacher_mass"] = teacher_NK.exp().sum(-1)
        found["student_mass"] = selected_log_probs(*student, teacher_ids_NK, **self._head)[0].exp().sum(-1)
        found["overlap"] = _shared(student_ids_NK, teacher_ids_NK)
        return found

    def _against_record(self, student: Side, teacher_ids_NK: Tensor) -> Columns:
        """Of the student's distribution and the tokens that a server listed."""
        listed = min(teacher_ids_NK.shape[1], self._head["vocab_size"])
        student_ids_NK = top_k(*student, listed, **self._head).ids_NK
        student_NK = selected_log_probs(*student, teacher_ids_NK, **self._head)[0]
        return {"student_mass": student_NK.exp().sum(-1), "overlap": _shared(student_ids_NK, teacher_ids_NK)}


def _shared(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Share of the tokens of one list that are in the other, ``[N]``."""
    return (a_NK[:, :, None] == b_NK[:, None, :]).any(-1).float().mean(-1)
