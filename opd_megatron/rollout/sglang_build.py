"""From a run's options to its engine over SGLang servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from opd_megatron.config.options import EngineOptions, Options
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.rollout.sglang_fleet import SpokenModel, Weights
from opd_megatron.rollout.sglang_launch import ServedModel, server_launches
from opd_megatron.rollout.sglang_server import Launch
from opd_megatron.rollout.stop import end_token_ids
from opd_megatron.rollout.weight_broadcast import BroadcastWeights
from opd_megatron.rollout.weight_check import PROBE_TEXT, probe_tokens
from opd_megatron.rollout.weight_folders import WeightFolders, WriteFolder


def sglang_engine(
    options: Options,
    hf_folder: Path,
    tokenizer: Any,
    *,
    write: WriteFolder,
    reference: Callable[[np.ndarray], np.ndarray],
    on_cpu: bool,
) -> SGLangEngine:
    """An engine whose servers are starting, or run already; ``hf_folder`` has the student's config and tokenizer.

    ``write`` writes weights as a Hugging Face folder; ``reference`` are the trainer's log-probabilities (see
    :class:`SGLangEngine`). Raises :class:`UserError` where servers cannot be started.
    """
    config = AutoConfig.from_pretrained(hf_folder)
    dtype = "bfloat16" if options.optimizer.bf16 else "float32"
    positions = int(config.max_position_embeddings)
    folder = options.run_folder / "engine"
    servers: Sequence[Launch | str] = options.engine.rollout_engine_url
    if not servers:
        served = ServedModel(hf_folder.resolve(), positions, dtype, options.training.seed)
        servers = server_launches(options.engine, served, folder, on_cpu=on_cpu)
    ends = end_token_ids(tokenizer, config, hf_folder)
    text_ids = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    return SGLangEngine(
        SpokenModel(hf_folder, tokenizer, int(config.vocab_size), positions, ends, dtype),
        servers,
        weights_on_their_way(options.engine, folder, write, on_cpu=on_cpu),
        probe=probe_tokens(text_ids, int(config.vocab_size), positions),
        reference=reference,
        timeout=options.engine.rollout_engine_timeout,
        max_in_flight=options.engine.rollout_engine_max_in_flight,
        free_memory=options.engine.sglang_free_memory,
        api_key_env=options.engine.rollout_engine_api_key_env,
    )


def weights_on_their_way(options: EngineOptions, folder: Path, write: WriteFolder, *, on_cpu: bool) -> Weights:
    """The way of new weights that ``--rollout-weight-transfer`` names; ``folder`` is used where no other is named."""
    way = options.rollout_weight_transfer
    if way == "auto":
        way = "disk" if on_cpu or options.rollout_weights_dir is not None else "distributed"
    if way == "distributed":
        return BroadcastWeights(options.rollout_engine_timeout)
    return WeightFolders(folder if options.rollout_weights_dir is None else Path(options.rollout_weights_dir), write)
