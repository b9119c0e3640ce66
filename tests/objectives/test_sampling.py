"""Effective sizes and standard errors by their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from opd_megatron.objectives.sampling import clustered_error, effective_share


def test_the_effective_share_is_one_for_equal_weights_and_k_over_n_for_k_of_them() -> None:
    assert effective_share(torch.full((5,), 0.3)) == pytest.approx(1.0)
    assert effective_share(torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0])) == pytest.approx(0.4)
    assert effective_share(torch.zeros(3)) == 0.0
    assert math.isnan(effective_share(torch.zeros(0)))


def test_the_error_of_a_mean_is_that_of_the_clusters_residuals() -> None:
    values = [[1.0, 2.0, 4.0], [0.5], [3.0, -1.0]]
    sums, counts = (torch.tensor([float(of(cluster)) for cluster in values]).double() for of in (sum, len))
    mean = sums.sum() / counts.sum()
    residuals = [sum(value - mean.item() for value in cluster) for cluster in values]
    expected = math.sqrt(3 / 2 * sum(residual**2 for residual in residuals)) / 6
    assert clustered_error(sums, counts, mean) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(clustered_error(sums[:1], counts[:1], mean))
