"""Estimators and losses by import path, and the pairing of every estimator with the distillation term."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.advantages import task_advantages
from opd_megatron.objectives.estimators import ADVANTAGE_ESTIMATORS
from opd_megatron.objectives.losses import policy_objective
from opd_megatron.objectives.statistics import finalize_statistics
from tests.objectives import spies
from tests.objectives.test_losses import LENGTHS, given, random_inputs

HERE = "tests.objectives.spies"
REWARDS = [3.0, 1.0, 0.5, 2.0, 1.0, 1.0, 4.0, 0.0]
GROUPS = [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_the_distillation_term_and_the_estimator_leave_each_other_alone(estimator: str, normalize: bool) -> None:
    """What reaches the policy loss is the estimator's advantage, plus the same term whatever the estimator."""
    inputs = random_inputs(1)
    options = ObjectiveOptions(
        advantage_estimator=estimator, normalize_advantages=normalize, custom_loss_path=f"{HERE}:keep_terms"
    )
    masks = list(inputs.loss_mask_N.split(LENGTHS))
    own = replace(options, custom_loss_path=None)
    values = [torch.linspace(-1, 1, len(mask_T)) for mask_T in masks]
    task_N = torch.cat(task_advantages(own, REWARDS, GROUPS, masks, None, REWARDS[::-1], values)).double()
    inputs = replace(inputs, advantages_N=task_N)
    distance_N = given(inputs.old_log_probs_N) - given(inputs.teacher_log_probs_N) - given(inputs.opd_baseline_N)
    term_N = torch.where(given(inputs.teacher_valid_N), distance_N, 0.0) + given(inputs.opd_future_N)
    term_N = torch.where(inputs.loss_mask_N, term_N, 0.0)
    for coef in (None, 0.0, 0.25, 4.0):
        spies.seen.clear()
        _, statistics = policy_objective(inputs, options, coef)
        (terms,) = spies.seen
        torch.testing.assert_close(terms.advantages_N, task_N - (coef or 0.0) * term_N, rtol=0, atol=1e-12)
        assert not terms.advantages_N.requires_grad
        means = finalize_statistics(statistics)
        assert means["train/task_advantage_abs_mean"] == pytest.approx(
            float((inputs.loss_weights_N * task_N.abs()).sum()), rel=1e-6
        )
    assert (term_N != 0).any()
    assert (task_N != 0).any() == (estimator != "none")


def test_an_estimator_of_ones_own_is_normalised_and_masked_like_all_others() -> None:
    masks = [torch.tensor([True, False])] * 3
    options = ObjectiveOptions(custom_advantage_path=f"{HERE}:ranks")
    found = task_advantages(options, [5.0, -1.0, 0.0], [0, 0, 0], masks)
    assert [advantage_T.tolist() for advantage_T in found] == [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]
    whitened = task_advantages(replace(options, normalize_advantages=True), [50.0, 1.0, 9.0], [0, 0, 0], masks)
    torch.testing.assert_close(torch.stack(whitened), torch.stack(found))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_few", "too_few: 2 advantages for 3 samples"),
        ("too_long", r"too_long: advantages of shape \(3,\) for the 2 tokens of sample 0"),
        ("not_finite", "not_finite: the advantages of sample 0 are not finite"),
        ("beyond_float32", "beyond_float32: the advantages of sample 0 are not finite"),
        ("nothing", "nothing: returned a NoneType, not one tensor of numbers for each sample"),
        ("missing", "has no missing"),
    ],
)
def test_what_is_no_advantage_is_refused(function: str, message: str) -> None:
    masks = [torch.tensor([True, True])] * 3
    with pytest.raises(UserError, match=message):
        task_advantages(ObjectiveOptions(custom_advantage_path=f"{HERE}:{function}"), [1.0, 2.0, 3.0], [0] * 3, masks)


def test_a_loss_of_ones_own_is_weighted_and_reported_like_all_others() -> None:
    inputs = random_inputs(2)
    options = ObjectiveOptions(custom_loss_path=f"{HERE}:keep_terms", entropy_coef=0.5)
    loss, statistics = policy_objective(inputs, options, None)
    (gradient_N,) = torch.autograd.grad(loss, inputs.log_probs_N)
    torch.testing.assert_close(gradient_N, -inputs.loss_weights_N * inputs.advantages_N)
    means = finalize_statistics(statistics)
    assert means["train/own_metric"] == pytest.approx(float((inputs.loss_weights_N * inputs.advantages_N.abs()).sum()))
    assert means["train/loss"] == pytest.approx(means["train/pg_loss"] - 0.5 * means["train/entropy"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("a_scalar", "a_scalar: loss is not a tensor of the 28 positions"),
        ("nothing", "nothing: returned a NoneType, not a loss and a mapping of metrics"),
        ("a_loss_alone", "a_loss_alone: returned a Tensor, not a loss and a mapping of metrics"),
        ("detached", "detached: the loss has no gradient"),
        ("badly_named", "badly_named: names of metrics begin with train/"),
        ("missing", "has no missing"),
    ],
)
def test_what_is_no_policy_loss_is_refused(function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        policy_objective(random_inputs(3), ObjectiveOptions(custom_loss_path=f"{HERE}:{function}"), None)
