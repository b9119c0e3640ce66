"""Options of the critic that have no critic, or contradict one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from opd_megatron.config.checkpoint_paths import resolve_step
from opd_megatron.config.critic import critic_optimizer, critic_schedule_steps, has_critic
from opd_megatron.config.errors import UserError
from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import Options
from opd_megatron.config.options.critic import CriticOptions
from opd_megatron.config.resolve import has_reward


def critic_faults(options: Options) -> Iterator[str]:
    """Every fault of the critic's options."""
    if not has_critic(options):
        for item in dataclasses.fields(CriticOptions):
            if item.name in options.given:
                yield f"{flag_of(item.name)} has no effect without --advantage-estimator ppo: leave it out"
        return
    objective = options.objective
    if objective.kl_coef == 0 and not has_reward(options):
        yield (
            "--advantage-estimator ppo has nothing to value with --rm-type zero: use --advantage-estimator none, which "
            "trains no critic"
        )
    yield from _load_faults(objective.critic_load)
    yield from _rate_faults(options)


def _load_faults(folder: str | None) -> Iterator[str]:
    if folder is None:
        return
    if not Path(folder).is_dir():
        yield f"--critic-load {folder} is no folder: name that of a checkpoint"
        return
    try:
        resolve_step(folder)
    except UserError as error:
        yield f"--critic-load {error}"


def _rate_faults(options: Options) -> Iterator[str]:
    settings, given = critic_optimizer(options), options.given
    if settings.min_lr > settings.lr and given & {"critic_lr", "critic_min_lr"}:
        yield f"--critic-min-lr {settings.min_lr:g} is above --critic-lr {settings.lr:g}"
    if settings.lr_warmup_init > settings.lr and "critic_lr" in given:
        yield f"--lr-warmup-init {settings.lr_warmup_init:g} is above --critic-lr {settings.lr:g}"
    length = options.data.num_rollout
    if options.rollout.rollout_batch_size is not None and length is not None and options.steps_per_rollout:
        try:
            critic_schedule_steps(options, length)
        except UserError as error:
            yield str(error)
