"""How the cost of one training step grows with tokens, vocabulary and layers: straight lines where they should be.

    python benchmarks/scaling.py --json scaling.json --picture docs/images/scaling.png

One size at a time is varied on a small Qwen3 with random weights, float32, sequences of one length in one micro-batch.
A step is the trainer's: micro-batch, forward, backward, optimizer. Its CPU seconds (the least of the repeats) and the
bytes that autograd keeps for backward (weights not counted) are fitted by straight lines.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import DrawnOutput, processor, publish
from transformers import Qwen3Config

from opd_megatron.config.architecture import architecture_from_hf, read_hf_config
from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.parse import parse_options
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.trainer import MegatronTrainer, TrainerSpec
from opd_megatron.sample import Sample

LENGTH = 64
"""Tokens of a sequence; with more of them, not longer ones, attention costs the same for each token."""

FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class BenchmarkOptions(DrawnOutput):
    """Cost of a step over its sizes"""

    tokens: int = option(1024, "least tokens of a step; a multiple of 64", unit="tokens", minimum=LENGTH)
    vocabulary: int = option(2048, "least vocabulary", minimum=2)
    layers: int = option(1, "least number of layers", minimum=1)
    hidden: int = option(128, "hidden size; a multiple of 64", minimum=64)
    repeats: int = option(5, "measured steps of each size", minimum=1)
    threads: int = option(1, "threads", minimum=1)


def build(folder: Path, hidden: int, size: dict[str, int]) -> MegatronTrainer:
    """A trainer with random weights of ``size``."""
    Qwen3Config(
        vocab_size=size["vocabulary"],
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=size["layers"],
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    count = str(size["tokens"] // LENGTH)
    argv = ["--hf-checkpoint", str(folder), "--loss-type", "sft_loss", "--calculate-per-token-loss"]
    options = parse_options([*argv, "--rollout-batch-size", count, "--micro-batch-size", count])
    architecture = architecture_from_hf(read_hf_config(folder))
    return MegatronTrainer(TrainerSpec(options, architecture, StartingPoint("random", folder), 1000), Rendezvous())


def make_samples(size: dict[str, int]) -> list[Sample]:
    """Sequences whose every token but the first is trained on; the model reads ``LENGTH`` of each."""
    tokens = np.random.default_rng(0).integers(0, size["vocabulary"], (size["tokens"] // LENGTH, LENGTH + 1))
    return [
        Sample(index=index, group_index=index, prompt="", prompt_tokens=row[:1], response_tokens=row[1:])
        for index, row in enumerate(tokens)
    ]


def kept_bytes(trainer: MegatronTrainer, samples: Sequence[Sample]) -> int:
    """Bytes that autograd keeps for the backward pass of one step, beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.student.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.train(samples)
    return sum(storage.nbytes() for storage in storages.values())


def measure(folder: Path, options: BenchmarkOptions, size: dict[str, int]) -> dict[str, Any]:
    """One point: its sizes, CPU seconds and kept MiB."""
    trainer, samples = build(folder, options.hidden, size), make_samples(size)
    kept = kept_bytes(trainer, samples)
    seconds = []
    for _ in range(options.repeats):
        start = time.process_time()
        trainer.train(samples)
        seconds.append(time.process_time() - start)
    trainer.close()
    return {**size, "cpu_seconds": min(seconds), "kept_mib": kept / 2**20}


def straight_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares of ``y = start + slope x`` weighted by ``1 / y``, and the largest ``|y - line| / y``."""
    x_P, y_P = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    design = np.stack([np.ones_like(x_P), x_P], axis=1) / y_P[:, None]
    start, slope = np.linalg.lstsq(design, np.ones_like(y_P), rcond=None)[0]
    deviation = np.abs(y_P - start - slope * x_P) / y_P
    return {"start": float(start), "slope": float(slope), "largest_deviation": float(deviation.max())}


def run(options: BenchmarkOptions) -> dict[str, Any]:
    """All points and lines."""
    torch.set_num_threads(options.threads)
    least = {"tokens": options.tokens // LENGTH * LENGTH, "vocabulary": options.vocabulary, "layers": options.layers}
    curves = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for name in least:
            points = [measure(Path(folder), options, {**least, name: least[name] * factor}) for factor in FACTORS]
            sizes = [point[name] for point in points]
            lines = {key: straight_line(sizes, [p[key] for p in points]) for key in ("cpu_seconds", "kept_mib")}
            curves[name] = {"points": points, "lines": lines}
    return {"curves": curves, "hidden": options.hidden, "threads": options.threads, "processor": processor()}


def render(result: dict[str, Any]) -> str:
    """The result as a table for README.md."""
    lines = ["| varied | tokens | vocabulary | layers | CPU s | kept MiB |", "|---|--:|--:|--:|--:|--:|"]
    for name, curve in result["curves"].items():
        for point in curve["points"]:
            cells = f"{point['tokens']} | {point['vocabulary']} | {point['layers']}"
            lines.append(f"| {name} | {cells} | {point['cpu_seconds']:.3f} | {point['kept_mib']:.1f} |")
    lines.append("")
    for name, curve in result["curves"].items():
        found = {key: f"{100 * line['largest_deviation']:.1f} %" for key, line in curve["lines"].items()}
        lines.append(
            f"{name}: the straight line is off by at most {found['cpu_seconds']} (CPU s), {found['kept_mib']} (MiB)"
        )
    lines.append(f"{result['processor']}, {result['threads']} threads, hidden size {result['hidden']}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Points and lines, one column for each varied size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(result["curves"]), squeeze=False, sharex="col")
    for column, (name, curve) in enumerate(result["curves"].items()):
        sizes = [point[name] for point in curve["points"]]
        for axes, (key, label) in zip(
            grid[:, column], {"cpu_seconds": "CPU seconds", "kept_mib": "kept MiB"}.items(), strict=True
        ):
            line = curve["lines"][key]
            axes.plot(sizes, [line["start"] + line["slope"] * size for size in sizes], color="#6b6b6b")
            axes.plot(sizes, [point[key] for point in curve["points"]], "o", color="#1f6fb4")
            axes.set(ylabel=label, ylim=(0, None))
            axes.grid(alpha=0.3)
        grid[-1][column].set_xlabel(name)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    publish(argv, BenchmarkOptions, program="scaling.py", about=str(__doc__), run=run, render=render, draw=draw)


if __name__ == "__main__":
    sys.exit(run_cli(main))
