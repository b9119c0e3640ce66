"""When two answers about one text are those of the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """How far two servers' log-probabilities of the same text may differ: in the mean, and at any one token.

    The mean tells other weights from rounding. A single token says little where logits are rounded: one of bfloat16
    between 16 and 32 is off by up to 1/16, and its token's log-probability by as much as the normaliser's error more.
    """

    mean: float
    largest: float

    def exceeded(self, one_N: np.ndarray, other_N: np.ndarray) -> str | None:
        """By how much they differ, in words; None where that is within the tolerance."""
        gaps_N = np.abs(one_N.astype(np.float64) - other_N)
        if not gaps_N.size or (gaps_N.mean() <= self.mean and gaps_N.max() <= self.largest):
            return None
        return f"{gaps_N.mean():.2g} in the mean and {gaps_N.max():.2g} at one token"


EXACT = Tolerance(1e-3, 1e-3)
"""For float32 weights."""
ROUNDED = Tolerance(0.05, 0.5)
"""For weights of less precision, whose sums depend on what else is in a server's batch."""


@dataclass(frozen=True)
class Identity:
    """What a server says that it serves, and how it scores a known text ``[N]``."""

    model_path: str | None
    weight_version: str
    log_probs_N: np.ndarray

    def difference(self, other: Identity, tolerance: Tolerance) -> str | None:
        """What ``other`` has other than this, in words; None where it serves the same."""
        gap = tolerance.exceeded(other.log_probs_N, self.log_probs_N)
        if gap is not None:
            return f"its log-probabilities of a known text differ by {gap}"
        if other.weight_version != self.weight_version:
            return f"its weight version is {other.weight_version!r}, not {self.weight_version!r}"
        return None
