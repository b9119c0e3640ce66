"""Task rewards: verifiers by name and functions by import path."""

from opd_megatron.reward.base import RewardError, RewardFunction
from opd_megatron.reward.build import build_reward

__all__ = ["RewardError", "RewardFunction", "build_reward"]
