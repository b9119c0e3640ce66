"""Where a resumed run stands in its learning-rate schedules when its options are not those it was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from opd_megatron.config.options import Options


def schedule_state(options: Options) -> dict[str, dict[str, int]]:
    """What the run state of a checkpoint holds for :func:`keep_place`: how the run counts optimizer steps."""
    counted = {"steps_per_rollout": options.steps_per_rollout}
    return {"schedule": counted | {"num_critic_only_steps": options.objective.num_critic_only_steps}}


def keep_place(
    scheduler: OptimizerParamScheduler, options: Options, run_state: Mapping[str, Any], *, of_critic: bool = False
) -> None:
    """Move a loaded schedule that lasts as long as the run to the part of the run that is done.

    A schedule counts optimizer steps. Where a rollout comes to have more or fewer of them, or other rollouts are the
    critic's alone, the count that was saved would end the decay before the last rollout, or long after it. Lengths in
    optimizer steps of the user's own stay that. With such a decay (``--lr-decay-iters``, ``--critic-lr-decay-iters``)
    and in such a warm-up (``--lr-warmup-iters``, ``--critic-lr-warmup-iters``) the count stays; a warm-up that is over
    is not entered again.
    """
    own, saved = options.objective, run_state.get("schedule")
    length = own.critic_lr_decay_iters if of_critic else options.optimizer.lr_decay_iters
    if saved is None or saved == schedule_state(options)["schedule"] or length is not None:
        return
    warmup = own.critic_lr_warmup_iters if of_critic else options.optimizer.lr_warmup_iters
    if scheduler.num_steps < warmup:
        return
    rollouts = scheduler.num_steps / saved["steps_per_rollout"]
    if not of_critic:
        done = run_state["rollouts"]
        rollouts += max(0, done - own.num_critic_only_steps) - max(0, done - saved["num_critic_only_steps"])
    scheduler.num_steps = max(warmup, round(rollouts * options.steps_per_rollout))
    scheduler.step(increment=0)  # gives the optimizer the rate of that place
