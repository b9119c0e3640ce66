"""How evenly data-parallel ranks are loaded when samples are shared out by count, tokens, squares or work.

    python benchmarks/balance.py

The shares of each rule are run one after the other in this process, forward only, packed into micro-batches of
``MAX_TOKENS``; a step waits for the slowest rank, so its time over the mean is what imbalance costs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture, architecture_from_hf
from opd_megatron.config.options import ParallelOptions
from opd_megatron.megatron import distributed
from opd_megatron.megatron.batching import BatchingRule, balanced_shares, fill_by_tokens, plan, sequence_cost
from opd_megatron.megatron.forward import head_log_probs, run_micro_batches
from opd_megatron.megatron.hf_weights import initialize_weights
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel, build_model
from opd_megatron.sample import Sample

RANKS, SAMPLES, MAX_TOKENS, REPEATS = 4, 48, 2048, 3
Rule = Callable[[int], float]


def model_of(folder: Path) -> HiddenStateModel:
    """A small Qwen3 whose attention weighs against its linear layers at the lengths used here."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    architecture: ModelArchitecture = architecture_from_hf(config.to_dict())
    distributed.initialize(distributed.Rendezvous(), ParallelOptions(), seed=0)
    model = build_model(architecture, ParallelOptions(), dtype=torch.float32, make_vocab_size_divisible_by=2)
    initialize_weights(model, 0)
    return model


def samples_of(seed: int) -> list[Sample]:
    """Responses with log-normal lengths, as reasoning models write them: median 200, the longest ten times as long."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(200), 0.9, SAMPLES), 8, 2000).astype(int)
    return [
        Sample(
            index=index,
            group_index=index,
            prompt="",
            prompt_tokens=random.integers(0, 64, 16),
            response_tokens=random.integers(0, 64, length),
        )
        for index, length in enumerate(lengths)
    ]


@torch.no_grad()
def seconds(model: HiddenStateModel, samples: list[Sample], micro_batches: list[tuple[int, ...]]) -> float:
    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> int:
        return len(head_log_probs(model, batch, rows_Nh, 1.0)[0])

    start = time.perf_counter()
    run_micro_batches([model], model, samples, micro_batches, last_stage, with_gradients=False)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(Path(folder))
    rules: dict[str, Rule | None] = {
        "count": None,
        "tokens": float,
        "squares": lambda length: float(length) ** 2,
        "work": sequence_cost(model.architecture),
    }
    slowest: dict[str, list[float]] = {name: [] for name in rules}
    for seed in range(REPEATS):
        samples = samples_of(seed)
        lengths = [len(sample.tokens) for sample in samples]
        seconds(model, samples, fill_by_tokens(range(8), lengths, MAX_TOKENS))
        for name, rule in rules.items():
            if rule is None:
                dealt = plan(lengths, BatchingRule(1), ranks=RANKS, cost=float)
                shares = [[place for places in batches for place in places] for batches in dealt]
            else:
                shares = balanced_shares([rule(length) for length in lengths], RANKS)
            times = [seconds(model, samples, fill_by_tokens(share, lengths, MAX_TOKENS)) for share in shares]
            slowest[name].append(max(times) / statistics.mean(times))
    print(f"{SAMPLES} samples over {RANKS} ranks, {torch.get_num_threads()} threads: slowest rank over the mean")
    for name, ratios in slowest.items():
        print(f"{name:8} median {statistics.median(ratios):.2f}  worst {max(ratios):.2f}")


if __name__ == "__main__":
    main()
