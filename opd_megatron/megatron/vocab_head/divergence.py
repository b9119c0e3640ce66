"""Divergences between student and teacher, differentiable in the student's hidden rows and output weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron.vocab_head.selected import selected_log_probs
from opd_megatron.megatron.vocab_head.shard import (
    HeadGradients,
    VocabShard,
    blocks,
    scaled_logits,
    statistics_dtype,
)
from opd_megatron.megatron.vocab_head.target import Logits, Target, aligned, log_normalizers
from opd_megatron.objectives.divergences import Divergence


class BothLogits:
    """Student's and target's logits of one chunk at a time; who asks for the next must have dropped the last."""

    def __init__(self, student_Nh: Tensor, weight_Vh: Tensor, target: Logits, shard: VocabShard) -> None:
        self.student_Nh, self.weight_Vh = student_Nh, weight_Vh[: shard.columns]
        self.target, self.shard = target, shard

    def of(self, part: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Both in the precision of the student's statistics."""
        # the target first: a mixture takes a chunk more while it is made
        target_CV = self.target(part, temperature).to(statistics_dtype(self.student_Nh))
        return scaled_logits(self.student_Nh[part], self.weight_Vh, temperature), target_CV


def _log_probs(
    student_CV: Tensor, teacher_CV: Tensor, log_normalizers_2N: Tensor, part: slice
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tokens of each block and both sides' log-probabilities, in the place of the logits."""
    sides = blocks(student_CV, part.start), blocks(teacher_CV, part.start)
    for (rows, student_RV), (_, teacher_RV) in zip(*sides, strict=True):
        student_R1, teacher_R1 = log_normalizers_2N[:, rows, None]
        yield rows, student_RV.sub_(student_R1), teacher_RV.sub_(teacher_R1)


class _FullDivergence(torch.autograd.Function):
    """Forward keeps three numbers per token; backward makes both sides' logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nh: Tensor,
        weight_Vh: Tensor,
        target: Logits,
        divergence: Divergence,
        temperature: float,
        shard: VocabShard,
    ) -> Tensor:
        tokens = hidden_Nh.shape[0]
        both = BothLogits(hidden_Nh, weight_Vh, target, shard)
        dtype = statistics_dtype(hidden_Nh)
        log_normalizers_2N = hidden_Nh.new_zeros((2, tokens), dtype=dtype)
        # rows: value, sum of the slopes
        sums_2N = hidden_Nh.new_zeros((2, tokens), dtype=dtype)

        def take_in(part: slice) -> None:
            student_CV, target_CV = both.of(part, temperature)
            log_normalizers_2N[:, part] = log_normalizers((student_CV, target_CV), shard)
            for rows, log_student_RV, log_target_RV in _log_probs(student_CV, target_CV, log_normalizers_2N, part):
                terms_RV, slopes_RV = divergence(log_student_RV, log_target_RV)
                sums_2N[0, rows], sums_2N[1, rows] = terms_RV.sum(-1), slopes_RV.sum(-1)

        for part in shard.chunks(tokens, hidden_Nh.device):
            take_in(part)
        value_N, slope_N = shard.sum(sums_2N)
        ctx.save_for_backward(hidden_Nh, weight_Vh, log_normalizers_2N, slope_N.clone())
        ctx.constants = target, divergence, temperature, shard
        return value_N.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_Nh, weight_Vh, log_normalizers_2N, slope_N = ctx.saved_tensors
        target, divergence, temperature, shard = ctx.constants
        both = BothLogits(hidden_Nh, weight_Vh, target, shard)
        gradients = HeadGradients(hidden_Nh, weight_Vh, shard.columns, ctx.needs_input_grad[:2])
        scale_N = grads[0].to(slope_N.dtype) / temperature

        def add_gradients(part: slice) -> None:
            student_CV, target_CV = both.of(part, temperature)
            for rows, log_student_RV, log_target_RV in _log_probs(student_CV, target_CV, log_normalizers_2N, part):
                _, slopes_RV = divergence(log_student_RV, log_target_RV)
                log_student_RV.exp_().mul_(-slope_N[rows, None]).add_(slopes_RV).mul_(scale_N[rows, None])
            gradients.add(part, student_CV)

        for part in shard.chunks(hidden_Nh.shape[0], hidden_Nh.device):
            add_gradients(part)
        return gradients.hidden_Nh, gradients.weight_Vh, None, None, None, None


class _ClassDivergence(torch.autograd.Function):
    """A divergence over few classes ``[N, X]`` with the slopes as gradient of the student's log-probabilities."""

    @staticmethod
    def forward(ctx: Any, log_student_NX: Tensor, log_teacher_NX: Tensor, divergence: Divergence) -> Tensor:
        terms_NX, slopes_NX = divergence(log_student_NX, log_teacher_NX)
        ctx.save_for_backward(slopes_NX)
        return terms_NX.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_NX,) = ctx.saved_tensors
        grad_N1 = grads[0][:, None]
        # a token that no loss uses may have a record of anything, NaN included
        return torch.where(grad_N1 == 0, 0.0, grad_N1 * slopes_NX), None, None


def target_divergence(
    student_hidden_Nh: Tensor,
    student_weight_Vh: Tensor,
    target: Target,
    divergence: Divergence,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """``divergence`` (see ``objectives.divergences``) per token over the whole vocabulary, ``[N]`` float32.

    Differentiable in the student's hidden rows and weight; the target is constant. Hidden sizes, dtypes and paddings
    of the vocabulary may differ; all models are split over ``group``. Where the paddings differ, the rows of another
    model's weight that this rank's student columns need are sent there in each call and kept until backward.

    Extra memory: both sides' logits of a chunk in float32. For inputs of fewer bits, and for the gradient of hidden
    rows over several ranks, see :func:`~opd_megatron.megatron.vocab_head.selected.selected_log_probs`. Raises
    ``ValueError`` if one of the weights has too few rows for ``vocab_size``.
    """
    shard = VocabShard.of(student_weight_Vh, vocab_size, group)
    value_N: Tensor = _FullDivergence.apply(
        student_hidden_Nh, student_weight_Vh, aligned(target, shard), divergence, temperature, shard
    )
    return value_N


def record_divergence(
    hidden_Nh: Tensor,
    weight_Vh: Tensor,
    top_ids_NK: Tensor,
    top_log_probs_NK: Tensor,
    tail_log_mass_N: Tensor,
    divergence: Divergence,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    renormalized: bool = False,
) -> Tensor:
    """``divergence`` per token between the student and a teacher's top-k record, over K+1 classes, ``[N]`` float32.

    The classes are the teacher's tokens and all others together; the record is that of
    ``opd_megatron.sample.TeacherScores``, taken at ``temperature``. An entry of ``-inf`` is no class of its own: its
    token counts with the others, and its id may be anything. Merging classes never raises a divergence, so this is a
    lower bound of the one over the vocabulary. ``renormalized`` leaves the tail out instead and compares the
    distributions given that the token is in the record; it says nothing about what the student does elsewhere.
    Differentiable in ``hidden_Nh`` and ``weight_Vh``. Memory and the gradient's parts over ranks are those of
    :func:`~opd_megatron.megatron.vocab_head.selected.selected_log_probs`.
    """
    ids_NK = top_ids_NK.masked_fill(top_log_probs_NK == -torch.inf, -1)
    student_NK, rest_N, _ = selected_log_probs(
        hidden_Nh, weight_Vh, ids_NK, temperature=temperature, vocab_size=vocab_size, group=group
    )
    log_probs_NK = top_log_probs_NK.to(student_NK.dtype)
    if renormalized:
        log_student_NX, log_teacher_NX = student_NK.log_softmax(-1), log_probs_NK.log_softmax(-1)
    else:
        log_student_NX = torch.cat([student_NK, rest_N[:, None]], dim=1)
        log_teacher_NX = torch.cat([log_probs_NK, tail_log_mass_N[:, None].to(student_NK.dtype)], dim=1)
    value_N: Tensor = _ClassDivergence.apply(log_student_NX, log_teacher_NX, divergence)
    return value_N
