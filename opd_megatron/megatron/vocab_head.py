"""Vocabulary-parallel head: log-probabilities from hidden states, in chunks of tokens, without a batch of logits.

Shape legend: ``N`` tokens, ``h`` hidden size, ``V`` columns of this rank, ``C`` tokens of a chunk. Each rank of the
tensor-parallel group holds consecutive rows of the output weight; rows at or above ``vocab_size`` are padding and take
no part in any sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**26
"""Logits that exist at a time (256 MiB in float32)."""


def _chunks(tokens: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _local_columns(weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """First column of this rank and how many of its columns are real tokens."""
    first = weight.shape[0] * (dist.get_rank(group) if group is not None else 0)
    return first, max(0, min(weight.shape[0], vocab_size - first))


def _logits(hidden_Ch: Tensor, weight_Vh: Tensor, temperature: float) -> Tensor:
    """``[C, V]`` scaled logits in at least float32."""
    logits = hidden_Ch @ weight_Vh.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / temperature if temperature != 1.0 else logits


def _sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def _common_maximum(maximum_N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        maximum_N = maximum_N.clone()
        dist.all_reduce(maximum_N, op=dist.ReduceOp.MAX, group=group)
    return maximum_N


class _TokenLogProbs(torch.autograd.Function):
    """Forward keeps only ``[N]`` statistics; backward makes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nh: Tensor,
        weight_Vh: Tensor,
        target_N: Tensor,
        temperature: float,
        vocab_size: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        first, columns = _local_columns(weight_Vh, vocab_size, group)
        weight = weight_Vh[:columns]
        dtype = torch.promote_types(hidden_Nh.dtype, torch.float32)
        tokens = hidden_Nh.shape[0]
        maximum_N = hidden_Nh.new_full((tokens,), -torch.inf, dtype=dtype)
        # rows: sum of exp, sum of exp * logit, logit of the target where this rank holds it
        sums_3N = hidden_Nh.new_zeros((3, tokens), dtype=dtype)
        for part in _chunks(tokens, columns) if columns else ():
            logits = _logits(hidden_Nh[part], weight, temperature)
            maximum = logits.amax(-1)
            exponentials = torch.exp(logits - maximum[:, None])
            maximum_N[part] = maximum
            sums_3N[0, part] = exponentials.sum(-1)
            sums_3N[1, part] = (exponentials * logits).sum(-1)
            local = target_N[part] - first
            held = (local >= 0) & (local < columns)
            picked = logits.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0]
            sums_3N[2, part] = torch.where(held, picked, torch.zeros_like(picked))
        common_N = _common_maximum(maximum_N, group)
        sums_3N[:2] *= torch.exp(maximum_N - common_N)
        _sum_over_ranks(sums_3N, group)
        log_normalizer_N = common_N + torch.log(sums_3N[0])
        log_probs_N = sums_3N[2] - log_normalizer_N
        entropy_N = log_normalizer_N - sums_3N[1] / sums_3N[0]
        ctx.save_for_backward(hidden_Nh, weight_Vh, target_N, log_normalizer_N, entropy_N)
        ctx.temperature, ctx.first, ctx.columns = temperature, first, columns
        ctx.set_materialize_grads(False)
        return log_probs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_log_probs_N, grad_entropy_N = grads
        hidden_Nh, weight_Vh, target_N, log_normalizer_N, entropy_N = ctx.saved_tensors
        weight = weight_Vh[: ctx.columns]
        grad_hidden = torch.zeros_like(hidden_Nh)
        grad_weight = torch.zeros_like(weight_Vh, dtype=log_normalizer_N.dtype)
        for part in _chunks(hidden_Nh.shape[0], ctx.columns) if ctx.columns else ():
            log_probs = _logits(hidden_Nh[part], weight, ctx.temperature) - log_normalizer_N[part, None]
            probs = torch.exp(log_probs)
            grad_logits = torch.zeros_like(probs)
            if grad_log_probs_N is not None:
                grad = grad_log_probs_N[part]
                grad_logits -= grad[:, None] * probs
                local = target_N[part] - ctx.first
                held = (local >= 0) & (local < ctx.columns)
                grad_logits.scatter_add_(
                    1,
                    local.clamp(0, ctx.columns - 1)[:, None],
                    torch.where(held, grad, torch.zeros_like(grad))[:, None],
                )
            if grad_entropy_N is not None:
                grad_logits -= grad_entropy_N[part, None] * probs * (log_probs + entropy_N[part, None])
            grad_logits /= ctx.temperature
            grad_logits = grad_logits.to(hidden_Nh.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight[: ctx.columns] += (grad_logits.t() @ hidden_Nh[part]).to(grad_weight.dtype)
        return grad_hidden, grad_weight.to(weight_Vh.dtype), None, None, None, None


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

    Differentiable in ``hidden_Nh`` and ``weight_Vh``. With several ranks the gradient of ``hidden_Nh`` is this rank's
    part of the sum: ``hidden_Nh`` must come out of a mapping whose backward adds the parts up (Megatron's copy to, or
    gather from, the parallel region). ``group`` is the tensor-parallel group, or ``None`` for one rank. The float64
    variant (float64 inputs) serves tests. ``d log p / d logits = onehot - p`` and
    ``d H / d logits = -p (log p + H)``, both over the temperature.
    """
    log_probs_N, entropy_N = _TokenLogProbs.apply(hidden_Nh, weight_Vh, target_N, temperature, vocab_size, group)
    return log_probs_N, entropy_N


@torch.no_grad()
def reverse_kl(
    student_hidden_Nh: Tensor,
    student_weight_Vh: Tensor,
    teacher_hidden_Nk: Tensor,
    teacher_weight_Vk: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Exact ``KL(student || teacher)`` per token over the whole vocabulary, ``[N]`` float32, without gradient.

    Both models split the vocabulary over the same ranks with the same padding; their hidden sizes may differ. Uses
    ``KL = sum p_S (l_S - l_T) - log Z_S + log Z_T`` with scaled logits ``l`` and normalisers ``Z``.
    """
    _, columns = _local_columns(student_weight_Vh, vocab_size, group)
    if teacher_weight_Vk.shape[0] != student_weight_Vh.shape[0]:
        raise ValueError("student and teacher must split the vocabulary alike")
    tokens = student_hidden_Nh.shape[0]
    maximum_2N = student_hidden_Nh.new_full((2, tokens), -torch.inf, dtype=torch.float32)
    sums_3N = student_hidden_Nh.new_zeros((3, tokens), dtype=torch.float32)
    for part in _chunks(tokens, columns) if columns else ():
        student = _logits(student_hidden_Nh[part], student_weight_Vh[:columns], temperature)
        teacher = _logits(teacher_hidden_Nk[part], teacher_weight_Vk[:columns], temperature)
        maximum_2N[0, part], maximum_2N[1, part] = student.amax(-1), teacher.amax(-1)
        exponentials = torch.exp(student - maximum_2N[0, part, None])
        sums_3N[0, part] = exponentials.sum(-1)
        sums_3N[1, part] = torch.exp(teacher - maximum_2N[1, part, None]).sum(-1)
        sums_3N[2, part] = (exponentials * (student - teacher)).sum(-1)
    common_2N = _common_maximum(maximum_2N, group)
    scale_2N = torch.exp(maximum_2N - common_2N)
    sums_3N *= torch.stack([scale_2N[0], scale_2N[1], scale_2N[0]])
    _sum_over_ranks(sums_3N, group)
    log_normalizers_2N = common_2N + torch.log(sums_3N[:2])
    return sums_3N[2] / sums_3N[0] - log_normalizers_2N[0] + log_normalizers_2N[1]
