"""What the ranks do in the layout tests of the critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_megatron.config.resolve import StartingPoint, resolve_step
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import Values
from tests.megatron.critic_support import critic_gradients, give_head, judged_samples
from tests.megatron.support import GRADIENT_FLAGS, make_samples, make_spec
from tests.parallel.work import TRAINING

PPO: dict[str, Any] = {"advantage_estimator": "ppo"}
OF_CRITIC = ("train/value_loss", "train/value_clipfrac", "train/critic_grad_norm", "train/grad_norm")


def critic_step(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], target: Path
) -> tuple[dict[int, Any], dict[str, float], dict[str, Tensor]]:
    """The critic's values, and metrics and gradients of its first step; two micro-batches and a clipped loss."""
    settings = PPO | GRADIENT_FLAGS | {"value_clip": 0.3} | flags
    trainer = MegatronTrainer(make_spec(folder, **settings), rendezvous)
    give_head(trainer)
    values = trainer.ask(Values(), make_samples(1))
    metrics, gradients = critic_gradients(trainer, judged_samples(1), target, folder)
    return values, {name: metrics[name] for name in OF_CRITIC if name in metrics}, gradients


def critic_run(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], rollouts: range, target: Path, source: Path | None
) -> list[dict[str, float] | None]:
    """Metrics of ``rollouts``, after each of which both models are saved in ``target``; the first trains no student.

    They go on from the checkpoint in ``source`` if there is one.
    """
    settings = TRAINING | PPO | {"critic_lr": 5e-3, "num_critic_only_steps": 1, "global_batch_size": 6} | flags
    if source is not None:
        settings |= {"start": StartingPoint("load", resolve_step(source))}
    trainer = MegatronTrainer(make_spec(folder, **settings), rendezvous)
    if source is not None:
        state = trainer.resume()
        assert state is not None
        assert state["rollouts"] == rollouts.start
    found = []
    for number in rollouts:
        found.append(trainer.train(judged_samples(number), rollout_id=number).metrics)
        trainer.save(target, number + 1, folder, {"rollouts": number + 1})
    torch.distributed.barrier()
    return found
