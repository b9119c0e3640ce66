"""The weights of a rollout: what each option makes of them, and that nothing but the rollout decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from opd_megatron.flow.masking import leave_out_failed
from opd_megatron.flow.weighting import OpdWeighting, check_pass_rates
from opd_megatron.objectives.diagnostics import OF_CHOICE, OF_STUDENT
from opd_megatron.sample import Sample, Status
from tests.megatron.support import make_options, make_samples

PACED: dict[str, Any] = {"opd_prompt_weight": "paced"}


def weighting(special: Sequence[int] = (), **flags: Any) -> OpdWeighting:
    return OpdWeighting(make_options(rollout_batch_size=12, use_opd=True, **flags), special)


def answers_of(samples: Sequence[Sample]) -> list[np.ndarray]:
    """Random ones that belong to the samples, whatever their order."""
    found = []
    for sample in samples:
        random = np.random.default_rng(100 + sample.index)
        of_token = [(name, np.float32) for name in (*OF_STUDENT, *OF_CHOICE)]
        found.append(random.random((sample.response_length, len(of_token)), dtype=np.float32).view(of_token)[:, 0])
    return found


def weights_of(samples: Sequence[Sample]) -> dict[int, np.ndarray]:
    return {sample.index: sample.opd_weights for sample in samples if sample.opd_weights is not None}


def scored(samples: Sequence[Sample]) -> np.ndarray:
    parts = [s.loss_mask & s.teacher_scores.valid_T for s in samples if s.teacher_scores is not None]
    return np.concatenate(parts)


def test_without_an_option_no_sample_gets_weights() -> None:
    samples = make_samples(3)
    assert weighting().apply(samples, 0) == {}
    assert weights_of(samples) == {}


def test_paced_weights_have_mean_one_over_the_prompts_of_the_rollout() -> None:
    """Whatever the size of an optimizer step: they are not made anew for each."""
    for global_batch_size in (12, 6, 3):
        samples = make_samples(3)
        for sample, reward in zip(samples, [1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0], strict=True):
            sample.reward = float(reward)
        found = weighting(global_batch_size=global_batch_size, **PACED).apply(samples, 0)
        raw = np.array([2 / 9, 0, 2 / 9, 0])
        expected = raw / raw.mean()
        for sample in samples:
            np.testing.assert_allclose(sample.opd_weights, expected[sample.group_index], rtol=1e-6)
        assert found["opd/pass_rate"] == pytest.approx((1 / 3 + 1 + 1 / 3 + 0) / 4)


def test_prompts_that_teach_nothing_silence_the_teacher_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    samples = make_samples(3)
    for sample in samples:
        sample.reward = 0.0
    with caplog.at_level(logging.WARNING):
        found = weighting(**PACED).apply(samples, 7)
    assert "rollout 7: every prompt has weight 0" in caplog.text
    assert found["opd/token_kept_frac"] == found["opd/weight_ess"] == 0.0
    assert not any(weights.any() for weights in weights_of(samples).values())


def test_a_running_pass_rate_counts_all_rollouts_and_survives_a_resume() -> None:
    options: dict[str, Any] = {**PACED, "opd_pass_rate": "running"}
    whole, first = weighting(**options), weighting(**options)

    def rollout(rewards: Sequence[float]) -> list[Sample]:
        samples = make_samples(3)
        for sample, reward in zip(samples, rewards, strict=True):
            sample.reward = reward
        return samples

    rewards = [[1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1]]
    for number in (0, 1):
        samples = rollout(rewards[number])
        if number == 0:
            whole.apply(samples, 0)
            first.apply(rollout(rewards[0]), 0)
    resumed = weighting(**options)
    resumed.load_state_dict(first.state_dict())
    again = rollout(rewards[1])
    whole.apply(samples, 1)
    assert resumed.apply(again, 1)["opd/pass_rate"] == pytest.approx((4 / 6 + 5 / 6 + 0 + 1 / 6) / 4)
    rates = np.array([4 / 6, 5 / 6, 0, 1 / 6])
    expected = rates * (1 - rates) / (rates * (1 - rates)).mean()
    for one, two in zip(samples, again, strict=True):
        np.testing.assert_array_equal(one.opd_weights, two.opd_weights)
        np.testing.assert_allclose(one.opd_weights, expected[one.group_index], rtol=1e-6)
    assert resumed.state_dict() == whole.state_dict()


def test_a_pass_rate_in_the_metadata_is_taken_as_it_is_and_must_be_there() -> None:
    options: dict[str, Any] = {**PACED, "opd_pass_rate": "metadata", "opd_pass_rate_key": "rate"}
    samples = make_samples(3)
    for sample in samples:
        sample.metadata = {"rate": (0.5, 0.25, 1, 0)[sample.group_index]}
    weighting(opd_paced_beta=0.0, **options).apply(samples, 0)
    for sample in samples:
        np.testing.assert_allclose(sample.opd_weights, (0.5, 0.25, 1, 0)[sample.group_index] / 0.4375, rtol=1e-6)
    made = make_options(use_opd=True, **options)
    check_pass_rates(made, [{"rate": 0.3}, {"rate": 1}], "prompts")
    for bad in ({}, {"rate": None}, {"rate": "0.5"}, {"rate": 1.5}, {"rate": True}, {"rate": float("nan")}):
        with pytest.raises(UserError, match=r"prompts, number 2: metadata has (no|a bad) rate"):
            check_pass_rates(made, [{"rate": 0.3}, bad], "prompts")
    check_pass_rates(make_options(), [{}], "prompts")


def test_masks_and_rewards_multiply_with_the_weights_of_failures() -> None:
    samples = make_samples(3)
    for sample in samples:
        sample.reward = float(sample.index % 3 == 0)
        assert sample.teacher_scores is not None
        if sample.index == 4:
            sample.teacher_failure = "timeout"
            sample.teacher_scores.valid_T[:] = False
    samples[6].status = Status.TRUNCATED
    flags: dict[str, Any] = {"opd_reward_beta": 2.0, "opd_mask_truncated": True, "opd_mask_special_tokens": True}
    leave_out_failed(make_options(rollout_batch_size=12, use_opd=True), samples)
    before = {index: weights.copy() for index, weights in weights_of(samples).items()}
    weighting(special=range(10), **flags).apply(samples, 0)
    for sample in samples:
        odds = np.exp(np.array([1.0, 0.0, 0.0]) / 2.0)
        expected = before[sample.index] * 3 * odds[sample.index % 3] / odds.sum() * (sample.index != 6)
        np.testing.assert_allclose(sample.opd_weights, expected * (sample.response_tokens >= 10), rtol=1e-6)
    assert before[4].max() == 0
    assert before[0].max() > 1


@pytest.mark.parametrize(("on", "kept"), [("correct", {0, 2}), ("incorrect", {1, 3})])
def test_the_outcome_decides_who_is_heard(on: str, kept: set[int]) -> None:
    samples = make_samples(3)
    for sample in samples:
        sample.reward = (1.0, 0.0, 0.5, 0.4)[sample.group_index]
    weighting(opd_on=on, opd_pass_above=0.45).apply(samples, 0)
    for sample in samples:
        assert set(np.unique(sample.opd_weights)) <= {float(sample.group_index in kept)}


@pytest.mark.parametrize("select", ["top", "sample"])
def test_chosen_tokens_are_those_of_the_samples_whatever_their_order(select: str) -> None:
    flags: dict[str, Any] = {"opd_token_select": select, "opd_token_score": "soft_or", "calculate_per_token_loss": True}
    straight, turned = make_samples(3), make_samples(3)[::-1]
    found = weighting(**flags).apply(straight, 4, answers_of(straight))
    assert weighting(**flags).apply(turned, 4, answers_of(turned)) == pytest.approx(found)
    weights, other = weights_of(straight), weights_of(turned)
    for index in weights:
        np.testing.assert_allclose(weights[index], other[index], rtol=1e-6)
    joined = np.concatenate([weights[sample.index] for sample in straight])
    assert not joined[~scored(straight)].any()
    assert found["opd/token_kept_frac"] == pytest.approx(0.5, abs=0.15)
    assert found["opd/weight_mean"] == pytest.approx(1.0, abs=1e-6 if select == "top" else 0.3)
    assert 0 < found["opd/weight_ess"] <= found["opd/token_kept_frac"] + 1e-9
    # another rollout draws anew, another seed too
    if select == "sample":
        for rollout_id, seed in ((5, 1234), (4, 1)):
            samples = make_samples(3)
            weighting(seed=seed, **flags).apply(samples, rollout_id, answers_of(samples))
            assert any((weights[index] > 0).tolist() != (w > 0).tolist() for index, w in weights_of(samples).items())


def test_tokens_without_a_weight_take_no_place_of_the_chosen_ones() -> None:
    """Half of the tokens that the masks leave, not half of all."""
    samples = make_samples(3)
    for sample in samples:
        sample.reward = float(sample.group_index < 2)
    flags: dict[str, Any] = {"opd_token_select": "top", "opd_on": "correct"}
    weighting(**flags).apply(samples, 0, answers_of(samples))
    left = scored(samples[:6]).sum()
    kept = sum((sample.opd_weights > 0).sum() for sample in samples if sample.opd_weights is not None)
    assert kept == np.ceil(0.5 * left)


def test_defaults_of_the_command_line_give_no_weights() -> None:
    assert not OpdWeighting(parse_options(["--use-opd"]), ()).is_needed
