"""Log-probabilities of listed tokens, the mass of all others and the entropy, differentiable, without logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron.vocab_head.shard import (
    MASKED,
    HeadGradients,
    VocabShard,
    blocks,
    log_sum_over_ranks,
    mask_columns,
    scaled_logits,
    statistics_dtype,
)


def _columns(ids_RK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Columns of this rank for the listed ids, and which of them it holds; the others' may be any column."""
    column_RK = ids_RK.long() - shard.first
    held_RK = (column_RK >= 0) & (column_RK < shard.columns)
    return column_RK.clamp(0, shard.columns - 1), held_RK


def _present(ids_NK: Tensor, shard: VocabShard) -> Tensor:
    """Which of the listed ids are tokens at all."""
    return (ids_NK >= 0) & (ids_NK < shard.vocab_size)


def _rest_sums(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum and mean logit of the columns that are not masked, ``[R]`` each; ``(-inf, 0)`` where all are."""
    maximum_R = logits_RV.amax(-1)
    # the masked ones stay so far below zero that they drop out of both sums
    shifted_RV = logits_RV - maximum_R[:, None].clamp(min=MASKED / 2)
    exponentials_RV = torch.exp(shifted_RV)
    sum_R = exponentials_RV.sum(-1)
    mean_R = maximum_R + torch.linalg.vecdot(exponentials_RV, shifted_RV) / sum_R
    any_R = maximum_R > MASKED / 2
    return torch.where(any_R, maximum_R + sum_R.log(), -torch.inf), torch.where(any_R, mean_R, 0.0)


@dataclass(frozen=True)
class _Statistics:
    """What the logits of all ranks come to: ``[N, K]`` and ``[N]``."""

    log_probs_NK: Tensor
    rest_log_sum_N: Tensor
    log_normalizer_N: Tensor
    entropy_N: Tensor


def _statistics(picked_NK: Tensor, rest_2N: Tensor, present_NK: Tensor, shard: VocabShard) -> _Statistics:
    """Join the ranks' logits of listed tokens and their sums over the rest.

    ``H = sum_k -p_k log p_k + p_rest (log Z - mean logit of the rest)``.
    """
    picked_NK = shard.sum(picked_NK).masked_fill(~present_NK, -torch.inf)
    log_sum_GN, mean_GN = shard.gather(rest_2N).unbind(1)
    rest_N = log_sum_over_ranks(log_sum_GN)
    log_normalizer_N = torch.logaddexp(torch.logsumexp(picked_NK, 1), rest_N)
    log_probs_NK = picked_NK - log_normalizer_N[:, None]
    share_GN = torch.exp(log_sum_GN - log_normalizer_N)
    listed_N = (log_probs_NK.exp() * log_probs_NK.masked_fill(~present_NK, 0.0)).sum(1)
    entropy_N = (share_GN * (log_normalizer_N - mean_GN)).sum(0) - listed_N
    return _Statistics(log_probs_NK, rest_N, log_normalizer_N, entropy_N)


def _weighted(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.to(like.dtype)


@dataclass(frozen=True)
class _BackwardTerms:
    """Gradients of the logits, up to the exponentials that are made again.

    ``grad_k`` (``[N, K]``) at listed tokens; elsewhere ``exp(l - shift) (constant - slope (l - shift))``, ``[N]`` each.
    """

    listed_NK: Tensor
    shift_N: Tensor
    constant_N: Tensor
    slope_N: Tensor | None

    @classmethod
    def of(cls, grads: tuple[Tensor | None, ...], found: _Statistics, present_NK: Tensor) -> _BackwardTerms:
        """From the gradients of log-probabilities ``g_k``, rest ``g_r`` and entropy ``e``, with ``G = g_r + sum g_k``:

        ``d/dl_k = g_k - G p_k - e p_k (log p_k + H)`` at listed tokens and, with the rest's own softmax
        ``q = exp(l - rest)``, ``q (g_r - G p_rest - e p_rest (log p + H))`` elsewhere. Everything is bounded by the
        gradients themselves however small ``p_rest`` is.
        """
        has_rest_N = torch.isfinite(found.rest_log_sum_N)
        grad_NK = torch.where(present_NK, _weighted(grads[0], found.log_probs_NK), 0.0)
        grad_rest_N = torch.where(has_rest_N, _weighted(grads[1], found.entropy_N), 0.0)
        total_N = grad_NK.sum(1) + grad_rest_N
        probs_NK = found.log_probs_NK.exp()
        listed_NK = grad_NK - total_N[:, None] * probs_NK
        # any finite shift serves where nothing is left to be shifted
        shift_N = torch.where(has_rest_N, found.rest_log_sum_N, found.log_normalizer_N)
        log_rest_N = found.rest_log_sum_N - found.log_normalizer_N
        constant_N = grad_rest_N - total_N * log_rest_N.exp()
        if grads[2] is None:
            return cls(listed_NK, shift_N, constant_N, None)
        slope_N = grads[2].to(constant_N.dtype) * log_rest_N.exp()
        surprise_NK = found.log_probs_NK + found.entropy_N[:, None]
        listed_NK = listed_NK - grads[2][:, None] * probs_NK * surprise_NK
        constant_N = constant_N - slope_N * (shift_N - found.log_normalizer_N + found.entropy_N)
        return cls(listed_NK, shift_N, constant_N, slope_N)

    def write(self, logits_RV: Tensor, rows: slice, column_RK: Tensor, held_RK: Tensor, scale: float) -> None:
        """Put the gradient, times ``scale``, in the place of the logits of the tokens ``rows``."""
        mask_columns(logits_RV, column_RK, held_RK)
        logits_RV.sub_(self.shift_N[rows, None])
        constant_R1 = scale * self.constant_N[rows, None]
        if self.slope_N is None:
            logits_RV.exp_().mul_(constant_R1)
        else:
            exponentials_RV = torch.exp(logits_RV)
            logits_RV.mul_(-scale * self.slope_N[rows, None]).add_(constant_R1).mul_(exponentials_RV)
        logits_RV.scatter_add_(1, column_RK, torch.where(held_RK, scale * self.listed_NK[rows], 0.0))


class _SelectedLogProbs(torch.autograd.Function):
    """Forward keeps ``[N]`` and ``[N, K]`` statistics; backward makes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_Nh: Tensor, weight_Vh: Tensor, ids_NK: Tensor, temperature: float, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = statistics_dtype(hidden_Nh)
        picked_NK = hidden_Nh.new_zeros(ids_NK.shape, dtype=dtype)
        rest_2N = hidden_Nh.new_zeros((2, len(ids_NK)), dtype=dtype)
        rest_2N[0] = -torch.inf

        def take_in(part: slice) -> None:
            logits_CV = scaled_logits(hidden_Nh[part], weight_Vh[: shard.columns], temperature)
            for rows, logits_RV in blocks(logits_CV, part.start):
                column_RK, held_RK = _columns(ids_NK[rows], shard)
                picked_NK[rows] = torch.where(held_RK, logits_RV.gather(1, column_RK), 0.0)
                mask_columns(logits_RV, column_RK, held_RK)
                rest_2N[0, rows], rest_2N[1, rows] = _rest_sums(logits_RV)

        for part in shard.chunks(hidden_Nh.shape[0], hidden_Nh.device):
            take_in(part)
        found = _statistics(picked_NK, rest_2N, _present(ids_NK, shard), shard)
        ctx.save_for_backward(
            hidden_Nh,
            weight_Vh,
            ids_NK,
            found.log_probs_NK,
            found.rest_log_sum_N,
            found.log_normalizer_N,
            found.entropy_N,
        )
        ctx.temperature, ctx.shard = temperature, shard
        ctx.set_materialize_grads(False)
        return found.log_probs_NK, found.rest_log_sum_N - found.log_normalizer_N, found.entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_Nh, weight_Vh, ids_NK, *statistics = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        terms = _BackwardTerms.of(grads, _Statistics(*statistics), _present(ids_NK, shard))
        gradients = HeadGradients(hidden_Nh, weight_Vh, shard.columns, ctx.needs_input_grad[:2])

        def add_gradients(part: slice) -> None:
            logits_CV = scaled_logits(hidden_Nh[part], weight_Vh[: shard.columns], ctx.temperature)
            for rows, logits_RV in blocks(logits_CV, part.start):
                terms.write(logits_RV, rows, *_columns(ids_NK[rows], shard), 1 / ctx.temperature)
            gradients.add(part, logits_CV)

        for part in shard.chunks(hidden_Nh.shape[0], hidden_Nh.device):
            add_gradients(part)
        return gradients.hidden_Nh, gradients.weight_Vh, None, None, None


def selected_log_probs(
    hidden_Nh: Tensor,
    weight_Vh: Tensor,
    ids_NK: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of ``ids_NK``, log of the mass of all other tokens, and entropy: ``[N, K]``, ``[N]``, ``[N]``.

    All of ``softmax(hidden @ weight^T / temperature)``, float32 (float64 for float64 inputs), differentiable in
    ``hidden_Nh`` and ``weight_Vh``. The ids of a token must differ; one that is no token (negative, or at or above
    ``vocab_size``) has log-probability ``-inf``, no gradient, and takes nothing from the rest, whose log-mass is
    ``-inf`` where every token is listed. The mass of the rest is summed up itself and not as one minus that of the
    others, so it and its gradient are exact where it is small.

    Extra memory: a chunk's logits in float32 and, for inputs of fewer bits, once more in those; in backward such inputs
    also have the weight's gradient in float32, in which the chunks' parts are added up.

    With several ranks the gradient of ``hidden_Nh`` is this rank's part of the sum: ``hidden_Nh`` must come out of a
    mapping whose backward adds the parts up (Megatron's copy to, or gather from, the parallel region). ``group`` is the
    tensor-parallel group, or ``None`` for one rank; its ranks call this with the same rows and ids.
    """
    shard = VocabShard.of(weight_Vh, vocab_size, group)
    log_probs_NK, rest_N, entropy_N = _SelectedLogProbs.apply(hidden_Nh, weight_Vh, ids_NK, temperature, shard)
    return log_probs_NK, rest_N, entropy_N


def token_log_probs(
    hidden_Nh: Tensor,
    weight_Vh: Tensor,
    target_N: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """``log softmax(hidden @ weight^T / temperature)[target]`` and that distribution's entropy, each ``[N]`` float32.

    :func:`selected_log_probs` of one id per token; what it says of gradients, memory and ranks holds here.
    """
    log_probs_N1, _, entropy_N = selected_log_probs(
        hidden_Nh, weight_Vh, target_N[:, None], temperature=temperature, vocab_size=vocab_size, group=group
    )
    return log_probs_N1[:, 0], entropy_N
