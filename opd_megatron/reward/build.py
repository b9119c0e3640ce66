"""From options to a reward."""

from __future__ import annotations

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import RewardOptions
from opd_megatron.config.user_code import load_function
from opd_megatron.reward.base import CheckedReward, PerSample, Rater, RewardFunction
from opd_megatron.reward.custom import CustomRater
from opd_megatron.reward.mathematics import MathRater
from opd_megatron.reward.text import exact, gsm8k, zero

TASK_REWARDS = {"column_arithmetic": "opd_megatron.data.column_arithmetic:reward"}
"""Rewards that live with the task they belong to, by import path."""


def build_reward(options: RewardOptions) -> RewardFunction:
    """The reward that ``--rm-type`` or ``--custom-rm-path`` names.

    Raises :class:`UserError` if neither or both are given, or if the import path leads to no function.
    """
    return CheckedReward(_build_rater(options), options.rm_on_error, options.rm_error_value)


def _build_rater(options: RewardOptions) -> Rater:
    name, path = options.rm_type, options.custom_rm_path
    if name is not None and path is not None:
        raise UserError("--rm-type and --custom-rm-path name two rewards: give one")
    if path is not None:
        return CustomRater(load_function(path, "--custom-rm-path"))
    if name == "math":
        return MathRater(options.rm_timeout)
    if name in TASK_REWARDS:
        return PerSample(load_function(TASK_REWARDS[name], "--rm-type"))
    functions = {"exact": exact, "gsm8k": gsm8k, "zero": zero}
    if name in functions:
        return PerSample(functions[name])
    if name is None:
        raise UserError("no reward: give --rm-type (zero for none) or --custom-rm-path")
    raise UserError(f"--rm-type {name} is not known: {', '.join(sorted([*functions, *TASK_REWARDS, 'math']))}")
