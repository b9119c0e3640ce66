"""The most probable tokens of a distribution whose logits are never all there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron.vocab_head.shard import (
    VocabShard,
    blocks,
    log_sum_exp,
    mask_columns,
    scaled_logits,
    statistics_dtype,
)


class TopK(NamedTuple):
    """The ``K`` most probable tokens in descending order and the log of the mass of the others.

    ``ids_NK`` are int64, the rest float32 (float64 for float64 inputs): the fields of a teacher's record
    (``opd_megatron.sample.TeacherScores``).
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_log_mass_N: Tensor


@torch.no_grad()
def top_k(
    hidden_Nh: Tensor,
    weight_Vh: Tensor,
    k: int,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> TopK:
    """The ``k`` most probable tokens of ``softmax(hidden @ weight^T / temperature)`` over the whole vocabulary.

    Without gradient; :func:`~opd_megatron.megatron.vocab_head.selected.selected_log_probs` of the ids has one. Every
    rank finds its own ``k``; what the others of these weigh is added to its tail, so the tail is a sum and not one
    minus the rest. ``tail_log_mass_N`` is ``-inf`` where ``k`` is the whole vocabulary. Raises ``ValueError`` unless
    ``1 <= k <= vocab_size``.
    """
    if not 1 <= k <= vocab_size:
        raise ValueError(f"the {k} most probable of {vocab_size} tokens do not exist")
    shard = VocabShard.of(weight_Vh, vocab_size, group)
    tokens = hidden_Nh.shape[0]
    own_k = min(k, shard.columns)
    top_NK = hidden_Nh.new_full((tokens, k), -torch.inf, dtype=statistics_dtype(hidden_Nh))
    ids_NK = torch.full((tokens, k), -1, dtype=torch.int64, device=hidden_Nh.device)
    rest_N = top_NK.new_full((tokens,), -torch.inf)

    def take_in(part: slice) -> None:
        logits_CV = scaled_logits(hidden_Nh[part], weight_Vh[: shard.columns], temperature)
        for rows, logits_RV in blocks(logits_CV, part.start):
            top_RK, column_RK = logits_RV.topk(own_k, dim=-1)
            top_NK[rows, :own_k], ids_NK[rows, :own_k] = top_RK, column_RK + shard.first
            mask_columns(logits_RV, column_RK, torch.ones_like(column_RK, dtype=torch.bool))
            rest_N[rows] = log_sum_exp(logits_RV)

    for part in shard.chunks(tokens, hidden_Nh.device):
        take_in(part)
    candidates_NX = shard.gather(top_NK).permute(1, 0, 2).flatten(1)
    found_NX, order_NX = candidates_NX.sort(dim=1, descending=True, stable=True)
    ids_NX = shard.gather(ids_NK).permute(1, 0, 2).flatten(1).gather(1, order_NX)
    tail_N = torch.logsumexp(torch.cat([found_NX[:, k:], shard.gather(rest_N).t()], dim=1), dim=1)
    log_normalizer_N = torch.logaddexp(torch.logsumexp(found_NX[:, :k], dim=1), tail_N)
    return TopK(ids_NX[:, :k], found_NX[:, :k] - log_normalizer_N[:, None], tail_N - log_normalizer_N)
