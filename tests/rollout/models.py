"""Tiny models and a tokenizer for the rollout's tests; the reference is always transformers' own model."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from opd_megatron.rollout.local import LocalEngine
from tests.support.models import FAMILIES as FAMILIES
from tests.support.models import MIXTURES as MIXTURES
from tests.support.models import family_config
from tests.support.models import reference_model as reference_model

CHARACTERS = "0123456789+-=,; " + string.ascii_lowercase
PAD, EOS, TURN = "<pad>", "<eos>", "<turn>"
VOCAB_SIZE = 3 + len(CHARACTERS)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and three special tokens with the ids 0, 1 and 2."""
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, TURN, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, additional_special_tokens=[TURN]
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: id 0 is the end token, the 256 bytes follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOS: 0} | {symbol: index + 1 for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A model that speaks the characters; the original context of the tiny Llama is 32 positions."""
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    settings = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.3, **ends, **overrides}
    return family_config(family, original_context=32, **settings)


def engine_with(model: Any, tokenizer: Any = None, **settings: Any) -> LocalEngine:
    """A local engine that speaks with the weights of ``model``."""
    engine = LocalEngine(model.config, tokenizer or character_tokenizer(), **settings)
    engine.update_weights(stored_weights(model).items(), "first")
    return engine


def stored_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model under the names that transformers stores them by, experts one by one."""
    names = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        if any(".experts." in name for name in names):
            model.save_pretrained(folder)
            return load_file(Path(folder) / "model.safetensors")
    return names
