"""Time of the vocabulary head on a GPU against that of its matrix multiplications alone, in bfloat16.

    python benchmarks/gpu/vocab_head.py --hidden-size 4096 --vocab-size 151936 --tokens 16384

The multiplications are those that a head in chunks cannot do without, in the same chunks: the student's logits twice
(forward and again in backward), the gradient of the hidden rows and that of the weight, and for a divergence the
teacher's logits twice. Both sides take turns and the ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.parse import parse_groups
from opd_megatron.megatron.vocab_head import Side, target_divergence, token_log_probs
from opd_megatron.megatron.vocab_head.shard import chunk_tokens
from opd_megatron.objectives.divergences import jensen_shannon


@dataclass(frozen=True)
class BenchmarkOptions:
    tokens: int = option(16_384, "Tokens.")
    hidden_size: int = option(4096, "Hidden size of student and teacher.")
    vocab_size: int = option(151_936, "Vocabulary, all of it on one device.")
    repetitions: int = option(5, "Turns of both sides, after two that do not count.")
    device: str = option("cuda", "Device; cpu serves to try the script at a small size.")


class Problem:
    """Student and teacher rows and weights in bfloat16."""

    def __init__(self, options: BenchmarkOptions) -> None:
        generator = torch.Generator(options.device).manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            shape = rows, options.hidden_size
            drawn = torch.randn(shape, generator=generator, device=options.device, dtype=torch.bfloat16)
            return drawn.mul_(scale)

        scale = options.hidden_size**-0.5
        self.hidden_Nh = normal(options.tokens, 1.0).requires_grad_()
        self.weight_Vh = normal(options.vocab_size, scale).requires_grad_()
        self.teacher_Nh, self.teacher_weight_Vh = normal(options.tokens, 1.0), normal(options.vocab_size, scale)
        self.target_N = torch.randint(
            0, options.vocab_size, (options.tokens,), generator=generator, device=options.device
        )
        self.settings = {"temperature": 0.8, "vocab_size": options.vocab_size, "group": None}

    def backward(self, loss: Tensor) -> None:
        torch.autograd.grad(loss, (self.hidden_Nh, self.weight_Vh))

    def log_probs(self) -> None:
        found = token_log_probs(self.hidden_Nh, self.weight_Vh, self.target_N, **self.settings)  # type: ignore[arg-type]
        self.backward(found[0].sum())

    def divergence(self, beta: float) -> None:
        value_N = target_divergence(
            self.hidden_Nh,
            self.weight_Vh,
            Side(self.teacher_Nh, self.teacher_weight_Vh),
            jensen_shannon(beta),
            **self.settings,  # type: ignore[arg-type]
        )
        self.backward(value_N.sum())

    @torch.no_grad()
    def multiplications(self, logits: int) -> None:
        """``logits`` products with the weight's transpose and the two gradients, chunk by chunk."""
        size = chunk_tokens(len(self.weight_Vh), self.hidden_Nh.device)
        for hidden_Ch in self.hidden_Nh.split(size):
            for _ in range(logits):
                logits_CV = hidden_Ch @ self.weight_Vh.t()
            _ = logits_CV @ self.weight_Vh, logits_CV.t() @ hidden_Ch


def seconds(work: Callable[[], None], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def peak_gib(work: Callable[[], None], device: str) -> float:
    """Largest memory allocated on the device during the work, inputs and gradients included; 0 on a CPU."""
    if device != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(options: BenchmarkOptions) -> list[tuple[str, float, float, float, float]]:
    """Name, seconds of the head, seconds of the multiplications, their ratio, peak GiB of the head (0 on a CPU)."""
    problem = Problem(options)
    rows = []
    works: dict[str, tuple[Callable[[], None], int]] = {
        "log-probability": (problem.log_probs, 2),
        "reverse KL": (lambda: problem.divergence(1.0), 4),
        "JSD 0.5": (lambda: problem.divergence(0.5), 4),
    }
    for name, (work, logits) in works.items():
        times = []
        for turn in range(options.repetitions + 2):
            pair = seconds(work, options.device), seconds(partial(problem.multiplications, logits), options.device)
            if turn >= 2:
                times.append(pair)
        peak = peak_gib(work, options.device)
        head, multiplications = (statistics.median(side) for side in zip(*times, strict=True))
        rows.append((name, head, multiplications, statistics.median(one / two for one, two in times), peak))
    return rows


def main(argv: Sequence[str]) -> None:
    options = parse_groups(
        argv, {"benchmark": BenchmarkOptions}, prog="vocab_head.py", description=str(__doc__).split("\n\n")[0]
    )[BenchmarkOptions]
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{device}, torch {torch.__version__}, bfloat16; {options}")
    print("| objective | head ms | multiplications ms | ratio | peak GiB |\n|---|--:|--:|--:|--:|")
    for name, head, multiplications, ratio, peak in measure(options):
        print(f"| {name} | {head * 1e3:.1f} | {multiplications * 1e3:.1f} | {ratio:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    sys.exit(run_cli(main))
