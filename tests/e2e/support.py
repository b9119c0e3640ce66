"""Small models, prompts and runs of train.py in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

import train
from opd_megatron.data.column_arithmetic import build_tokenizer, sample_problems
from opd_megatron.observe.run_folder import read_metrics

VOCABULARY = 18


def make_model(
    folder: Path,
    *,
    seed: int,
    hidden: int = 32,
    layers: int = 2,
    experts: int = 0,
    weights: bool = True,
    std: float = 0.3,
    vocabulary: int = VOCABULARY,
    positions: int = 64,
) -> Path:
    """A random Qwen3 of the column-arithmetic vocabulary with its tokenizer as a Hugging Face folder.

    With ``experts`` it is a mixture of so many, two for each token. An embedding of a larger ``vocabulary`` than the
    tokenizer's has rows that no token uses.
    """
    mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
    config = (Qwen3MoeConfig if experts else Qwen3Config)(
        **(mixture if experts else {}),
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=std,
    )
    torch.manual_seed(seed)
    if weights:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    build_tokenizer(folder)
    return folder


def write_prompts(path: Path, count: int, seed: int) -> Path:
    """Column-arithmetic prompts with their answers."""
    rows = [{"prompt": p.prompt(), "label": p.answer()} for p in sample_problems(count, seed, held_out=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def base_arguments(student: Path, prompts: Path, run_dir: Path, **changes: Any) -> list[str]:
    """Arguments of a short run; ``changes`` are options by name, True for a switch, None to leave one out."""
    options: dict[str, Any] = {
        "hf_checkpoint": student,
        "prompt_data": prompts,
        "run_dir": run_dir,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "num_rollout": 3,
        "rollout_max_response_len": 12,
        "micro_batch_size": 4,
        "rm_type": "zero",
        "lr": 1e-3,
        "lr_decay_style": "linear",
        "no_tensorboard": True,
        "rollout_shuffle": True,
        "seed": 5,
        **changes,
    }
    arguments: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        values = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [flag, *map(str, values)]
    return arguments


def run_training(student: Path, prompts: Path, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run in this process; the lines of metrics.jsonl."""
    train.main(base_arguments(student, prompts, run_dir, **changes))
    return read_metrics(run_dir / "metrics.jsonl")


def check_resumed(
    student: Path, prompts: Path, folder: Path, straight: list[dict[str, Any]], names: Sequence[str], **options: Any
) -> None:
    """Go on from step 2 of the run in ``folder/straight`` and compare ``names`` of its metrics, to the last bit."""
    changed = {**options, "ckpt_step": 2, "load": folder / "straight" / "checkpoints"}
    resumed = run_training(student, prompts, folder / "other", **changed)
    assert len(resumed) == len(straight) - 2
    for one, two in zip(straight[2:], resumed, strict=True):
        for name in names:
            assert one[name] == two[name]
