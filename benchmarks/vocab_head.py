"""Memory and time of the chunked vocabulary head against all logits at once, on the CPU, over tokens and vocabulary.

    python benchmarks/vocab_head.py --json benchmarks/vocab_head.json --picture docs/images/vocab_head.png

Every point is a forward and a backward pass with gradients of hidden rows and output weight, in float32, with the
library's choice of matrix products (``megatron/cpu_products.py``) for both. The paths take turns in one process and the
ratio is the median of the turns' ratios. Extra memory is what torch holds at the worst moment, by its profiler, less
the inputs and the two gradients, which both paths must make; buffers inside the matrix library are not in it.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import DrawnOutput, publish
from torch import Tensor

from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.megatron import cpu_products
from opd_megatron.megatron.vocab_head import Side, record_divergence, target_divergence, token_log_probs
from opd_megatron.megatron.vocab_head.shard import chunk_tokens
from opd_megatron.objectives.divergences import jensen_shannon

TEMPERATURE = 0.8
TOP_K = 64
BETAS = {"forward KL": 0.0, "JSD 0.5": 0.5, "reverse KL": 1.0}


@dataclass(frozen=True)
class BenchmarkOptions(DrawnOutput):
    vocab_size: int = option(32_000, "Vocabulary of the ratios of time.")
    hidden_sizes: tuple[int, ...] = option((256, 1024, 2048), "Hidden sizes at which log-probabilities are timed.")
    tokens: int = option(1024, "Tokens of the ratios of time.")
    repetitions: int = option(3, "Turns of both paths for a ratio of time, after one that does not count.")
    curve_vocab_sizes: tuple[int, ...] = option((32_000, 151_936), "Vocabularies of the curves over tokens.")
    curve_hidden_size: int = option(64, "Hidden size of the curves.")
    curve_tokens: tuple[int, ...] = option((1024, 4096, 16_384, 32_768), "Tokens of the curves.")
    plain_limit_gib: float = option(8.0, "The plain path is left out where it would take more memory than this.")
    threads: int = option(2, "Threads of the arithmetic.")


@dataclass(frozen=True)
class Problem:
    """Student and teacher rows ``[N, h]`` and weights ``[V, h]``, sampled tokens, and a teacher's record.

    To time and memory only the record's shape matters, so its ids are those after the sampled one, all equally likely.
    """

    hidden_Nh: Tensor
    weight_Vh: Tensor
    target_N: Tensor
    teacher_Nh: Tensor
    teacher_weight_Vh: Tensor
    record: tuple[Tensor, Tensor, Tensor]

    @property
    def gradient_bytes(self) -> int:
        return 4 * (self.hidden_Nh.numel() + self.weight_Vh.numel())


def make_problem(tokens: int, hidden_size: int, vocab_size: int) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, hidden_size, generator=generator).mul_(scale)

    scale = hidden_size**-0.5
    target_N = torch.randint(0, vocab_size, (tokens,), generator=generator)
    places = min(TOP_K, vocab_size - 1)
    ids_NK = (target_N[:, None] + torch.arange(places)) % vocab_size
    top_NK = torch.full((tokens, places), -math.log(places + 1))
    return Problem(
        hidden_Nh=normal(tokens, 1.0).requires_grad_(),
        weight_Vh=normal(vocab_size, scale).requires_grad_(),
        target_N=target_N,
        teacher_Nh=normal(tokens, 1.0),
        teacher_weight_Vh=normal(vocab_size, scale),
        record=(ids_NK.int(), top_NK, top_NK[:, 0].clone()),
    )


LossPath = Callable[[Problem], Tensor]
"""From a problem to the sum of a loss over its tokens."""


def _settings(problem: Problem) -> dict[str, Any]:
    return {"temperature": TEMPERATURE, "vocab_size": len(problem.weight_Vh), "group": None}


def _plain_log_probs(hidden_Nh: Tensor, weight_Vh: Tensor) -> Tensor:
    return torch.log_softmax(hidden_Nh @ weight_Vh.t() / TEMPERATURE, dim=-1)


def _entropy(log_probs_NV: Tensor) -> Tensor:
    return -(log_probs_NV.exp() * log_probs_NV).sum(-1)


def plain_tokens(problem: Problem) -> Tensor:
    log_probs_NV = _plain_log_probs(problem.hidden_Nh, problem.weight_Vh)
    with torch.no_grad():
        _entropy(log_probs_NV)
    return log_probs_NV.gather(1, problem.target_N[:, None]).sum()


def chunked_tokens(problem: Problem) -> Tensor:
    return token_log_probs(problem.hidden_Nh, problem.weight_Vh, problem.target_N, **_settings(problem))[0].sum()


def plain_tokens_and_entropy(problem: Problem) -> Tensor:
    log_probs_NV = _plain_log_probs(problem.hidden_Nh, problem.weight_Vh)
    return log_probs_NV.gather(1, problem.target_N[:, None]).sum() + _entropy(log_probs_NV).sum()


def chunked_tokens_and_entropy(problem: Problem) -> Tensor:
    both = token_log_probs(problem.hidden_Nh, problem.weight_Vh, problem.target_N, **_settings(problem))
    return both[0].sum() + both[1].sum()


def _plain_divergence(log_student: Tensor, log_teacher: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return torch.nn.functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum")
    if beta == 1.0:
        return torch.nn.functional.kl_div(log_teacher, log_student, log_target=True, reduction="sum")
    student, teacher = log_student.exp(), log_teacher.exp()
    log_mixture = (beta * teacher + (1 - beta) * student).log()
    return (beta * teacher * (log_teacher - log_mixture) + (1 - beta) * student * (log_student - log_mixture)).sum()


def plain_full(beta: float) -> LossPath:
    def run(problem: Problem) -> Tensor:
        with torch.no_grad():
            log_teacher = _plain_log_probs(problem.teacher_Nh, problem.teacher_weight_Vh)
        return _plain_divergence(_plain_log_probs(problem.hidden_Nh, problem.weight_Vh), log_teacher, beta)

    return run


def chunked_full(beta: float) -> LossPath:
    def run(problem: Problem) -> Tensor:
        teacher, divergence = Side(problem.teacher_Nh, problem.teacher_weight_Vh), jensen_shannon(beta)
        return target_divergence(problem.hidden_Nh, problem.weight_Vh, teacher, divergence, **_settings(problem)).sum()

    return run


def plain_record(beta: float) -> LossPath:
    def run(problem: Problem) -> Tensor:
        ids, top, tail = problem.record
        ids = ids.long()
        log_probs_NV = _plain_log_probs(problem.hidden_Nh, problem.weight_Vh)
        rest_N1 = log_probs_NV.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        student = torch.cat([log_probs_NV.gather(1, ids), rest_N1], dim=1)
        return _plain_divergence(student, torch.cat([top, tail[:, None]], dim=1), beta)

    return run


def chunked_record(beta: float) -> LossPath:
    def run(problem: Problem) -> Tensor:
        divergence = jensen_shannon(beta)
        return record_divergence(
            problem.hidden_Nh, problem.weight_Vh, *problem.record, divergence, **_settings(problem)
        ).sum()

    return run


PATHS: dict[str, tuple[LossPath, LossPath]] = {
    "log-probability": (plain_tokens, chunked_tokens),
    "log-probability and entropy": (plain_tokens_and_entropy, chunked_tokens_and_entropy),
    **{f"{name}, whole vocabulary": (plain_full(beta), chunked_full(beta)) for name, beta in BETAS.items()},
    **{f"{name}, top-{TOP_K} record": (plain_record(beta), chunked_record(beta)) for name, beta in BETAS.items()},
}
"""Objective: the plain path and ours. The entropy is computed by both in each of the first two."""


def passes(path: LossPath, problem: Problem) -> float:
    """Seconds of forward and backward."""
    start = time.perf_counter()
    torch.autograd.grad(path(problem), (problem.hidden_Nh, problem.weight_Vh))
    return time.perf_counter() - start


def measured(path: LossPath, problem: Problem) -> tuple[float, int]:
    """Seconds, and bytes that torch holds at the worst moment beyond inputs and gradients."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        seconds = passes(path, problem)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return seconds, peak - problem.gradient_bytes


def time_ratio(name: str, hidden_size: int, options: BenchmarkOptions) -> dict[str, Any]:
    problem = make_problem(options.tokens, hidden_size, options.vocab_size)
    times: dict[str, list[float]] = {"plain": [], "chunked": []}
    for turn in range(options.repetitions + 1):
        for side, path in zip(times, PATHS[name], strict=True):
            seconds = passes(path, problem)
            if turn:
                times[side].append(seconds)
    chunk = chunk_tokens(options.vocab_size, problem.hidden_Nh.device)
    return {
        "objective": name,
        "hidden_size": hidden_size,
        "seconds": {side: statistics.median(values) for side, values in times.items()},
        "time_ratio": statistics.median(
            ours / plain for ours, plain in zip(times["chunked"], times["plain"], strict=True)
        ),
        "chunk_logits_of_extra_memory": measured(PATHS[name][1], problem)[1] / (4 * chunk * options.vocab_size),
    }


def curve(vocab_size: int, options: BenchmarkOptions) -> list[dict[str, Any]]:
    """Memory and time of both paths over tokens."""
    points = []
    for tokens in options.curve_tokens:
        problem = make_problem(tokens, options.curve_hidden_size, vocab_size)
        point: dict[str, Any] = {"vocab_size": vocab_size, "tokens": tokens}
        for side, path in zip(("plain", "chunked"), PATHS["log-probability"], strict=True):
            # the plain path takes this much: logits, log-probabilities and a gradient
            if side == "plain" and 3 * 4 * tokens * vocab_size > options.plain_limit_gib * 2**30:
                continue
            passes(path, make_problem(8, options.curve_hidden_size, vocab_size))
            seconds, extra = measured(path, problem)
            point[side] = {"seconds": seconds, "extra_mib": extra / 2**20}
        points.append(point)
        print(f"V {vocab_size}, N {tokens}: {point}", file=sys.stderr)
    return points


def run(options: BenchmarkOptions) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    cpu_products.install()
    ratios = [time_ratio("log-probability", size, options) for size in options.hidden_sizes]
    ratios += [time_ratio(name, options.hidden_sizes[0], options) for name in list(PATHS)[1:]]
    cpu = torch.device("cpu")
    return {
        "machine": f"{options.threads} threads of {os.cpu_count()} {platform.machine()} cores",
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
        "tokens": options.tokens,
        "vocab_size": options.vocab_size,
        "ratios": ratios,
        "limit_mib": {size: 3 * 4 * chunk_tokens(size, cpu) * size / 2**20 for size in options.curve_vocab_sizes},
        "curves": [point for size in options.curve_vocab_sizes for point in curve(size, options)],
    }


def render(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}, torch {result['torch']}, float32; "
        f"{result['tokens']} tokens, vocabulary {result['vocab_size']}",
        "",
        "| objective | h | plain s | chunked s | time ratio | extra memory, chunks of logits |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["ratios"]:
        lines.append(
            f"| {row['objective']} | {row['hidden_size']} | {row['seconds']['plain']:.2f} "
            f"| {row['seconds']['chunked']:.2f} | {row['time_ratio']:.2f} "
            f"| {row['chunk_logits_of_extra_memory']:.2f} |"
        )
    lines += ["", "| V | N | plain MiB | chunked MiB | plain s | chunked s |", "|--:|--:|--:|--:|--:|--:|"]
    for point in result["curves"]:
        plain, ours = point.get("plain"), point["chunked"]
        cells = [f"{plain['extra_mib']:.0f}" if plain else "-", f"{ours['extra_mib']:.0f}"]
        cells += [f"{plain['seconds']:.1f}" if plain else "-", f"{ours['seconds']:.1f}"]
        lines.append(f"| {point['vocab_size']} | {point['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Extra memory and time over tokens, one column a vocabulary."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    vocabularies = list(result["limit_mib"])
    figure = Figure(figsize=(4.6 * len(vocabularies), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(vocabularies), squeeze=False, sharex=True)
    for column, vocab_size in enumerate(vocabularies):
        points = [point for point in result["curves"] if point["vocab_size"] == vocab_size]
        for row, (key, label) in enumerate({"extra_mib": "extra memory, MiB", "seconds": "seconds"}.items()):
            axes = grid[row][column]
            for side, color in (("plain", "#d1552c"), ("chunked", "#1f6fb4")):
                drawn = [point for point in points if side in point]
                axes.plot(
                    [point["tokens"] for point in drawn],
                    [max(1e-3, point[side][key]) for point in drawn],
                    "o-",
                    color=color,
                    label={"plain": "all logits at once", "chunked": "chunks"}[side],
                )
            if key == "extra_mib":
                axes.axhline(
                    result["limit_mib"][vocab_size], color="#6b6b6b", linestyle=":", label="3 chunks of logits"
                )
                axes.set_title(f"vocabulary {vocab_size:,}")
            axes.set(xscale="log", yscale="log", ylabel=label)
            axes.grid(alpha=0.3)
        grid[1][column].set_xlabel("tokens")
    grid[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    publish(argv, BenchmarkOptions, program="vocab_head.py", about=str(__doc__), run=run, render=render, draw=draw)


if __name__ == "__main__":
    sys.exit(run_cli(main))
