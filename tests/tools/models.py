"""Tiny models in Hugging Face folders, and what transformers says about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.rollout.models import VOCAB_SIZE, character_tokenizer, reference_model, tiny_config

ODD_VOCABULARY = 301

CASES: dict[str, tuple[str, bool, int, torch.dtype]] = {
    "qwen2_untied": ("qwen2", False, ODD_VOCABULARY, torch.float32),
    "qwen2_tied": ("qwen2", True, VOCAB_SIZE, torch.bfloat16),
    "qwen3_tied": ("qwen3", True, ODD_VOCABULARY, torch.float32),
    "qwen3_untied": ("qwen3", False, 128, torch.bfloat16),
    "llama_untied": ("llama", False, ODD_VOCABULARY, torch.bfloat16),
    "llama_tied": ("llama", True, VOCAB_SIZE, torch.float32),
}
"""Family, tied embeddings, vocabulary and data type by name; Llama's original context is 32 positions."""


def write_model(
    folder: Path,
    family: str = "qwen3",
    tied: bool = True,
    vocab_size: int = VOCAB_SIZE,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **settings: Any,
) -> Path:
    """A random model with a tokenizer as transformers saves them."""
    settings = {"initializer_range": 0.15, "tie_word_embeddings": tied, "vocab_size": vocab_size} | settings
    config = tiny_config(family, **settings)
    reference_model(config, seed, dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    character_tokenizer().save_pretrained(folder)
    return folder


def token_lines(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random ids; the first line starts with the last id of the vocabulary."""
    generator = np.random.default_rng(seed)
    lines = [generator.integers(0, vocab_size, length).tolist() for length in lengths]
    lines[0][:2] = [vocab_size - 1, vocab_size - 1]
    return lines


def write_lines(path: Path, lines: Sequence[Sequence[int]]) -> Path:
    path.write_text("".join(json.dumps({"tokens": list(tokens)}) + "\n" for tokens in lines))
    return path


def read_log_probs(path: Path) -> list[list[float]]:
    return [json.loads(line)["log_probs"] for line in path.read_text().splitlines()]


@torch.no_grad()
def reference_log_probs(folder: Path, lines: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
    """Log-probabilities of the tokens 2 to L by transformers in float32, normalised in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for tokens in lines:
        ids = torch.tensor(tokens)
        logits = model(ids[None]).logits[0, :-1].double() / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy())
    return found


def largest_difference(found: Sequence[Sequence[float]], expected: Sequence[np.ndarray]) -> float:
    """Over all tokens; the lengths must agree."""
    assert [len(values) for values in found] == [len(values) for values in expected]
    return max(
        (float(np.abs(np.array(a) - b).max()) for a, b in zip(found, expected, strict=True) if len(b)), default=0.0
    )
