"""Sums over whole responses where a micro-batch holds the tokens of several, or only a part of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _complete(sums_n: Tensor) -> Tensor:
    return sums_n


@dataclass(frozen=True)
class Sequences:
    """Which response each of the ``N`` positions of a micro-batch belongs to.

    ``of_N`` (int64, ``[N]``) numbers the ``count`` responses from 0. Context parallelism leaves a rank with a part of
    each response: ``add_up`` then turns this rank's sums ``[n]`` into those of the whole responses, the same on every
    rank that shares them. It is not differentiable.
    """

    of_N: Tensor
    count: int
    add_up: Callable[[Tensor], Tensor] = _complete

    def sum(self, values_N: Tensor) -> Tensor:
        """Sum of ``values_N`` over the response of each position: ``[N]``, detached, in float64."""
        sums_n = torch.zeros(self.count, dtype=torch.float64, device=values_N.device)
        sums_n = self.add_up(sums_n.index_add_(0, self.of_N, values_N.detach().double()))
        return sums_n[self.of_N]

    def mean(self, values_N: Tensor, mask_N: Tensor) -> Tensor:
        """Mean of ``values_N`` over the unmasked tokens of the response of each position, ``[N]``; 0 without any.

        Values at masked positions may be anything, NaN included.
        """
        return self.sum(torch.where(mask_N, values_N, 0.0)) / self.sum(mask_N).clamp(min=1)
