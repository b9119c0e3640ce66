"""What the student is compared with at each position: the distribution of one model, or one made of several.

A geometric mixture ``q ~ prod_i p_i^(w_i)`` is the softmax of the weighted sum of the models' logits, whatever the
signs of the weights, so it costs one normaliser. An arithmetic one, ``q = sum_i w_i p_i``, needs the normaliser of
each. Both are made chunk by chunk and may hold one another.

Shapes are those of :mod:`~opd_megatron.megatron.vocab_head.shard`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from opd_megatron.megatron.vocab_head.align import AlignedWeight, align
from opd_megatron.megatron.vocab_head.shard import VocabShard, blocks, log_sum_exp, log_sum_over_ranks


class Side(NamedTuple):
    """Hidden rows ``[N, h]`` and this rank's rows ``[V, h]`` of the output weight of one model."""

    rows_Nh: Tensor
    weight_Vh: Tensor

    def at(self, places_M: Tensor) -> Side:
        """Only some of the tokens."""
        return Side(self.rows_Nh.index_select(0, places_M), self.weight_Vh)


@dataclass(frozen=True)
class Mixture:
    """Several distributions as one: ``parts`` are pairs of weight and distribution, the weights sum to 1.

    Those of an arithmetic mixture are positive. Raises ``ValueError`` otherwise.
    """

    parts: tuple[tuple[float, Target], ...]
    arithmetic: bool = False

    def __post_init__(self) -> None:
        weights = [weight for weight, _ in self.parts]
        if not math.isclose(sum(weights), 1.0, rel_tol=0, abs_tol=1e-6):
            raise ValueError(f"the weights {weights} of a mixture do not sum to 1")
        if self.arithmetic and min(weights) <= 0:
            raise ValueError(f"the weights {weights} of an arithmetic mixture are not all positive")

    def at(self, places_M: Tensor) -> Mixture:
        """Only some of the tokens."""
        return Mixture(tuple((weight, part.at(places_M)) for weight, part in self.parts), self.arithmetic)


Target: TypeAlias = Side | Mixture
"""A distribution for each of ``N`` tokens; no gradient flows to it."""


class Logits(Protocol):
    """Logits ``[C, V]`` of a target for the columns of the student's shard, of which a caller may do what it likes."""

    def __call__(self, part: slice, temperature: float) -> Tensor: ...


def aligned(target: Target, shard: VocabShard) -> Logits:
    """The logits of ``target`` for the columns of ``shard``; collective where a model splits the vocabulary otherwise.

    The result is collective where an arithmetic mixture is in it: all ranks ask for the same chunks in one order. It
    holds the logits of one chunk, and of another one while a model is mixed in.
    """
    if isinstance(target, Side):
        return _OfModel(target.rows_Nh.detach(), align(target.weight_Vh, shard))
    parts = [(weight, aligned(part, shard)) for weight, part in target.parts if weight != 0.0]
    if len(parts) == 1:
        return parts[0][1]
    return _Arithmetic(parts, shard) if target.arithmetic else _Geometric(parts)


def log_normalizers(sides: Sequence[Tensor], shard: VocabShard) -> Tensor:
    """``[S, C]`` over all ranks, of ``S`` chunks of logits ``[C, V]``."""
    sums_SC = sides[0].new_full((len(sides), sides[0].shape[0]), -torch.inf)
    for side_C, logits_CV in zip(sums_SC, sides, strict=True):
        for rows, logits_RV in blocks(logits_CV):
            side_C[rows] = log_sum_exp(logits_RV)
    return log_sum_over_ranks(shard.gather(sums_SC))


@dataclass(frozen=True)
class _OfModel:
    rows_Nh: Tensor
    weight: AlignedWeight

    def __call__(self, part: slice, temperature: float) -> Tensor:
        return self.weight.scaled_logits(self.rows_Nh[part], temperature)


@dataclass(frozen=True)
class _Geometric:
    parts: Sequence[tuple[float, Logits]]

    def __call__(self, part: slice, temperature: float) -> Tensor:
        (first_weight, first), *others = self.parts
        total_CV = first(part, temperature).mul_(first_weight)
        for weight, logits in others:
            total_CV.add_(logits(part, temperature), alpha=weight)
        return total_CV


@dataclass(frozen=True)
class _Arithmetic:
    parts: Sequence[tuple[float, Logits]]
    shard: VocabShard

    def __call__(self, part: slice, temperature: float) -> Tensor:
        (first_weight, first), *others = self.parts
        total_CV = self._weighted(first_weight, first(part, temperature))
        for weight, logits in others:
            torch.logaddexp(total_CV, self._weighted(weight, logits(part, temperature)), out=total_CV)
        return total_CV

    def _weighted(self, weight: float, logits_CV: Tensor) -> Tensor:
        """``log(weight * p)`` in place."""
        return logits_CV.sub_(log_normalizers([logits_CV], self.shard)[0, :, None] - math.log(weight))
