"""Weights and masks for samples of another policy, and the statistics of how different it is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.corrections import importance_weights, off_policy_mask
from opd_megatron.objectives.mismatch import mismatch_statistics
from opd_megatron.objectives.sequences import Sequences

MASK_N = torch.tensor([True, True, False, True, True])
SEQUENCES = Sequences(torch.tensor([0, 0, 0, 1, 1]), 2)
RATIOS_N = torch.tensor([0.5, 3.0, 100.0, 1.0, 4.0], dtype=torch.float64)
ROLLOUT_N = torch.full((5,), -2.0, dtype=torch.float64)
OLD_N = ROLLOUT_N + RATIOS_N.log()


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "truncate", [0.8, 2.0, 1.0, 1.0, 2.0]),
        ("token", "mask", [0.0, 0.0, 1.0, 1.0, 0.0]),
        ("sequence", "truncate", [1.5, 1.5, 1.5, 2.0, 2.0]),
        ("sequence", "mask", [1.5, 1.5, 1.5, 0.0, 0.0]),
    ],
)
def test_weights_outside_the_bounds_are_limited_or_dropped(level: str, mode: str, expected: list[float]) -> None:
    options = ObjectiveOptions(tis_level=level, tis_mode=mode, tis_clip=2.0, tis_clip_low=0.8)
    spoiled_N = torch.where(MASK_N, OLD_N, math.nan)
    weight_N, outside_N = importance_weights(spoiled_N.requires_grad_(), ROLLOUT_N, MASK_N, SEQUENCES, options)
    torch.testing.assert_close(weight_N, torch.tensor(expected, dtype=torch.float64))
    assert not weight_N.requires_grad
    unbounded = replace(options, tis_clip=1e9, tis_clip_low=0.0)
    plain_N, _ = importance_weights(OLD_N, ROLLOUT_N, MASK_N, SEQUENCES, unbounded)
    torch.testing.assert_close(outside_N, (plain_N < 0.8) | (plain_N > 2.0))


def test_sums_are_completed_by_the_ranks_that_share_the_responses() -> None:
    """Two ranks with every other token, each given the other's sums, see what one rank with all tokens sees."""
    options = ObjectiveOptions(tis_level="sequence", tis_clip=1e9)
    whole_N, _ = importance_weights(OLD_N, ROLLOUT_N, MASK_N, SEQUENCES, options)
    places = [torch.tensor([0, 2, 4]), torch.tensor([1, 3])]
    logs_N = torch.where(MASK_N, RATIOS_N.log(), 0.0)
    for mine, others in (places, places[::-1]):
        other_sums = torch.zeros(2, dtype=torch.float64).index_add_(0, SEQUENCES.of_N[others], logs_N[others])
        part = Sequences(SEQUENCES.of_N[mine], 2, lambda sums, more=other_sums: sums + more)
        found_N, _ = importance_weights(OLD_N[mine], ROLLOUT_N[mine], MASK_N[mine], part, options)
        torch.testing.assert_close(found_N, whole_N[mine])


def test_only_negative_tokens_of_abandoned_responses_are_left_out() -> None:
    log_probs_N = OLD_N - torch.tensor([0.3, 0.1, -50.0, -0.4, 0.0], dtype=torch.float64)
    advantages_N = torch.tensor([-1.0, 2.0, -1.0, -1.0, -1.0])
    left_out_N = off_policy_mask(log_probs_N, OLD_N, advantages_N, MASK_N, SEQUENCES, 0.19)
    # the first response has drifted by a mean of 0.2 nats, the second has become more probable
    assert left_out_N.tolist() == [True, False, True, False, False]
    assert not off_policy_mask(log_probs_N, OLD_N, advantages_N, MASK_N, SEQUENCES, 0.21).any()


def test_statistics_of_the_mismatch_are_those_of_known_ratios() -> None:
    rollout = [np.array([-2.0, -2.0, np.nan]), np.array([-2.0, -2.0]), np.zeros(0)]
    trainer = [np.array([-2.0 + math.log(0.5), -2.0 + math.log(3.0), -1.0]), np.array([-2.0, -2.0 + math.log(4.0)])]
    masks = [np.array([True, True, False]), np.array([True, True]), np.zeros(0, dtype=bool)]
    got = mismatch_statistics(rollout, [*trainer, np.zeros(0)], masks, ObjectiveOptions(tis_clip_low=0.8))
    tokens, sequences = [0.5, 3.0, 1.0, 4.0], [1.5, 4.0]
    for prefix, ratios, outside in (
        ("rollout/mismatch", tokens, 3 / 4),
        ("rollout/mismatch_sequence", sequences, 1 / 2),
    ):
        assert got[f"{prefix}_ratio_mean"] == pytest.approx(np.mean(ratios))
        assert got[f"{prefix}_ratio_max"] == pytest.approx(max(ratios))
        assert got[f"{prefix}_k3"] == pytest.approx(np.mean([w - 1 - math.log(w) for w in ratios]))
        assert got[f"{prefix}_outside_frac"] == pytest.approx(outside)
    assert len(got) == 8
    assert mismatch_statistics([np.zeros(1)], [np.zeros(1)], [np.zeros(1)], ObjectiveOptions()) == {}
