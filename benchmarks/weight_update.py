"""Time of giving new weights to a real SGLang server, by part, over sizes of the model and both ways of transfer.

    python benchmarks/weight_update.py --sglang-python .venv-sglang/bin/python --hidden-sizes 96 512 --updates 10

Prints the median of each part in milliseconds: ``write`` (the folder on disk, synced, or a copy in memory), ``load``
(the server's pause, reading or receiving, and flushing) and ``probe`` (the scoring of the proof by both sides, the
trainer's by transformers). The rate is that of the weights' bytes over all parts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_megatron.config.options import EngineOptions
from opd_megatron.data.column_arithmetic import build_tokenizer
from opd_megatron.megatron.checkpoint import write_hf_folder
from opd_megatron.rollout.sglang_build import weights_on_their_way
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.rollout.sglang_fleet import SpokenModel
from opd_megatron.rollout.sglang_launch import ServedModel, server_launches
from opd_megatron.rollout.weight_check import probe_tokens

PARTS = ("write", "load", "probe", "update")
WAYS = ("disk", "distributed")
POSITIONS = 256


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python", help="interpreter of SGLang's environment (default: as train.py finds it)")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[96, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=20000)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--folder", type=Path, help="where the weights are written (default: a temporary folder)")
    return parser.parse_args()


def make_student(folder: Path, arguments: argparse.Namespace, hidden: int) -> Any:
    """A random Qwen3 in ``folder``: config and tokenizer, whose few characters the larger vocabulary contains."""
    build_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=arguments.vocab_size, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=hidden // 8,
        max_position_embeddings=POSITIONS, tie_word_embeddings=True, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.save_pretrained(folder)
    return model


def log_probs(model: Any, tokens: np.ndarray) -> np.ndarray:
    rows = model(torch.as_tensor(tokens)[None]).logits[0].double().log_softmax(-1)[:-1]
    return rows.gather(1, torch.as_tensor(tokens)[1:, None])[:, 0].numpy()


def measure(root: Path, arguments: argparse.Namespace, way: str, hidden: int) -> tuple[int, dict[str, float]]:
    """Bytes of the weights, and the median seconds of each part."""
    root = root / f"{way}_{hidden}"
    folder = root / "student"
    model = make_student(folder, arguments, hidden)
    tensors = [(name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight"]
    written = None if arguments.folder is None or way != "disk" else str(arguments.folder / f"weights_{hidden}")
    options = EngineOptions(
        sglang_python=arguments.sglang_python, rollout_weight_transfer=way, rollout_weights_dir=written
    )
    served = ServedModel(folder, POSITIONS, "float32", seed=0)
    servers = server_launches(options, served, root, on_cpu=not torch.cuda.is_available())
    engine = SGLangEngine(
        SpokenModel(folder, None, arguments.vocab_size, POSITIONS, (1,), "float32"),
        servers,
        weights_on_their_way(options, root / "weights", partial(write_hf_folder, hf_folder=folder), on_cpu=True),
        probe=probe_tokens([], arguments.vocab_size, POSITIONS),
        reference=partial(log_probs, model),
    )
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    try:
        for update in range(arguments.updates + 1):
            for _, tensor in tensors:
                tensor.mul_(1.001)
            engine.update_weights(tensors, str(update))
            found = engine.metrics()
            if update:  # the first one warms the server up
                for part, values in seconds.items():
                    values.append(found[f"perf/weight_{part}_seconds"])
    finally:
        engine.close()
    return sum(tensor.nbytes for _, tensor in tensors), {part: statistics.median(v) for part, v in seconds.items()}


def main() -> None:
    arguments = parse_arguments()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(
        f"{arguments.layers} layers, vocabulary {arguments.vocab_size}, float32, median of {arguments.updates} updates"
    )
    print(f"{'way':>12} {'hidden':>7} {'MB':>8} " + " ".join(f"{part + ' ms':>10}" for part in PARTS) + f" {'MB/s':>8}")
    with tempfile.TemporaryDirectory() as root:
        for way, hidden in itertools.product(arguments.ways, arguments.hidden_sizes):
            size, seconds = measure(Path(root), arguments, way, hidden)
            parts = " ".join(f"{1e3 * seconds[part]:10.1f}" for part in PARTS)
            print(f"{way:>12} {hidden:7} {size / 1e6:8.1f} {parts} {size / 1e6 / seconds['update']:8.0f}", flush=True)


if __name__ == "__main__":
    main()
