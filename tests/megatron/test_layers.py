"""Norm, rotation and gated unit of the torch layer spec against plain float64 formulas, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_megatron.megatron.gated_unit import gated_unit
from opd_megatron.megatron.layers import rms_norm, rotate, rotation

S, B, HEADS, D = 7, 3, 2, 8
EPS = 1e-3
"""Large enough to be missed where it is left out."""


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def plain_rotation(x: Tensor, angles_sf: Tensor) -> Tensor:
    """The pairs ``(i, i + d/2)`` as complex numbers, turned by the angle of their position."""
    low, high = x.chunk(2, -1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles_sf), angles_sf)[:, None, None]
    return torch.cat([turned.real, turned.imag], -1)


def norm_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of very different size, among them one of zeros; a weight; and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(S, B, D, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-4, 3, S, dtype=torch.float64)[:, None, None]
    x[2, 1] = 0.0
    weight = torch.randn(D, generator=generator, dtype=torch.float64)
    return x, weight, torch.randn(S, B, D, generator=generator, dtype=torch.float64)


def with_gradients(function: object, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)  # type: ignore[operator]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_norm_and_its_gradients_are_those_of_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    x, weight, grad = norm_inputs()
    expected = with_gradients(plain_norm, (x, weight), grad)
    found = with_gradients(lambda a, b: rms_norm(a, b, EPS), (x.to(dtype), weight.to(dtype)), grad.to(dtype))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        # row by row: the gradients of small rows are large
        scale = theirs.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        assert ((mine.double() - theirs).abs() / scale).max() <= tolerance


def test_the_norm_passes_gradcheck_and_skips_a_frozen_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(D, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, EPS), (x, weight))
    rms_norm(x, weight.detach(), EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_statistics_of_bfloat16_rows_are_float32() -> None:
    x, weight, grad = norm_inputs()
    inputs = (x.bfloat16(), weight.bfloat16())
    expected = with_gradients(plain_norm, tuple(tensor.double() for tensor in inputs), grad.bfloat16().double())
    found = with_gradients(lambda a, b: rms_norm(a, b, EPS), inputs, grad.bfloat16())
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        scale = theirs.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        assert ((mine.double() - theirs).abs() / scale).max() <= 2**-7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_rotation_and_its_gradient_turn_complex_numbers(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x, grad = torch.randn(2, S, B, HEADS, D, generator=generator, dtype=torch.float64)
    angles_sf = torch.arange(S, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(D // 2, dtype=torch.float64)
    frequencies = torch.cat([angles_sf, angles_sf], -1)[:, None, None]
    expected = with_gradients(lambda a: plain_rotation(a, angles_sf), (x,), grad)
    turning_2 = rotation(frequencies.clone(), dtype)
    found = with_gradients(lambda a: rotate(a, turning_2), (x.to(dtype),), grad.to(dtype))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=10 * tolerance)


def plain_unit(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_gated_unit_and_its_gradient_are_those_of_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    gate_up = 4 * torch.randn(S, B, 2 * D, generator=generator, dtype=torch.float64)
    grad = torch.randn(S, B, D, generator=generator, dtype=torch.float64)
    expected = with_gradients(plain_unit, (gate_up,), grad)
    found = with_gradients(gated_unit, (gate_up.to(dtype),), grad.to(dtype))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=100 * tolerance)
    assert torch.autograd.gradcheck(gated_unit, gate_up[:2].clone().requires_grad_())
