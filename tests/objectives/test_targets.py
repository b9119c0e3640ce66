"""Targets of the distillation term by enumeration in float64: expected gradients and what they are gradients of.

Shape legend: that of ``enumeration``; ``N = S * T`` flattened positions.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions, OpdOptions
from opd_megatron.objectives.losses import PolicyInputs, policy_objective
from opd_megatron.objectives.sequences import Sequences
from opd_megatron.objectives.targets import TARGETS, extrapolated, implicit_reward_statistics
from tests.objectives.enumeration import Language, Policy, relative_error

LANGUAGE = Language(3, 3, end=2)
STUDENT, TEACHER, REFERENCE = (Policy(LANGUAGE, seed, scale) for seed, scale in ((1, 1.0), (2, 1.5), (3, 1.2)))
COEFFICIENT = 0.7
SCALES = pytest.mark.parametrize("scale", [0.4, 1.25, 2.0])


def masked_sum(values_ST: Tensor) -> Tensor:
    """Mean over responses of the student of the sum over their tokens."""
    return (STUDENT.probs_S().detach()[:, None] * values_ST * LANGUAGE.mask_ST).sum()


def kl_to(target_STV: Tensor) -> Tensor:
    """Per-token KL(S||q) with the student's prefixes held fixed, coefficient included."""
    student_STV = STUDENT.all_log_probs_STV()
    return COEFFICIENT * masked_sum((student_STV.exp() * (student_STV - target_STV.detach())).sum(-1))


def sampled_gradient(target_ST: Tensor, future_ST: Tensor | None = None, **opd: object) -> Tensor:
    """Expected gradient of the library's loss with ``target_ST`` in the teacher's place."""
    inputs = PolicyInputs(
        log_probs_N=STUDENT.log_probs_ST().flatten(),
        advantages_N=torch.zeros(LANGUAGE.mask_ST.numel(), dtype=torch.float64),
        loss_weights_N=STUDENT.probs_S().detach().repeat_interleave(LANGUAGE.length),
        loss_mask_N=LANGUAGE.mask_ST.flatten(),
        sequences=Sequences(torch.arange(len(LANGUAGE)).repeat_interleave(LANGUAGE.length), len(LANGUAGE)),
        teacher_log_probs_N=target_ST.detach().flatten(),
        opd_future_N=None if future_ST is None else future_ST.detach().flatten(),
    )
    loss, _ = policy_objective(inputs, ObjectiveOptions(), COEFFICIENT, OpdOptions(**opd))  # type: ignore[arg-type]
    return STUDENT.gradient(loss)


def later(distance_ST: Tensor) -> Tensor:
    """Sum over the tokens that follow."""
    distance_ST = torch.where(LANGUAGE.mask_ST, distance_ST, 0.0)
    return distance_ST.flip(1).cumsum(1).flip(1) - distance_ST


def extrapolated_ST(scale: float) -> Tensor:
    return extrapolated(TEACHER.log_probs_ST(), REFERENCE.log_probs_ST(), scale)


@SCALES
def test_extrapolation_maximises_the_scaled_reward(scale: float) -> None:
    """``E_S[scale log(p_T / p_ref)] - KL(S||ref)``: of each token, and with discount 1 of whole responses."""
    target_ST = extrapolated_ST(scale)
    student_STV, reference_STV = STUDENT.all_log_probs_STV(), REFERENCE.all_log_probs_STV().detach()
    reward_STV = TEACHER.all_log_probs_STV().detach() - reference_STV
    per_token_ST = (student_STV.exp() * (scale * reward_STV - (student_STV - reference_STV))).sum(-1)
    expected = STUDENT.gradient(-COEFFICIENT * masked_sum(per_token_ST))
    torch.testing.assert_close(sampled_gradient(target_ST), expected, rtol=0, atol=1e-12)

    student_S, reference_S = STUDENT.log_probs_ST().sum(1), REFERENCE.log_probs_ST().detach().sum(1)
    reward_S = TEACHER.log_probs_ST().detach().sum(1) - reference_S
    whole = STUDENT.gradient(-COEFFICIENT * (student_S.exp() * (scale * reward_S - (student_S - reference_S))).sum())
    future_ST = later(STUDENT.log_probs_ST() - target_ST)
    torch.testing.assert_close(sampled_gradient(target_ST, future_ST), whole, rtol=0, atol=1e-12)
    assert relative_error(expected, whole) > 0.05


@SCALES
def test_both_forms_of_extrapolation_have_one_expected_gradient(scale: float) -> None:
    """The normaliser that the sampled form lacks is a function of the prefix."""
    reference_STV = REFERENCE.all_log_probs_STV()
    target_STV = (scale * TEACHER.all_log_probs_STV() + (1 - scale) * reference_STV).log_softmax(-1)
    expected = STUDENT.gradient(kl_to(target_STV))
    torch.testing.assert_close(sampled_gradient(extrapolated_ST(scale)), expected, rtol=0, atol=1e-12)
    for kind in ("k1", "k2", "k3"):
        found = sampled_gradient(extrapolated_ST(scale), opd_loss="kl_loss", opd_kl_loss_type=kind)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert relative_error(expected, STUDENT.gradient(kl_to(TEACHER.all_log_probs_STV()))) > 0.1


MIXTURE_WEIGHTS = (0.3, 0.7)


def mixture_STV(kind: str) -> Tensor:
    """The distribution at each prefix, by its definition."""
    (first, second), (teacher, other) = MIXTURE_WEIGHTS, (p.all_log_probs_STV().detach() for p in (TEACHER, REFERENCE))
    if kind == "arithmetic":
        return (first * teacher.exp() + second * other.exp()).log()
    return (first * teacher + second * other).log_softmax(-1)


def mixed_ST(kind: str) -> Tensor:
    logs = [policy.log_probs_ST().detach().flatten() for policy in (TEACHER, REFERENCE)]
    return TARGETS[kind](logs, MIXTURE_WEIGHTS).view(LANGUAGE.mask_ST.shape)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_mixtures_have_the_gradient_of_the_kl_to_them(kind: str) -> None:
    """At discount 0 that of each token; at 1 that of whole responses, which a geometric mixture mixes as such."""
    expected = STUDENT.gradient(kl_to(mixture_STV(kind)))
    torch.testing.assert_close(sampled_gradient(mixed_ST(kind)), expected, rtol=0, atol=1e-12)
    for alone in (TEACHER, REFERENCE):
        assert relative_error(expected, STUDENT.gradient(kl_to(alone.all_log_probs_STV()))) > 0.1

    target_ST = mixture_STV(kind).gather(-1, LANGUAGE.responses_ST[..., None])[..., 0]
    of_response_S = torch.where(LANGUAGE.mask_ST, target_ST, 0.0).sum(1)
    if kind == "geometric":
        both_SM = torch.stack([policy.log_probs_ST().sum(1).detach() for policy in (TEACHER, REFERENCE)], dim=1)
        of_response_S = (both_SM @ torch.tensor(MIXTURE_WEIGHTS, dtype=torch.float64)).log_softmax(0)
    torch.testing.assert_close(of_response_S.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    student_S = STUDENT.log_probs_ST().sum(1)
    whole = STUDENT.gradient(COEFFICIENT * (student_S.exp() * (student_S - of_response_S)).sum())
    future_ST = later(STUDENT.log_probs_ST() - mixed_ST(kind))
    torch.testing.assert_close(sampled_gradient(mixed_ST(kind), future_ST), whole, rtol=0, atol=1e-12)


def test_an_arithmetic_mixture_is_a_distribution_and_a_geometric_one_is_not() -> None:
    logs = [policy.all_log_probs_STV().detach().flatten() for policy in (TEACHER, REFERENCE)]
    sums = {
        kind: mix(logs, MIXTURE_WEIGHTS).exp().view(-1, LANGUAGE.vocabulary).sum(-1) for kind, mix in TARGETS.items()
    }
    torch.testing.assert_close(sums["arithmetic"], torch.ones_like(sums["arithmetic"]))
    assert (sums["geometric"] < 1).all()
    assert sums["geometric"].min() < 0.9


def test_a_teacher_may_rule_a_token_out_in_a_mixture() -> None:
    impossible, likely = torch.tensor([-math.inf]), torch.tensor([math.log(0.5)])
    assert TARGETS["arithmetic"]([impossible, likely], (0.5, 0.5)).exp().item() == pytest.approx(0.25)
    assert torch.isfinite(TARGETS["geometric"]([impossible, likely], (0.5, 0.5))).all()


def test_scale_one_is_the_teacher_and_zero_the_reference() -> None:
    teacher_ST, reference_ST = TEACHER.log_probs_ST().detach(), REFERENCE.log_probs_ST().detach()
    assert torch.equal(extrapolated(teacher_ST, reference_ST, 1.0), teacher_ST)
    torch.testing.assert_close(extrapolated(teacher_ST, reference_ST, 0.0), reference_ST, rtol=0, atol=1e-14)


def test_tokens_that_a_model_rules_out_stay_finite() -> None:
    impossible = torch.tensor([-math.inf, -1.0, -math.inf])
    assert torch.isfinite(extrapolated(impossible, torch.tensor([-1.0, -math.inf, -math.inf]), 2.0)).all()


def test_the_implicit_reward_is_a_mean_over_scored_tokens() -> None:
    teacher, reference = torch.tensor([-1.0, -2.0, math.nan]), torch.tensor([-3.0, -2.5, -1.0])
    target = extrapolated(teacher, reference, 1.25)
    scored = torch.tensor([True, True, False])
    found = implicit_reward_statistics([teacher], [target], [scored], scale=1.25)
    assert found == {"opd/implicit_reward": pytest.approx((2.0 + 0.5) / 2)}
    assert math.isnan(implicit_reward_statistics([], [], [], scale=2.0)["opd/implicit_reward"])
