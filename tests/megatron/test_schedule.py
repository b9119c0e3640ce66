"""A warm-up in optimizer steps lasts for those steps, whatever a rollout comes to have."""

from __future__ import annotations

import pytest
import torch

from opd_megatron.config.options import Options
from opd_megatron.config.parse import parse_options
from opd_megatron.megatron.optimizer import build_scheduler
from opd_megatron.megatron.schedule import keep_place, schedule_state


def options_of(steps_per_rollout: int) -> Options:
    flags = f"--rollout-batch-size 20 --global-batch-size {20 // steps_per_rollout} --lr 1e-4 --lr-warmup-iters 100"
    return parse_options([*flags.split(), "--critic-lr-warmup-iters", "100"])


@pytest.mark.parametrize("of_critic", [False, True])
@pytest.mark.parametrize(
    ("rollouts", "before", "after", "count", "rate"),
    [
        (10, 20, 2, 100, 1e-4),  # 20 steps of the new kind, and the warm-up is over
        (5, 2, 20, 10, 1e-5),  # 100 steps of the new kind, of which 10 were taken
        (60, 2, 20, 1200, 1e-4),
        (100, 20, 2, 200, 1e-4),
    ],
)
def test_a_warm_up_in_steps_is_neither_repeated_nor_skipped(
    of_critic: bool, rollouts: int, before: int, after: int, count: int, rate: float
) -> None:
    options = options_of(after)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    scheduler = build_scheduler(optimizer, options.optimizer, 100_000, 100)  # type: ignore[arg-type]
    scheduler.step(increment=rollouts * before)
    keep_place(scheduler, options, schedule_state(options_of(before)) | {"rollouts": rollouts}, of_critic=of_critic)
    assert scheduler.num_steps == count
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=0.02)
