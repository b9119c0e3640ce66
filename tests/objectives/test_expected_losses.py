"""Expected gradients of the policy losses and corrections off policy, by summing over every response.

Responses come from a sampler that is not the policy in training. Each loss is compared with autograd of the surrogate
it stands for, and where that is not the policy gradient, the difference is shown.

Shape legend: ``S`` all responses, ``T`` tokens of each, ``V`` vocabulary, ``N = S * T`` flattened positions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions, OpdOptions
from opd_megatron.objectives.losses import PolicyInputs, policy_objective
from opd_megatron.objectives.sequences import Sequences
from opd_megatron.objectives.weights import token_loss_weights
from tests.objectives.enumeration import Language, Policy, relative_error

LANGUAGE = Language(3, 3, end=2)
EXACT = {"rtol": 0.0, "atol": 1e-10}
UNCLIPPED = ObjectiveOptions(eps_clip=0.999, eps_clip_high=1e4)


def gradient(
    student: Policy,
    objective: ObjectiveOptions,
    sampler: Policy,
    advantages_ST: Tensor,
    *,
    old: Policy | None = None,
    engine: Policy | None = None,
    teacher: Policy | None = None,
    weights_ST: Tensor | None = None,
    opd: OpdOptions = OpdOptions(),  # noqa: B008 - frozen
) -> Tensor:
    """Of the loss in expectation over the sampler's responses; a response counts with the sum over its tokens."""
    mask_ST = LANGUAGE.mask_ST
    weights_ST = torch.ones_like(advantages_ST) if weights_ST is None else weights_ST
    inputs = PolicyInputs(
        log_probs_N=student.log_probs_ST().flatten(),
        advantages_N=advantages_ST.flatten(),
        loss_weights_N=(sampler.probs_S().detach()[:, None] * weights_ST).flatten(),
        loss_mask_N=mask_ST.flatten(),
        sequences=Sequences(torch.arange(len(LANGUAGE)).repeat_interleave(LANGUAGE.length), len(LANGUAGE)),
        old_log_probs_N=(old or sampler).log_probs_ST().detach().flatten(),
        rollout_log_probs_N=None if engine is None else engine.log_probs_ST().detach().flatten(),
        teacher_log_probs_N=None if teacher is None else teacher.log_probs_ST().detach().flatten(),
    )
    return student.gradient(policy_objective(inputs, objective, None if teacher is None else 1.0, opd)[0])


@pytest.fixture
def student() -> Policy:
    return Policy(LANGUAGE, 1)


@pytest.fixture
def sampler(student: Policy) -> Policy:
    return student.near(2, 0.4)


@pytest.fixture
def token_advantages_ST() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(LANGUAGE), LANGUAGE.length, generator=generator, dtype=torch.float64)


@pytest.fixture
def advantages_ST(token_advantages_ST: Tensor) -> Tensor:
    """One advantage for all tokens of a response."""
    return token_advantages_ST[:, :1].expand(-1, LANGUAGE.length).contiguous()


def test_ppo_has_the_gradient_of_the_surrogate(student: Policy, sampler: Policy, token_advantages_ST: Tensor) -> None:
    """Prefixes from the sampler, the token from the student; with clipping its clipped form."""
    ratio_ST = (student.log_probs_ST() - sampler.log_probs_ST().detach()).exp()
    probs_S1 = sampler.probs_S().detach()[:, None]
    terms_ST = torch.where(LANGUAGE.mask_ST, ratio_ST * token_advantages_ST, 0.0)
    got = gradient(student, UNCLIPPED, sampler, token_advantages_ST)
    torch.testing.assert_close(got, -student.gradient((probs_S1 * terms_ST).sum()), **EXACT)
    clipped_ST = torch.minimum(terms_ST, ratio_ST.clamp(0.8, 1.2) * token_advantages_ST * LANGUAGE.mask_ST)
    got = gradient(student, ObjectiveOptions(), sampler, token_advantages_ST)
    torch.testing.assert_close(got, -student.gradient((probs_S1 * clipped_ST).sum()), **EXACT)


def test_cispo_has_the_gradient_of_the_surrogate_with_truncated_weights(
    student: Policy, sampler: Policy, token_advantages_ST: Tensor
) -> None:
    """Without truncation that of PPO without clipping; every token keeps a gradient."""
    objective = ObjectiveOptions(policy_loss="cispo", eps_clip=1.0, eps_clip_high=0.1)
    ratio_ST = (student.log_probs_ST() - sampler.log_probs_ST()).exp().detach()
    weights_ST = sampler.probs_S().detach()[:, None] * ratio_ST.clamp(max=1.1) * token_advantages_ST
    exact = -student.gradient((weights_ST * student.log_probs_ST()).sum())
    torch.testing.assert_close(gradient(student, objective, sampler, token_advantages_ST), exact, **EXACT)
    plain = gradient(student, UNCLIPPED, sampler, token_advantages_ST)
    assert relative_error(exact, plain) > 0.05
    open_ended = replace(objective, eps_clip_high=1e4)
    torch.testing.assert_close(gradient(student, open_ended, sampler, token_advantages_ST), plain, **EXACT)


@pytest.mark.parametrize("eps_clip", [0.999, 0.05])
def test_gspo_is_the_sequence_form_where_the_advantage_is_the_responses(
    student: Policy, sampler: Policy, advantages_ST: Tensor, eps_clip: float
) -> None:
    """``min(s A, clip(s) A)`` with ``s`` the geometric mean of the ratios, clipped or not."""
    objective = ObjectiveOptions(policy_loss="gspo", eps_clip=eps_clip, eps_clip_high=1e4 if eps_clip > 0.9 else None)
    lengths_S = LANGUAGE.mask_ST.sum(1)
    token_means_ST = 1.0 / lengths_S[:, None].double().expand_as(advantages_ST)
    got = gradient(student, objective, sampler, advantages_ST, weights_ST=token_means_ST)
    ratio_S = ((student.log_probs_ST() - sampler.log_probs_ST().detach()).sum(1) / lengths_S).exp()
    advantage_S = advantages_ST[:, 0]
    upper = 1e4 if eps_clip > 0.9 else eps_clip
    surrogate_S = torch.minimum(ratio_S * advantage_S, ratio_S.clamp(1 - eps_clip, 1 + upper) * advantage_S)
    exact = -student.gradient((sampler.probs_S().detach() * surrogate_S).sum())
    torch.testing.assert_close(got, exact, **EXACT)
    assert exact.norm() > 1e-3


def test_with_a_term_of_each_token_only_the_token_form_of_gspo_gives_each_its_own_credit(student: Policy) -> None:
    """On policy, with ratios of 1: the token form is the OPD gradient, the sequence form spreads credit evenly."""
    teacher = Policy(LANGUAGE, 7)
    zeros_ST = torch.zeros(len(LANGUAGE), LANGUAGE.length, dtype=torch.float64)
    objective = ObjectiveOptions(policy_loss="gspo")
    got = gradient(student, objective, student, zeros_ST, teacher=teacher)
    plain = gradient(student, ObjectiveOptions(), student, zeros_ST, teacher=teacher)
    torch.testing.assert_close(got, plain, **EXACT)
    distance_ST = (student.log_probs_ST() - teacher.log_probs_ST()).detach()
    mean_S = distance_ST.sum(1) / LANGUAGE.mask_ST.sum(1)
    ratio_S = (student.log_probs_ST() - student.log_probs_ST().detach()).sum(1)
    sequence_form = student.gradient((student.probs_S().detach() * mean_S * ratio_S).sum())
    assert relative_error(sequence_form, plain) > 0.2


def test_sequence_weights_give_the_on_policy_gradient(student: Policy, sampler: Policy, advantages_ST: Tensor) -> None:
    """The engine samples, the trainer's old policy is the current one; without bounds nothing of the engine is left."""
    objective = replace(UNCLIPPED, use_tis=True, tis_level="sequence", tis_clip=1e8)
    got = gradient(student, objective, sampler, advantages_ST, old=student, engine=sampler)
    exact = -student.gradient((student.probs_S() * advantages_ST[:, 0]).sum())
    torch.testing.assert_close(got, exact, **EXACT)
    uncorrected = gradient(student, UNCLIPPED, sampler, advantages_ST, old=student)
    assert relative_error(uncorrected, exact) > 0.05


def test_token_weights_correct_the_token_and_leave_the_prefix(
    student: Policy, sampler: Policy, token_advantages_ST: Tensor
) -> None:
    """Prefixes remain the engine's; a bound takes from tokens that the trainer finds much more probable."""
    objective = replace(UNCLIPPED, use_tis=True, tis_clip=1e8)
    got = gradient(student, objective, sampler, token_advantages_ST, old=student, engine=sampler)
    probs_ST = sampler.probs_S().detach()[:, None] * LANGUAGE.mask_ST
    ratio_ST = (student.log_probs_ST() - sampler.log_probs_ST().detach()).exp()
    exact = -student.gradient((probs_ST * ratio_ST * token_advantages_ST).sum())
    torch.testing.assert_close(got, exact, **EXACT)
    bounded = replace(objective, tis_clip=1.1)
    got = gradient(student, bounded, sampler, token_advantages_ST, old=student, engine=sampler)
    weights_ST = probs_ST * ratio_ST.detach().clamp(max=1.1) * token_advantages_ST
    biased = -student.gradient((weights_ST * student.log_probs_ST()).sum())
    torch.testing.assert_close(got, biased, **EXACT)
    assert relative_error(biased, exact) > 0.02


OF_SAMPLES = {
    "sampled": OpdOptions(),
    "importance": OpdOptions(opd_importance=True),
    **{kind: OpdOptions(opd_loss="kl_loss", opd_kl_loss_type=kind) for kind in ("k1", "k2", "k3")},
}


@pytest.mark.parametrize("form", OF_SAMPLES)
def test_importance_weights_bring_every_term_of_sampled_tokens_to_the_students_law(student: Policy, form: str) -> None:
    """The engine samples, the old policy is the trainer's before the rollout's first step; no ratio is out of bounds.

    Weights of responses leave nothing of the engine, those of tokens its prefixes. OPSM has no say in a loss.
    """
    old, teacher, opd = student.near(5, 0.3), Policy(LANGUAGE, 7), OF_SAMPLES[form]
    engine = old.near(6, 0.4)
    zeros_ST = torch.zeros(len(LANGUAGE), LANGUAGE.length, dtype=torch.float64)
    exact = gradient(student, UNCLIPPED, old, zeros_ST, old=old, teacher=teacher, opd=opd)
    models = {"old": old, "engine": engine, "teacher": teacher, "opd": opd}
    weighed = replace(UNCLIPPED, use_tis=True, tis_level="sequence", tis_clip=1e8)
    torch.testing.assert_close(gradient(student, weighed, engine, zeros_ST, **models), exact, **EXACT)
    assert relative_error(gradient(student, UNCLIPPED, engine, zeros_ST, **models), exact) > 0.05
    by_token = replace(weighed, tis_level="token")
    found = gradient(student, by_token, engine, zeros_ST, **models)
    if form == "sampled":  # whose d is that of the old policy
        assert relative_error(found, exact) > 0.01
        return
    log_student_STV = student.all_log_probs_STV()
    kl_ST = (log_student_STV.exp() * (log_student_STV - teacher.all_log_probs_STV().detach())).sum(-1)
    at_engines_prefixes = student.gradient((engine.probs_S().detach()[:, None] * LANGUAGE.mask_ST * kl_ST).sum())
    torch.testing.assert_close(found, at_engines_prefixes, **EXACT)
    masked = gradient(student, replace(by_token, use_opsm=True, opsm_delta=0.0), engine, zeros_ST, **models)
    torch.testing.assert_close(masked, found, **EXACT)


def test_icepop_is_the_surrogate_of_the_tokens_within_the_bounds(
    student: Policy, sampler: Policy, token_advantages_ST: Tensor
) -> None:
    """The engine's prefixes, the trainer's token; tokens on which the two disagree are no longer summed over."""
    objective = replace(UNCLIPPED, use_tis=True, tis_mode="mask", tis_clip_low=0.8, tis_clip=1.25)
    got = gradient(student, objective, sampler, token_advantages_ST, old=student, engine=sampler)
    probs_ST = sampler.probs_S().detach()[:, None] * LANGUAGE.mask_ST
    ratio_ST = (student.log_probs_ST() - sampler.log_probs_ST().detach()).exp()
    inside_ST = (ratio_ST >= 0.8) & (ratio_ST <= 1.25)
    terms_ST = probs_ST * ratio_ST * token_advantages_ST
    torch.testing.assert_close(got, -student.gradient(terms_ST[inside_ST].sum()), **EXACT)
    bias = got + student.gradient(terms_ST.sum())
    torch.testing.assert_close(bias, student.gradient(terms_ST[~inside_ST].sum()), **EXACT)
    assert bias.norm() > 0.02 * got.norm()


def test_opsm_leaves_out_no_more_than_the_push_away_from_abandoned_responses(
    student: Policy, sampler: Policy, token_advantages_ST: Tensor
) -> None:
    """Its bias is the surrogate of tokens of negative advantage in responses that have become improbable."""
    objective = replace(UNCLIPPED, use_opsm=True, opsm_delta=0.05)
    ratio_ST = (student.log_probs_ST() - sampler.log_probs_ST().detach()).exp()
    drift_S = (sampler.log_probs_ST() - student.log_probs_ST()).sum(1) / LANGUAGE.mask_ST.sum(1)
    left_out_ST = (token_advantages_ST < 0) & (drift_S > 0.05)[:, None]
    probs_ST = sampler.probs_S().detach()[:, None] * LANGUAGE.mask_ST
    terms_ST = probs_ST * ratio_ST * token_advantages_ST
    got = gradient(student, objective, sampler, token_advantages_ST)
    torch.testing.assert_close(got, -student.gradient(terms_ST[~left_out_ST].sum()), **EXACT)
    plain = gradient(student, UNCLIPPED, sampler, token_advantages_ST)
    torch.testing.assert_close(got - plain, student.gradient(terms_ST[left_out_ST].sum()), **EXACT)
    assert relative_error(got, plain) > 0.02
    on_policy = gradient(student, objective, student, token_advantages_ST)
    torch.testing.assert_close(on_policy, gradient(student, UNCLIPPED, student, token_advantages_ST), **EXACT)


def test_dual_clip_has_the_gradient_of_the_bounded_surrogate(student: Policy, token_advantages_ST: Tensor) -> None:
    """``max(min(r A, clip(r) A), c A)`` where A < 0: what has become c times as probable pushes no more."""
    sampler = student.near(4, 0.8)
    ratio_ST = (student.log_probs_ST() - sampler.log_probs_ST().detach()).exp()
    clipped_ST = torch.minimum(ratio_ST * token_advantages_ST, ratio_ST.clamp(0.8, 1.2) * token_advantages_ST)
    bounded_ST = torch.where(token_advantages_ST < 0, torch.maximum(clipped_ST, 1.5 * token_advantages_ST), clipped_ST)
    probs_ST = sampler.probs_S().detach()[:, None] * LANGUAGE.mask_ST
    got = gradient(student, ObjectiveOptions(eps_clip_c=1.5), sampler, token_advantages_ST)
    torch.testing.assert_close(got, -student.gradient((probs_ST * bounded_ST).sum()), **EXACT)
    plain = gradient(student, ObjectiveOptions(), sampler, token_advantages_ST)
    beyond_ST = (token_advantages_ST < 0) & (ratio_ST > 1.5)
    left_out = student.gradient((probs_ST * ratio_ST * token_advantages_ST)[beyond_ST].sum())
    torch.testing.assert_close(got - plain, left_out, **EXACT)
    assert relative_error(got, plain) > 0.02


def test_only_a_constant_divisor_leaves_the_expected_gradient(student: Policy) -> None:
    """Steps of two responses: with a constant divisor the sampled term has the gradient of the summed exact KL."""
    teacher = Policy(LANGUAGE, 7)
    zeros_ST = torch.zeros(len(LANGUAGE), LANGUAGE.length, dtype=torch.float64)
    count = len(LANGUAGE)
    first_P, second_P = torch.cartesian_prod(torch.arange(count), torch.arange(count)).unbind(1)
    probs_S = student.probs_S().detach()

    def expected(per_token: bool, divisor: int | None) -> Tensor:
        """Weight of each token in expectation over the other response of the step, both places together."""
        weights_ST = torch.zeros_like(zeros_ST)
        for first, second in zip(first_P.tolist(), second_P.tolist(), strict=True):
            masks = [LANGUAGE.mask_ST[first], LANGUAGE.mask_ST[second]]
            mine = token_loss_weights(masks, per_token, divisor)[0].double()
            weights_ST[first] += 2 * probs_S[second] * mine
        return gradient(student, ObjectiveOptions(), student, zeros_ST, teacher=teacher, weights_ST=weights_ST)

    student_STV, teacher_STV = student.all_log_probs_STV(), teacher.all_log_probs_STV().detach()
    kl_ST = (student_STV.exp() * (student_STV - teacher_STV)).sum(-1)
    exact = student.gradient((probs_S[:, None] * LANGUAGE.mask_ST * kl_ST).sum()) / 3
    constant = expected(False, 3)
    torch.testing.assert_close(constant, exact, rtol=1e-6, atol=1e-7)  # weights are float32
    for biased in (expected(True, None), expected(False, None)):
        assert 1 - torch.nn.functional.cosine_similarity(biased, exact, dim=0) > 1e-3
