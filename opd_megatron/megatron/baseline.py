"""Exact moments of ``d = log p_S - log p_T`` under the student at each position: the KL and the quietest baseline.

Shape legend: ``N`` tokens, ``h`` and ``k`` hidden sizes, ``V`` columns of this rank, ``C`` tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron.vocab_head import _chunks, _local_columns, _logits


@torch.no_grad()
def kl_and_baseline(
    student_hidden_Nh: Tensor,
    student_weight_Vh: Tensor,
    teacher_hidden_Nk: Tensor,
    teacher_weight_Vk: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """``KL(S||T)`` and the baseline of least variance, each ``[N]`` float32, over the whole vocabulary.

    The gradient of one sampled token is ``(d_a - b) (onehot_a - p)`` with respect to the logits; its variance is least
    for ``b = E[|onehot - p|^2 d] / E[|onehot - p|^2]`` (Weaver and Tao, arXiv 1301.2315), which with ``s = sum p^2`` is
    ``sum p (1 + s - 2 p) d / (1 - s)``. Both models split the vocabulary alike over the ranks of ``group``; all ranks
    call this with the same tokens.
    """
    if teacher_weight_Vk.shape[0] != student_weight_Vh.shape[0]:
        raise ValueError("student and teacher must split the vocabulary alike")
    _, columns = _local_columns(student_weight_Vh, vocab_size, group)
    student_weight, teacher_weight = student_weight_Vh[:columns], teacher_weight_Vk[:columns]
    tokens = student_hidden_Nh.shape[0]
    moments_2N = student_hidden_Nh.new_zeros((2, tokens), dtype=torch.float32)
    for part in _chunks(tokens, student_weight_Vh.shape[0]):
        student = _logits(student_hidden_Nh[part], student_weight, temperature)
        teacher = _logits(teacher_hidden_Nk[part], teacher_weight, temperature)
        moments_2N[:, part] = _moments(student, teacher, group)
    return moments_2N[0], moments_2N[1]


def _moments(student_CV: Tensor, teacher_CV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[2, C]``: KL and baseline from scaled logits, which are overwritten.

    Everything is a sum over the tokens other than the student's likeliest one, with ``d`` measured from that one's:
    where the student is nearly certain, sums over all tokens would be differences of nearly equal numbers.
    """
    count = len(student_CV)
    if student_CV.shape[1]:
        top_C1 = student_CV.argmax(-1, keepdim=True)
        tops = [student_CV.gather(1, top_C1)[:, 0], teacher_CV.gather(1, top_C1)[:, 0], teacher_CV.amax(-1)]
    else:
        tops = list(student_CV.new_full((3, count), -torch.inf))
    gathered_R3C = _gather(torch.stack(tops), group)
    owner_C = gathered_R3C[:, 0].argmax(0)
    student_top_C, teacher_top_C, _ = gathered_R3C[owner_C, :, torch.arange(count, device=owner_C.device)].unbind(1)
    teacher_maximum_C = gathered_R3C[:, 2].amax(0)
    # rows: sums of exp(l_T), and over the other tokens, with odds e = p / p_top, of e, e^2, e d, e^2 d
    sums_5C = student_CV.new_zeros((5, count))
    if student_CV.shape[1]:
        odds_CV = torch.exp(student_CV - student_top_C[:, None])
        mine_C = owner_C == (dist.get_rank(group) if group is not None else 0)
        odds_CV.scatter_(1, top_C1, torch.where(mine_C[:, None], 0.0, odds_CV.gather(1, top_C1)))
        d_CV = student_CV.sub_(teacher_CV).sub_((student_top_C - teacher_top_C)[:, None])
        sums_5C[0] = teacher_CV.sub_(teacher_maximum_C[:, None]).exp_().sum(-1)
        sums_5C[1] = odds_CV.sum(-1)
        sums_5C[2] = torch.linalg.vecdot(odds_CV, odds_CV)
        sums_5C[3] = torch.linalg.vecdot(odds_CV, d_CV)
        sums_5C[4] = torch.linalg.vecdot(odds_CV, d_CV.mul_(odds_CV))
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(sums_5C, group=group)
    teacher_sum_C, odds_C, squared_C, odds_d_C, squared_d_C = sums_5C
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


def _gather(values_3C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[R, 3, C]``: the values of all ranks of ``group``."""
    if group is None or dist.get_world_size(group) == 1:
        return values_3C[None]
    gathered = [torch.empty_like(values_3C) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values_3C.contiguous(), group=group)
    return torch.stack(gathered)
