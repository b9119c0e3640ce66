"""How much a sample says: effective sizes of weighted samples, and standard errors of means over clusters."""

from __future__ import annotations

import math

from torch import Tensor


def effective_share(weights_N: Tensor) -> float:
    """``(sum w)^2 / (N sum w^2)``: the effective sample size of ``N`` weights over ``N``; 0 where all are 0.

    1 where all are equal, ``k / N`` where ``k`` are equal and the others 0 (Kish 1965). NaN for none.
    """
    weights_N = weights_N.double()
    squares = float(weights_N.square().sum())
    if not len(weights_N):
        return math.nan
    return float(weights_N.sum()) ** 2 / (len(weights_N) * squares) if squares > 0 else 0.0


def clustered_error(sums_M: Tensor, counts_M: Tensor, mean: Tensor) -> float:
    """Standard error of a mean over clusters: ``sqrt(m / (m-1) sum_i (y_i - R n_i)^2) / sum_i n_i``.

    ``y_i`` and ``n_i`` are sum and number of cluster ``i`` of ``m``, ``R`` is the ``mean`` of all values (linearised
    ratio estimator): values of one cluster need not be independent. NaN for ``m < 2``.
    """
    clusters = len(sums_M)
    if clusters < 2:
        return math.nan
    spread = (clusters / (clusters - 1) * (sums_M - mean * counts_M).square().sum()).sqrt()
    return (spread / counts_M.sum()).item()
