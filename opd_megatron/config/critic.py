"""What follows from the options of the critic: whether there is one, its optimizer and the length of its schedule."""

from __future__ import annotations

import dataclasses

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import OptimizerOptions, Options


def has_critic(options: Options) -> bool:
    """Whether the objective has values to learn."""
    objective = options.objective
    return (
        objective.loss_type == "policy_loss"
        and objective.advantage_estimator == "ppo"
        and objective.custom_advantage_path is None
    )


def critic_optimizer(options: Options) -> OptimizerOptions:
    """The student's optimizer with the critic's rates and clipping."""
    student, own = options.optimizer, options.objective
    return dataclasses.replace(
        student,
        lr=student.lr if own.critic_lr is None else own.critic_lr,
        min_lr=student.min_lr if own.critic_min_lr is None else own.critic_min_lr,
        lr_decay_style=own.critic_lr_decay_style or student.lr_decay_style,
        clip_grad=student.clip_grad if own.critic_clip_grad is None else own.critic_clip_grad,
    )


def critic_schedule_steps(options: Options, num_rollouts: int) -> tuple[int, int]:
    """(decay, warm-up) of the critic's learning rate in optimizer steps; it learns from every rollout.

    Raises :class:`UserError` if the warm-up does not end before the decay does, or no rollout is left to the student.
    """
    own = options.objective
    if own.num_critic_only_steps >= num_rollouts:
        raise UserError(
            f"--num-critic-only-steps {own.num_critic_only_steps} leaves none of the {num_rollouts} rollouts to the "
            "student: lower it, or make the run longer"
        )
    decay = own.critic_lr_decay_iters or num_rollouts * options.steps_per_rollout
    if own.critic_lr_warmup_iters >= decay:
        raise UserError(
            f"--critic-lr-warmup-iters {own.critic_lr_warmup_iters} must be shorter than the decay of {decay} "
            "optimizer steps (--critic-lr-decay-iters, or else the whole run)"
        )
    return decay, own.critic_lr_warmup_iters
