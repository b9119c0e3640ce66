"""One problem for all kernels of the vocabulary head, and what dense arithmetic says of it.

A case is a function of hidden rows and weight that gives ``[N, X]`` outputs; ours and the dense one share a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron import vocab_head
from opd_megatron.megatron.vocab_head import shard
from opd_megatron.objectives import divergences

TOKENS, HIDDEN, TEACHER_HIDDEN, K = 9, 6, 5, 3
TARGETS = ("arithmetic", "geometric", "extrapolated", "extrapolated-arithmetic")
"""Mixtures of the problem's teacher with two further models."""
BETAS = {"forward_kl": 0.0, "jsd_0.3": 0.3, "jsd_0.8": 0.8, "reverse_kl": 1.0}


@dataclass(frozen=True)
class Problem:
    """Student, teacher and the teacher's top-k record; padding rows of the weights would dominate every sum."""

    hidden_Nh: Tensor
    teacher_Nk: Tensor
    target_N: Tensor
    ids_NK: Tensor
    top_log_probs_NK: Tensor
    tail_log_mass_N: Tensor
    factors_NX: Tensor
    weight_Vh: Tensor
    teacher_weight_Vk: Tensor
    vocab_size: int
    temperature: float
    second_Nk: Tensor
    third_Nk: Tensor
    second_weight_Vk: Tensor
    third_weight_Vk: Tensor

    def target(self, kind: str) -> vocab_head.Target:
        """A mixture of :data:`TARGETS`; the models' weights may be one rank's."""
        teacher = vocab_head.Side(self.teacher_Nk, self.teacher_weight_Vk)
        second, third = (
            vocab_head.Side(self.second_Nk, self.second_weight_Vk),
            vocab_head.Side(self.third_Nk, self.third_weight_Vk),
        )
        if kind in ("arithmetic", "geometric"):
            return vocab_head.Mixture(((0.5, teacher), (0.2, second), (0.3, third)), kind == "arithmetic")
        if kind == "extrapolated":
            return vocab_head.Mixture(((1.4, teacher), (-0.4, second)))
        inner = vocab_head.Mixture(((0.7, teacher), (0.3, second)), arithmetic=True)
        return vocab_head.Mixture(((2.0, inner), (-1.0, third)))

    def dense_models(self) -> list[Tensor]:
        """Log-probabilities ``[N, V]`` of the teacher and the two further models."""
        pairs = (
            (self.teacher_Nk, self.teacher_weight_Vk),
            (self.second_Nk, self.second_weight_Vk),
            (self.third_Nk, self.third_weight_Vk),
        )
        return [torch.log_softmax(rows @ w[: self.vocab_size].t() / self.temperature, dim=-1) for rows, w in pairs]

    def to(self, dtype: torch.dtype) -> Problem:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return Problem(
            **{
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in values.items()
            }
        )

    def tokens(self, part: slice) -> Problem:
        """The same with only some of the tokens."""
        names = [item.name for item in fields(self) if item.name.split("_")[-1][:1] == "N"]
        return replace(self, **{name: getattr(self, name)[part] for name in names})

    def shards(self, rank: int, ranks: int) -> Problem:
        """The same with one rank's rows of both weights."""
        return replace(
            self,
            weight_Vh=self.weight_Vh.chunk(ranks)[rank].clone(),
            teacher_weight_Vk=self.teacher_weight_Vk.chunk(ranks)[rank].clone(),
            second_weight_Vk=self.second_weight_Vk.chunk(ranks)[rank].clone(),
            third_weight_Vk=self.third_weight_Vk.chunk(ranks)[rank].clone(),
        )


def make_problem(
    seed: int = 0, *, vocab_size: int = 11, padded: int = 16, teacher_padded: int = 16, temperature: float = 0.8
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, teacher = normal(TOKENS, HIDDEN), normal(TOKENS, TEACHER_HIDDEN)
    weight, teacher_weight = normal(padded, HIDDEN), normal(teacher_padded, TEACHER_HIDDEN)
    weight[vocab_size:] *= 50
    teacher_weight[vocab_size:] *= 50
    log_teacher = torch.log_softmax(teacher @ teacher_weight[:vocab_size].t() / temperature, dim=-1)
    top, ids = log_teacher.topk(K)
    target_N, factors_NX = torch.randint(0, vocab_size, (TOKENS,), generator=generator), normal(TOKENS, K + 2)
    second_weight, third_weight = normal(padded, TEACHER_HIDDEN - 1), normal(teacher_padded, TEACHER_HIDDEN)
    second_weight[vocab_size:] *= 50
    third_weight[vocab_size:] *= 50
    return Problem(
        hidden_Nh=hidden,
        teacher_Nk=teacher,
        target_N=target_N,
        ids_NK=ids,
        top_log_probs_NK=top,
        tail_log_mass_N=without(log_teacher, ids).logsumexp(-1),
        factors_NX=factors_NX,
        weight_Vh=weight,
        teacher_weight_Vk=teacher_weight,
        vocab_size=vocab_size,
        temperature=temperature,
        second_Nk=normal(TOKENS, TEACHER_HIDDEN - 1),
        third_Nk=normal(TOKENS, TEACHER_HIDDEN),
        second_weight_Vk=second_weight,
        third_weight_Vk=third_weight,
    )


def without(log_probs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """All but the listed tokens; negative ids are none."""
    listed = torch.zeros(*log_probs_NV.shape[:1], log_probs_NV.shape[1] + 1, dtype=torch.bool)
    listed.scatter_(1, torch.where(ids_NK >= 0, ids_NK, log_probs_NV.shape[1]), True)
    return log_probs_NV.masked_fill(listed[:, :-1], -torch.inf)


def dense_divergence(log_student: Tensor, log_teacher: Tensor, beta: float) -> Tensor:
    """The generalised divergence with its two ends, from its definition."""
    if beta == 1.0:
        return (log_student.exp() * (log_student - log_teacher)).sum(-1)
    if beta == 0.0:
        return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    log_mixture = (beta * log_teacher.exp() + (1 - beta) * log_student.exp()).log()
    teacher_part, student_part = (
        dense_divergence(log_teacher, log_mixture, 1.0),
        dense_divergence(log_student, log_mixture, 1.0),
    )
    return beta * teacher_part + (1 - beta) * student_part


def ours(problem: Problem, case: str, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``[N, X]`` outputs of a kernel; ``weight`` and the problem's teacher weight are this rank's rows."""
    settings: dict[str, Any] = {
        "temperature": problem.temperature,
        "vocab_size": problem.vocab_size,
        "group": group,
    }
    kind, _, name = case.partition(":")
    if kind == "tokens":
        return torch.stack(vocab_head.token_log_probs(hidden, weight, problem.target_N, **settings), dim=1)
    if kind == "selected":
        top, rest, entropy = vocab_head.selected_log_probs(hidden, weight, problem.ids_NK, **settings)
        return torch.cat([top, rest[:, None], entropy[:, None]], dim=1)
    if kind in TARGETS:
        target = problem.target(kind)
        return vocab_head.target_divergence(hidden, weight, target, divergence_of(name), **settings)[:, None]
    divergence = divergence_of(name)
    if kind == "full":
        teacher = vocab_head.Side(problem.teacher_Nk, problem.teacher_weight_Vk)
        return vocab_head.target_divergence(hidden, weight, teacher, divergence, **settings)[:, None]
    record = problem.ids_NK, problem.top_log_probs_NK, problem.tail_log_mass_N
    return vocab_head.record_divergence(hidden, weight, *record, divergence, **settings)[:, None]


def dense(problem: Problem, case: str, hidden: Tensor, weight: Tensor) -> Tensor:
    """The same from the logits of all tokens and the whole weights."""
    log_probs = torch.log_softmax(hidden @ weight[: problem.vocab_size].t() / problem.temperature, dim=-1)
    kind, _, name = case.partition(":")
    entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
    if kind == "tokens":
        return torch.cat([log_probs.gather(1, problem.target_N[:, None]), entropy], dim=1)
    top, rest = log_probs.gather(1, problem.ids_NK), without(log_probs, problem.ids_NK).logsumexp(-1, keepdim=True)
    if kind == "selected":
        return torch.cat([top, rest, entropy], dim=1)
    if kind == "full":
        return dense_divergence(log_probs, problem.dense_models()[0], BETAS[name])[:, None]
    if kind in TARGETS:
        return dense_divergence(log_probs, dense_target(kind, problem.dense_models()), BETAS[name])[:, None]
    record = torch.cat([problem.top_log_probs_NK, problem.tail_log_mass_N[:, None]], dim=1)
    return dense_divergence(torch.cat([top, rest], dim=1), record, BETAS[name])[:, None]


def divergence_of(name: str) -> divergences.Divergence:
    return divergences.jensen_shannon(BETAS[name])


def dense_target(kind: str, models: list[Tensor]) -> Tensor:
    """Log-probabilities ``[N, V]`` of :data:`TARGETS` from those of the models, by their definitions."""
    teacher, second, third = (log_probs.exp() for log_probs in models)
    if kind == "arithmetic":
        return (0.5 * teacher + 0.2 * second + 0.3 * third).log()
    if kind == "geometric":
        product = teacher**0.5 * second**0.2 * third**0.3
    elif kind == "extrapolated":
        product = teacher**1.4 / second**0.4
    else:
        product = (0.7 * teacher + 0.3 * second) ** 2 / third
    return (product / product.sum(-1, keepdim=True)).log()


CASES = [
    "tokens",
    "selected",
    *(f"{kind}:{name}" for kind in ("full", "record") for name in BETAS),
    *(f"{kind}:{name}" for kind in TARGETS for name in ("forward_kl", "reverse_kl")),
]


def weighted(problem: Problem, outputs_NX: Tensor) -> Tensor:
    """A scalar whose gradient differs at each token and output."""
    return (problem.factors_NX[:, : outputs_NX.shape[1]] * outputs_NX).sum()


def expected(problem: Problem, case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and gradients of hidden rows and weight by dense arithmetic."""
    hidden, weight = problem.hidden_Nh.clone().requires_grad_(), problem.weight_Vh.clone().requires_grad_()
    outputs = dense(problem, case, hidden, weight)
    return outputs.detach(), *torch.autograd.grad(weighted(problem, outputs), (hidden, weight))


def error(found: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest value."""
    if reference.numel() == 0:
        return 0.0
    return float((found.detach().double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


@contextmanager
def chunks_of(tokens: int, block_elements: int = 20) -> Iterator[None]:
    """Chunks of that many tokens, and blocks of that many logits within them."""
    before = shard.chunk_tokens, shard.BLOCK_ELEMENTS
    shard.chunk_tokens, shard.BLOCK_ELEMENTS = lambda *_: tokens, {"cpu": block_elements}  # type: ignore[assignment]
    try:
        yield
    finally:
        shard.chunk_tokens, shard.BLOCK_ELEMENTS = before  # type: ignore[assignment]
