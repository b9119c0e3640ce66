"""Exact moments of ``d = log p_S - log p_T`` under the student at each position: the KL and the quietest baseline."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron.vocab_head.divergence import BothLogits
from opd_megatron.megatron.vocab_head.shard import VocabShard, blocks, statistics_dtype
from opd_megatron.megatron.vocab_head.target import Target, aligned


@torch.no_grad()
def target_moments(
    student_hidden_Nh: Tensor,
    student_weight_Vh: Tensor,
    target: Target,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """``KL(S||T)`` and the baseline of least variance, each ``[N]`` float32, over the whole vocabulary.

    The gradient of one sampled token is ``(d_a - b) (onehot_a - p)`` with respect to the logits; its variance is least
    for ``b = E[|onehot - p|^2 d] / E[|onehot - p|^2]`` (Weaver and Tao, arXiv 1301.2315), which with ``s = sum p^2`` is
    ``sum p (1 + s - 2 p) d / (1 - s)``. The sides may differ as in
    :func:`~opd_megatron.megatron.vocab_head.divergence.target_divergence`, which also says what is needed of the ranks.

    Extra memory: both sides' logits of a chunk in float32 and a block's temporaries, at most three chunks of logits
    whatever the number of tokens; for inputs of fewer bits one side's logits once more in those.
    """
    shard = VocabShard.of(student_weight_Vh, vocab_size, group)
    both = BothLogits(student_hidden_Nh, student_weight_Vh, aligned(target, shard), shard)
    tokens = student_hidden_Nh.shape[0]
    moments_2N = student_hidden_Nh.new_zeros((2, tokens), dtype=statistics_dtype(student_hidden_Nh))
    for part in shard.chunks(tokens, student_hidden_Nh.device):
        moments_2N[:, part] = _moments(*both.of(part, temperature), shard)
    return moments_2N[0], moments_2N[1]


def _moments(student_CV: Tensor, teacher_CV: Tensor, shard: VocabShard) -> Tensor:
    """``[2, C]``: KL and baseline from scaled logits, which are overwritten.

    Everything is a sum over the tokens other than the student's likeliest one, with ``d`` measured from that one's:
    where the student is nearly certain, sums over all tokens would be differences of nearly equal numbers.
    """
    count = len(student_CV)
    if shard.columns:
        top_C1 = student_CV.argmax(-1, keepdim=True)
        tops = [student_CV.gather(1, top_C1)[:, 0], teacher_CV.gather(1, top_C1)[:, 0], teacher_CV.amax(-1)]
    else:
        tops = list(student_CV.new_full((3, count), -torch.inf))
    tops_G3C = shard.gather(torch.stack(tops))
    owner_C = tops_G3C[:, 0].argmax(0)
    student_top_C, teacher_top_C, _ = tops_G3C[owner_C, :, torch.arange(count, device=owner_C.device)].unbind(1)
    teacher_maximum_C = tops_G3C[:, 2].amax(0)
    # rows: sums of exp(l_T), and over the other tokens, with odds e = p / p_top, of e, e^2, e d, e^2 d
    sums_5C = student_CV.new_zeros((5, count))
    if shard.columns:
        top_d_C = student_top_C - teacher_top_C
        mine_C1 = owner_C[:, None] == shard.first // shard.rows
        for (rows, student_RV), (_, teacher_RV) in zip(blocks(student_CV), blocks(teacher_CV), strict=True):
            odds_RV = (student_RV - student_top_C[rows, None]).exp_()
            own_top_R1 = odds_RV.gather(1, top_C1[rows])
            odds_RV.scatter_(1, top_C1[rows], torch.where(mine_C1[rows], 0.0, own_top_R1))
            d_RV = student_RV.sub_(teacher_RV).sub_(top_d_C[rows, None])
            sums_5C[0, rows] = teacher_RV.sub_(teacher_maximum_C[rows, None]).exp_().sum(-1)
            sums_5C[1, rows] = odds_RV.sum(-1)
            sums_5C[2, rows] = torch.linalg.vecdot(odds_RV, odds_RV)
            sums_5C[3, rows] = torch.linalg.vecdot(odds_RV, d_RV)
            sums_5C[4, rows] = torch.linalg.vecdot(odds_RV, d_RV.mul_(odds_RV))
    teacher_sum_C, odds_C, squared_C, odds_d_C, squared_d_C = shard.sum(sums_5C)
    top_prob_C = 1 / (1 + odds_C)
    top_d_C = -torch.log1p(odds_C) - (teacher_top_C - teacher_maximum_C - torch.log(teacher_sum_C))
    kl_C = top_d_C + top_prob_C * odds_d_C
    others_C = top_prob_C.square() * squared_C
    missing_C = top_prob_C * odds_C
    spread_C = missing_C * (2 - missing_C) - others_C
    weighted_C = top_prob_C * (1 + top_prob_C.square() + others_C) * odds_d_C - 2 * top_prob_C.square() * squared_d_C
    certain_C = spread_C <= 0
    baseline_C = top_d_C + torch.where(certain_C, 0.0, weighted_C) / torch.where(certain_C, 1.0, spread_C)
    return torch.stack([kl_C, baseline_C])
