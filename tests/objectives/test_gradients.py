"""Parts and noise of a gradient against the vectors themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_megatron.objectives.gradients import gradient_statistics


def products(*vectors: Tensor) -> Tensor:
    stacked = torch.stack(vectors)
    return stacked @ stacked.t()


@given(st.integers(0, 10**6))
def test_against_the_vectors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a_task, b_task, a_teacher, b_teacher = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    found = gradient_statistics(products(a_task, b_task, a_teacher, b_teacher))
    task, teacher = a_task + b_task, a_teacher + b_teacher
    assert found["train/task_grad_norm"] == pytest.approx(task.norm().item())
    assert found["train/opd_grad_norm"] == pytest.approx(teacher.norm().item())
    assert found["train/opd_grad_share"] == pytest.approx((teacher.norm() / (teacher.norm() + task.norm())).item())
    assert found["train/grad_cosine"] == pytest.approx(torch.cosine_similarity(task, teacher, dim=0).item())
    halves = {"": (a_task + a_teacher, b_task + b_teacher), "task_": (a_task, b_task), "opd_": (a_teacher, b_teacher)}
    for name, (a, b) in halves.items():
        expected = 4 * (a @ b) / (a - b).square().sum()
        assert found[f"train/{name}grad_snr"] == pytest.approx(expected.item())


def test_the_ratio_is_that_of_squared_mean_and_variance() -> None:
    """Means of numerator and denominator over many steps, whose gradients have a known mean and noise."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.3, -0.5, 0.8], dtype=torch.float64)
    noise = torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64)
    halves = mean / 2 + noise * torch.randn(40000, 2, 3, generator=generator, dtype=torch.float64)
    signal = 4 * (halves[:, 0] * halves[:, 1]).sum(-1)
    spread = (halves[:, 0] - halves[:, 1]).square().sum(-1)
    expected = mean.square().sum() / (2 * noise.square().sum())
    assert (signal.mean() / spread.mean()).item() == pytest.approx(expected.item(), rel=0.05)
    nothing = torch.zeros(3, dtype=torch.float64)
    first, second = halves[0]
    found = gradient_statistics(products(nothing, nothing, first, second))["train/opd_grad_snr"]
    assert found == pytest.approx((signal[0] / spread[0]).item())


def test_a_part_that_is_nothing() -> None:
    vectors = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    found = gradient_statistics(products(*vectors))
    assert found["train/opd_grad_share"] == 1.0
    assert found["train/task_grad_norm"] == 0.0
    assert math.isnan(found["train/grad_cosine"])
    assert math.isnan(found["train/task_grad_snr"])
    assert math.isnan(found["train/opd_grad_snr"])  # two equal halves: no noise at all was seen
