"""Weights of prompts and responses: proofs by enumeration in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_megatron.objectives.sample_weights import (
    counted_samples,
    group_means,
    group_numbers,
    paced_weights,
    reward_weights,
)


@pytest.mark.parametrize("samples", [4, 7])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.85])
def test_the_corrected_estimate_of_the_variance_of_a_pass_is_unbiased(samples: int, rate: float) -> None:
    """``E[p (1 - p) n / (n - 1)]`` over all numbers of passes of n samples; the plain estimate is (n - 1) / n of it."""
    expected = plain = 0.0
    for passes in range(samples + 1):
        chance = math.comb(samples, passes) * rate**passes * (1 - rate) ** (samples - passes)
        p = passes / samples
        # beside a prompt of weight 1/4 (p = 1/2, many samples) the mean is known, and the weight without it, too
        pair = paced_weights(
            torch.tensor([p, 0.5], dtype=torch.float64), samples_P=torch.tensor([samples, 1e18], dtype=torch.float64)
        )
        expected += chance * float(pair[0] / pair[1]) / 4
        plain += chance * p * (1 - p)
    assert expected == pytest.approx(rate * (1 - rate), abs=1e-10)
    assert plain == pytest.approx(rate * (1 - rate) * (samples - 1) / samples, abs=1e-10)


@given(
    st.lists(st.integers(0, 16).map(lambda passes: passes / 16), min_size=1, max_size=8),
    st.floats(0.0, 3.0),
    st.floats(0.0, 3.0),
    st.randoms(use_true_random=False),
)
def test_paced_weights_have_mean_one_and_follow_their_prompts(rates: list, alpha: float, beta: float, random) -> None:
    rates_P = torch.tensor(rates, dtype=torch.float64)
    weights_P = paced_weights(rates_P, alpha=alpha, beta=beta)
    raw = [p**alpha * (1 - p) ** beta for p in rates]
    if sum(raw) > 0:
        assert float(weights_P.mean()) == pytest.approx(1.0, rel=1e-9)
        expected = [value / (sum(raw) / len(raw)) for value in raw]
        assert weights_P.tolist() == pytest.approx(expected, rel=1e-9)
    else:
        assert not weights_P.any()
    order = list(range(len(rates)))
    random.shuffle(order)
    torch.testing.assert_close(paced_weights(rates_P[order], alpha=alpha, beta=beta), weights_P[order])


def test_large_powers_leave_the_prompt_with_the_largest_weight() -> None:
    assert paced_weights(torch.tensor([0.25, 0.5]), alpha=1e5).tolist() == pytest.approx([0.0, 2.0])
    assert paced_weights(torch.tensor([0.25, 0.5]), beta=1e5).tolist() == pytest.approx([2.0, 0.0])


def test_prompts_that_are_always_or_never_solved_weigh_nothing() -> None:
    assert paced_weights(torch.tensor([0.0, 1.0, 1.0])).tolist() == [0.0, 0.0, 0.0]
    assert paced_weights(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.0, 3.0, 0.0])
    # without one of the powers the prompt of that end keeps its weight
    assert paced_weights(torch.tensor([0.0, 1.0]), alpha=0.0).tolist() == pytest.approx([2.0, 0.0])


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5.0, 5.0)), min_size=1, max_size=12), st.floats(0.05, 50.0))
def test_reward_weights_are_a_softmax_of_mean_one(samples: list, beta: float) -> None:
    groups, rewards = zip(*samples, strict=True)
    weights_B = reward_weights(torch.tensor(rewards, dtype=torch.float64), groups, beta)
    for group in set(groups):
        places = [place for place, other in enumerate(groups) if other == group]
        logits = torch.tensor([rewards[place] for place in places], dtype=torch.float64) / beta
        torch.testing.assert_close(weights_B[places], len(places) * logits.softmax(0), rtol=1e-9, atol=1e-12)
        assert float(weights_B[places].mean()) == pytest.approx(1.0, rel=1e-9)


def test_a_softmax_without_a_width_is_none() -> None:
    with pytest.raises(ValueError, match="not above 0"):
        reward_weights(torch.ones(2), [0, 0], 0.0)


def test_groups_are_numbered_in_their_order_and_may_be_uneven() -> None:
    numbers_B, prompts = group_numbers([7, 3, 7, 9])
    assert (numbers_B.tolist(), prompts) == ([0, 1, 0, 2], 3)
    means_P, counts_P = group_means(torch.tensor([1.0, 4.0, 2.0, 0.0]), [7, 3, 7, 9])
    assert (means_P.tolist(), counts_P.tolist()) == ([1.5, 4.0, 0.0], [2.0, 1.0, 1.0])


def test_masks_leave_out_what_they_name() -> None:
    rewards_B = torch.tensor([1.0, 0.0, 1.0, 0.5])
    truncated_B = torch.tensor([False, True, True, False])
    lengths_B = torch.tensor([3, 9, 5, 12])

    def counted(**masks: object) -> list[bool]:
        found: list[bool] = counted_samples(rewards_B, truncated_B, lengths_B, **masks).tolist()  # type: ignore[arg-type]
        return found

    assert counted() == [True] * 4
    assert counted(on="correct") == [True, False, True, False]
    assert counted(on="incorrect") == [False, True, False, True]
    assert counted(on="correct", pass_above=0.4) == [True, False, True, True]
    assert counted(mask_truncated=True) == [True, False, False, True]
    assert counted(longest=9) == [True, True, True, False]
    assert counted(on="incorrect", mask_truncated=True, longest=9) == [False] * 4
