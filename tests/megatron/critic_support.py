"""Samples that a critic learns from, and what can be seen of the critic itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd_megatron.megatron.critic import Critic
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.sample import Sample
from tests.megatron.support import LINEAR_STEP, VOCAB_SIZE, make_samples, stored_tensors


def critic_of(trainer: MegatronTrainer) -> Critic:
    assert trainer.critic is not None
    return trainer.critic


def judged_samples(seed: int) -> list[Sample]:
    """Samples with values and returns; masked tokens have none."""
    random, samples = np.random.default_rng(seed), make_samples(seed)
    for sample in samples:
        values, returns = random.normal(size=(2, sample.response_length))
        sample.values = np.where(sample.loss_mask, 0.5 * values, np.nan)
        sample.returns = np.where(sample.loss_mask, returns, np.nan)
        sample.validate()
    return samples


def head_numbers(hidden: int) -> tuple[Tensor, Tensor]:
    """A head that has learned something, ``[1, h]`` and ``[1]`` float32."""
    numbers = torch.randn(hidden + 1, generator=torch.Generator().manual_seed(3))
    return numbers[None, :-1] / hidden**0.5, numbers[-1:]


@torch.no_grad()
def give_head(trainer: MegatronTrainer) -> None:
    """Let the critic expect something, so that its whole decoder has a gradient."""
    model = critic_of(trainer).chunks[-1]
    if model.post_process:
        weight, bias = head_numbers(model.config.hidden_size)
        model.value_head.weight.copy_(weight)
        model.value_head.bias.copy_(bias)


def without_padding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with as many rows in vocabularies as there are tokens; layouts pad them differently."""
    return {
        name: tensor[:VOCAB_SIZE] if "word_embeddings" in name or "output_layer" in name else tensor
        for name, tensor in tensors.items()
    }


def critic_gradients(
    trainer: MegatronTrainer, samples: Sequence[Sample], folder: Path, hf_folder: Path
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and the critic's gradients of one step of a trainer built with ``GRADIENT_FLAGS``, by stored name.

    They come from checkpoints before and after it in ``folder``; only the first rank reads them.
    """
    trainer.save(folder, 1, hf_folder, {})
    metrics = trainer.train(samples).metrics or {}
    trainer.save(folder, 2, hf_folder, {})
    if torch.distributed.get_rank() > 0:
        return metrics, {}
    before, after = (without_padding(stored_tensors(folder / f"iter_{step:07d}")) for step in (1, 2))
    names = [name for name in before if name.startswith("critic.") and ".optimizer." not in name]
    return metrics, {name: (before[name].double() - after[name].double()) / LINEAR_STEP for name in names}
