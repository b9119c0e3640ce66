"""Rollout engines over real servers, beside the same model in transformers and in the local engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_megatron.config.options.engine import EngineOptions
from opd_megatron.data.column_arithmetic import build_tokenizer
from opd_megatron.rollout.engine import GenerateRequest, SamplingParams
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.rollout.sglang_fleet import SpokenModel
from opd_megatron.rollout.sglang_launch import ServedModel, server_launches
from opd_megatron.rollout.stop import end_token_ids
from opd_megatron.rollout.weight_check import probe_tokens
from opd_megatron.rollout.weight_folders import WeightFolders

REPOSITORY = Path(__file__).parents[2]
POSITIONS = 96


def sglang_python() -> str:
    """The interpreter of the environment that ``make test-sglang`` installs (OPD_SGLANG_VENV names another one)."""
    return str(REPOSITORY / os.environ.get("OPD_SGLANG_VENV", ".venv-sglang") / "bin" / "python")


def write_weights(named_tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """A folder with weights alone, which is all that an update reads."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in named_tensors}, folder / "model.safetensors")


class Speaker:
    """A Qwen3 with its tokenizer in ``folder``; :attr:`model` plays the trainer and may be changed by a test."""

    def __init__(self, folder: Path, *, seed: int = 0) -> None:
        self.folder = folder
        self.tokenizer = build_tokenizer(folder)
        torch.manual_seed(seed)
        self.config = Qwen3Config(
            vocab_size=len(self.tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=POSITIONS,
            tie_word_embeddings=True, initializer_range=0.25,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        self.model: Any = Qwen3ForCausalLM(self.config).eval()
        with torch.no_grad():
            self.model.get_input_embeddings().weight.normal_(0.0, 0.25)  # a row of zeros would magnify every step
        self.model.save_pretrained(folder)
        self.first = {name: tensor.clone() for name, tensor in self.weights()}
        self.served = ServedModel(folder, POSITIONS, "float32", seed=1)

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor.detach()) for name, tensor in self.model.state_dict().items() if name != "lm_head.weight"]

    def reset(self) -> None:
        """The trainer has the first weights again."""
        self.model.load_state_dict(self.first, strict=False)

    def step(self, size: float, seed: int = 1) -> None:
        """A little training: every weight moves by about ``size``."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += size * torch.randn(parameter.shape, generator=generator)

    def log_probs(self, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities of ``tokens[1:]`` by transformers."""
        with torch.no_grad():
            logits = self.model(torch.as_tensor(tokens)[None]).logits[0].double() / temperature
        return logits.log_softmax(-1)[:-1].gather(1, torch.as_tensor(tokens)[1:, None])[:, 0].numpy()

    def engine(self, log_folder: Path, servers: Sequence[Any] | None = None, **settings: Any) -> SGLangEngine:
        """An engine without weights; ``servers`` are those of one that is started unless given."""
        if servers is None:
            options = EngineOptions(sglang_python=sglang_python())
            servers = server_launches(options, self.served, log_folder, on_cpu=True)
        ends = end_token_ids(self.tokenizer, self.config, self.folder)
        folders = WeightFolders(log_folder / "weights", settings.pop("write", write_weights))
        return SGLangEngine(
            SpokenModel(self.folder, self.tokenizer, self.config.vocab_size, POSITIONS, ends, "float32"),
            servers,
            settings.pop("weights", None) or folders,
            probe=probe_tokens([], self.config.vocab_size, POSITIONS),
            reference=settings.pop("reference", self.log_probs),
            **{"timeout": 120.0, **settings},
        )

    def local(self) -> LocalEngine:
        """The local engine with the trainer's weights."""
        engine = LocalEngine(self.folder, self.tokenizer)
        engine.update_weights(self.weights(), "local")
        return engine

    def requests(self, count: int, sampling: SamplingParams, seed: int = 0) -> list[GenerateRequest]:
        """Random prompts of several lengths."""
        generator = np.random.default_rng(seed)
        lengths = generator.integers(1, 30, size=count)
        return [
            GenerateRequest(generator.integers(3, self.config.vocab_size, size=length), sampling, (7, place))
            for place, length in enumerate(lengths)
        ]
