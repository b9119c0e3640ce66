"""The matrix products of AMD machines: the same numbers as torch's own, in every memory layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opd_megatron.megatron import cpu_products

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator, dtype=torch.float64).to(dtype).t()
    if layout == "slice":
        return torch.randn(rows, columns + 3, generator=generator, dtype=torch.float64).to(dtype)[:, 1 : columns + 1]
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


def assert_equal(value: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert value.dtype == dtype
    assert value.shape == reference.shape
    torch.testing.assert_close(
        value.double(), reference, rtol=0, atol=TOLERANCE[dtype] * float(reference.abs().max()) if len(reference) else 0
    )


@pytest.mark.skipif(not cpu_products.pays_off(), reason="only installed on AMD processors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(40, 24, 56), (1, 8, 5), (7, 1, 3), (6, 9, 1), (0, 4, 3)])
@pytest.mark.parametrize(
    "layouts", [("plain", "plain"), ("plain", "transposed"), ("transposed", "plain"), ("slice", "slice")]
)
def test_products_equal_the_exact_ones(
    layouts: tuple[str, str], sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, inner, columns = sizes
    a = matrix(rows, inner, layouts[0], dtype, 1)
    b = matrix(inner, columns, layouts[1], dtype, 2)
    exact = a.double() @ b.double()
    assert_equal(cpu_products.mm(a, b), exact, dtype)
    for bias in (matrix(1, columns, "plain", dtype, 3)[0], matrix(rows, columns, "slice", dtype, 4)):
        assert_equal(cpu_products.addmm(bias, a, b), exact + bias.double(), dtype)
        scaled = cpu_products.addmm(bias, a, b, beta=0.5, alpha=2)
        assert_equal(scaled, 2 * exact + 0.5 * bias.double(), dtype)


@pytest.mark.skipif(not cpu_products.pays_off(), reason="only installed on AMD processors")
@pytest.mark.parametrize("layouts", [("plain", "slice"), ("slice", "slice"), ("sliced and transposed", "plain")])
def test_the_second_factor_has_no_gaps_in_memory(monkeypatch: pytest.MonkeyPatch, layouts: tuple[str, str]) -> None:
    """oneDNN takes a thousand times as long with such a factor as with its copy."""
    weights: list[Tensor] = []
    products = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(cpu_products, "_linear", lambda *args: weights.append(args[1]) or products(*args))
    b = matrix(24, 8, layouts[1], torch.float32, 2)
    a = matrix(24, 40, "slice", torch.float32, 1).t()
    if layouts[0] != "sliced and transposed":
        a = matrix(40, 24, layouts[0], torch.float32, 1)
    assert_equal(cpu_products.mm(a, b), a.double() @ b.double(), torch.float32)
    cpu_products.addmm(torch.zeros(8), a, b)
    assert len(weights) == 2
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in weights)


@pytest.mark.skipif(not cpu_products.pays_off(), reason="only installed on AMD processors")
def test_installed_products_serve_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu_products.install()
    assert library is not None
    assert cpu_products.install() is library
    calls: list[tuple[Any, ...]] = []
    products = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(cpu_products, "_linear", lambda *args: calls.append(args) or products(*args))
    weight = matrix(5, 8, "plain", torch.float32, 1).requires_grad_()
    x = matrix(6, 8, "plain", torch.float32, 2).requires_grad_()
    torch.nn.functional.linear(x, weight, torch.zeros(5)).square().sum().backward()
    assert len(calls) == 3
    exact = x.detach().double() @ weight.detach().double().t()
    assert weight.grad is not None
    assert x.grad is not None
    assert_equal(weight.grad, 2 * exact.t() @ x.detach().double(), torch.float32)
    assert_equal(x.grad, 2 * exact @ weight.detach().double(), torch.float32)
