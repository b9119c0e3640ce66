"""A small random model and the real server for it, for benchmarks that bring no model of their own."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_megatron.data.column_arithmetic import build_tokenizer
from opd_megatron.servers import local_server

LAUNCHER = Path(__file__).parents[2] / "tools" / "sglang_cpu" / "launch.py"
CONTEXT = 512


def make_model(folder: Path, *, vocab_size: int, hidden: int, layers: int, seed: int) -> Path:
    """A random Qwen3 with the tokenizer of the column arithmetic, whose tokens are the first of the vocabulary."""
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=max(vocab_size, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def served(python: str, model: Path, log: Path) -> Iterator[str]:
    """The address of a server of ``model``, started by the interpreter of the SGLang environment.

    It ends with the block, also when this process is told to stop.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    command = [python, str(LAUNCHER), "--model-path", str(model), "--port", "{port}"]
    with local_server(command, log_path=log) as server:
        yield server.url
