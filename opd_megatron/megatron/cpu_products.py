"""Matrix products on AMD processors: oneDNN's instead of MKL's.

PyTorch's x86 wheels multiply float32 matrices by MKL, which on processors that are not Intel's takes two to three times
as long as oneDNN, which the same wheels carry (``benchmarks/products.py`` measures both). :func:`install` puts oneDNN
behind ``torch.mm`` and ``torch.addmm`` for the whole process, so that Megatron's layers, the vocabulary head, backward
passes and the rollout engine all use it. What is chosen depends on the machine alone: a resumed run computes as before.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def pays_off() -> bool:
    """Whether this is an x86 processor of AMD and PyTorch has oneDNN."""
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        vendor = False
    return vendor and _linear is not None and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def _fits(a: Tensor, b: Tensor) -> bool:
    """Float32 and at least two of everything: MKL is quicker with a vector, and an empty product is a special case."""
    return a.dtype == b.dtype == torch.float32 and min(a.shape) > 1 and b.shape[1] > 1


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` by oneDNN, whose fast loops want a second factor without gaps in memory."""
    weight = b.t()
    if not weight.is_contiguous() and not b.is_contiguous():
        weight = weight.contiguous()
    return _linear(a, weight, bias, "none", [], "")


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``[m, k]`` and ``[k, n]``."""
    if not _fits(a, b):
        return torch.ops.aten.mm.out(a, b, out=a.new_empty((a.shape[0], b.shape[1])))
    if a.shape[0] > b.shape[1] and a.stride(0) == 1 < a.stride(1):
        # oneDNN is given a copy of a first factor that is transposed, but not of the second: of a weight's gradient,
        # whose factors are as long as the batch, the narrower one goes first.
        return _product(b.t(), a.t()).t().contiguous()
    return _product(a, b)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * (a @ b)``; ``bias`` is ``[n]`` or ``[m, n]``."""
    if not _fits(a, b) or bias.dtype != torch.float32 or beta != 1 or alpha != 1:
        out = a.new_empty((a.shape[0], b.shape[1]))
        return torch.ops.aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
    if bias.dim() == 1 and len(bias) == b.shape[1]:
        return _product(a, b, bias)
    return _product(a, b).add_(bias)


@cache
def install() -> torch.library.Library | None:
    """Replace both products in this process if that :func:`pays_off`; what it returns keeps them in place."""
    if not pays_off():
        return None
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # torch says that kernels are overridden, which is the purpose
        warnings.simplefilter("ignore", UserWarning)
        library.impl("mm", mm, "CPU", allow_override=True)
        library.impl("addmm", addmm, "CPU", allow_override=True)
    return library
