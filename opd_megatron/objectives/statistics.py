"""Means that can be summed: metrics of a step that do not depend on how the step was split.

A statistic is a float64 tensor ``[2]`` on the device of its data: the weighted sum of a quantity and the sum of its
weights. Adding those of all micro-batches and data-parallel ranks and dividing at the end gives the same mean in every
layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_statistic(values_N: Tensor, weights_N: Tensor) -> Tensor:
    """``[2]`` float64, detached: sum of ``weights * values`` and sum of ``weights``."""
    weights_N = weights_N.detach().double()
    return torch.stack([(weights_N * values_N.detach().double()).sum(), weights_N.sum()])


def merge_statistics(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum the statistics of parts of a step; no parts give none.

    Raises ``ValueError`` where the parts do not have the same keys: a metric must not depend on which part a rank saw.
    """
    if not parts:
        return {}
    for part in parts[1:]:
        if part.keys() != parts[0].keys():
            raise ValueError(f"statistics differ in their keys: {sorted(part.keys() ^ parts[0].keys())}")
    return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}


def finalize_statistics(statistics: dict[str, Tensor]) -> dict[str, float]:
    """The means; NaN where the weights sum to 0 (a step without trained tokens has no mean)."""
    means = {}
    for name, statistic in statistics.items():
        total, weight = statistic.tolist()
        means[name] = total / weight if weight != 0 else math.nan
    return means
