"""Matrix products of the quickstart's sizes by torch's own kernels and by those of ``megatron/cpu_products.py``.

    python benchmarks/products.py

Both are timed in turns in one process; the ratio is the median over the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from opd_megatron.megatron import cpu_products

ROWS, TURNS, REPEATS = 5632, 9, 5
SIZES = [(128, 512), (512, 128), (128, 256), (64, 256), (64, 128)]
"""Inner size and columns of the linear layers of the quickstart's models; ROWS are 128 samples of 44 tokens."""


def plain(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.mm.out(a, b, out=a.new_empty((a.shape[0], b.shape[1])))


def seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        product(a, b)
    return (time.perf_counter() - start) / REPEATS


def main() -> None:
    if not cpu_products.pays_off():
        raise SystemExit("this machine keeps torch's own products: nothing to compare")
    print(f"{torch.get_num_threads()} threads; milliseconds of torch's product and of ours, and their ratio")
    for inner, columns in SIZES:
        x, weight, gradient = torch.randn(ROWS, inner), torch.randn(columns, inner), torch.randn(ROWS, columns)
        cases = {"forward": (x, weight.t()), "gradient of x": (gradient, weight), "of weight": (gradient.t(), x)}
        cases["of some rows"] = (gradient[:, : columns // 4].t(), x)
        for name, (a, b) in cases.items():
            pairs = [(seconds(plain, a, b), seconds(cpu_products.mm, a, b)) for _ in range(TURNS)][2:]
            theirs, ours = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(our / their for their, our in pairs)
            print(f"{inner:4} -> {columns:4}  {name:14} {theirs:7.2f} {ours:7.2f}  {ratio:.2f}")


if __name__ == "__main__":
    main()
