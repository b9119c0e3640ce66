"""The forms of the distillation term by exact enumeration over a tiny vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions, OpdOptions
from opd_megatron.objectives.distribution import (
    DIVERGENCES,
    chosen_divergence,
    jsd_beta,
    mixing_weight,
    opd_coefficient,
)
from opd_megatron.objectives.divergences import forward_kl, reverse_kl
from opd_megatron.objectives.losses import PolicyInputs, policy_objective
from opd_megatron.objectives.opd_losses import OPD_LOSSES, OpdTerms
from opd_megatron.objectives.sequences import Sequences
from tests.objectives.enumeration import Language, Policy, relative_error

PREFIXES, V = 5, 6


@pytest.fixture
def logits_PV() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(PREFIXES, V, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.fixture
def teacher_PV() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return (1.5 * torch.randn(PREFIXES, V, dtype=torch.float64, generator=generator)).log_softmax(-1)


def reverse_kl_of(log_student_PV: Tensor, log_teacher_PV: Tensor) -> Tensor:
    return (log_student_PV.exp() * (log_student_PV - log_teacher_PV)).sum()


def expected_gradient(
    logits_PV: Tensor, teacher_PV: Tensor, options: OpdOptions, old_PV: Tensor | None = None
) -> Tensor:
    """Gradient of the term's loss summed over every action of every prefix, weighted by the sampling law."""
    log_PV = logits_PV.log_softmax(-1)
    old_PV = log_PV.detach() if old_PV is None else old_PV
    effect = OPD_LOSSES[options.opd_loss](
        OpdTerms(
            log_probs_N=log_PV.flatten(),
            old_log_probs_N=old_PV.flatten(),
            teacher_log_probs_N=teacher_PV.flatten(),
            scored_N=torch.ones(PREFIXES * V, dtype=torch.bool),
            options=options,
        )
    )
    weights_N = old_PV.exp().flatten()
    if effect.loss_N is None:
        assert effect.advantage_N is not None
        effect_N = -effect.advantage_N * (log_PV - old_PV).exp().flatten()
    else:
        effect_N = effect.loss_N
    return torch.autograd.grad((weights_N * effect_N).sum(), logits_PV)[0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_estimators_have_the_gradient_of_the_reverse_kl(
    logits_PV: Tensor, teacher_PV: Tensor, kind: str, on_policy: bool
) -> None:
    old_PV = None if on_policy else (logits_PV.detach() + 0.4 * torch.sin(torch.arange(V))).log_softmax(-1)
    got = expected_gradient(logits_PV, teacher_PV, OpdOptions(opd_loss="kl_loss", opd_kl_loss_type=kind), old_PV)
    exact = torch.autograd.grad(reverse_kl_of(logits_PV.log_softmax(-1), teacher_PV), logits_PV)[0]
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


def test_the_distribution_form_has_the_expected_gradient_of_the_sampled_one(
    logits_PV: Tensor, teacher_PV: Tensor
) -> None:
    log_PV = logits_PV.log_softmax(-1)
    terms = OpdTerms(
        log_probs_N=log_PV[:, 0],
        old_log_probs_N=log_PV[:, 0].detach(),
        teacher_log_probs_N=teacher_PV[:, 0],
        scored_N=torch.ones(PREFIXES, dtype=torch.bool),
        options=OpdOptions(opd_loss="distribution"),
        divergence_N=(log_PV.exp() * (log_PV - teacher_PV)).sum(-1),
    )
    loss_N = OPD_LOSSES["distribution"](terms).loss_N
    assert loss_N is not None
    (whole,) = torch.autograd.grad(loss_N.sum(), logits_PV)
    sampled = expected_gradient(logits_PV, teacher_PV, OpdOptions())
    torch.testing.assert_close(whole, sampled, rtol=0, atol=1e-12)


def test_given_tokens_say_nothing_but_where_distributions_are_compared(logits_PV: Tensor, teacher_PV: Tensor) -> None:
    """Whatever tokens the data has, the step is that of the divergence; the sampled form follows the tokens."""
    (exact,) = torch.autograd.grad(reverse_kl_of(logits_PV.log_softmax(-1), teacher_PV), logits_PV)
    off = {"distribution": 0.0, "sampled": 0.0}
    for form in off:
        for token in range(V):
            log_PV = logits_PV.log_softmax(-1)
            inputs = PolicyInputs(
                log_probs_N=log_PV[:, token],
                advantages_N=torch.zeros(PREFIXES),
                loss_weights_N=torch.ones(PREFIXES),
                loss_mask_N=torch.ones(PREFIXES),
                sequences=Sequences(torch.zeros(PREFIXES, dtype=torch.long), 1),
                teacher_log_probs_N=teacher_PV[:, token],
                opd_divergence_N=(log_PV.exp() * (log_PV - teacher_PV)).sum(-1),
            )
            loss, _ = policy_objective(inputs, ObjectiveOptions(), 1.0, OpdOptions(opd_loss=form))
            (found,) = torch.autograd.grad(loss, logits_PV)
            off[form] = max(off[form], (found - exact).abs().max().item())
    assert off["distribution"] < 1e-12
    assert off["sampled"] > 0.1


def test_at_the_teachers_samples_forward_kl_is_the_likelihood_of_its_responses() -> None:
    """Summed over all responses of the teacher, ended or cut: what is cut says nothing of an end behind it."""
    language = Language(vocabulary=3, length=3, end=2)
    student, teacher = Policy(language, seed=1), Policy(language, seed=2, scale=2.0)
    log_STV, taught_STV = student.all_log_probs_STV(), teacher.all_log_probs_STV().detach()
    log_NV, taught_NV = log_STV[language.mask_ST], taught_STV[language.mask_ST]
    terms = OpdTerms(
        log_probs_N=log_NV[:, 0],
        old_log_probs_N=log_NV[:, 0].detach(),
        teacher_log_probs_N=taught_NV[:, 0],
        scored_N=torch.ones(len(log_NV), dtype=torch.bool),
        options=OpdOptions(opd_loss="distribution"),
        divergence_N=(taught_NV.exp() * (taught_NV - log_NV)).sum(-1),
    )
    loss_N = OPD_LOSSES["distribution"](terms).loss_N
    assert loss_N is not None
    of_teacher_S = teacher.probs_S().detach()
    weights_N = of_teacher_S[:, None].expand(language.mask_ST.shape)[language.mask_ST]
    likelihood = (of_teacher_S * student.log_probs_ST().sum(1)).sum()
    found, expected = student.gradient((weights_N * loss_N).sum()), student.gradient(-likelihood)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("form", ["sampled", "kl_loss", "distribution"])
def test_given_tokens_have_the_gradient_of_the_kl_from_their_law(
    logits_PV: Tensor, teacher_PV: Tensor, form: str
) -> None:
    """In expectation over tokens of the teacher: its forward KL, times coefficient and weight, and nothing else."""
    log_PV = logits_PV.log_softmax(-1)
    ones_N = torch.ones(PREFIXES * V, dtype=torch.float64)
    inputs = PolicyInputs(
        log_probs_N=log_PV.flatten(),
        advantages_N=0 * ones_N,
        loss_weights_N=teacher_PV.exp().flatten(),
        loss_mask_N=ones_N,
        sequences=Sequences(torch.zeros(PREFIXES * V, dtype=torch.long), 1),
        teacher_log_probs_N=teacher_PV.flatten(),
        opd_weights_N=0.5 * ones_N,
        opd_divergence_N=(log_PV.exp() * (log_PV - teacher_PV)).flatten(),
        opd_given_N=ones_N.bool(),
    )
    loss, statistics = policy_objective(inputs, ObjectiveOptions(), 0.6, OpdOptions(opd_loss=form))
    (found,) = torch.autograd.grad(loss, logits_PV, retain_graph=True)
    forward = (teacher_PV.exp() * (teacher_PV - log_PV)).sum()
    (exact,) = torch.autograd.grad(0.3 * forward, logits_PV)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    total, weight = statistics["train/opd_supervised_loss"].tolist()
    assert 0.6 * total == pytest.approx(loss.item())
    assert weight == pytest.approx(PREFIXES)


def test_unscored_positions_of_a_distribution_are_nothing_even_where_they_are_nan() -> None:
    divergence_N = torch.tensor([1.0, math.nan], requires_grad=True)
    zeros_N = torch.zeros(2)
    terms = OpdTerms(zeros_N, zeros_N, zeros_N, torch.tensor([True, False]), OpdOptions(), divergence_N=divergence_N)
    loss_N = OPD_LOSSES["distribution"](terms).loss_N
    assert loss_N is not None
    assert loss_N.tolist() == [1.0, 0.0]
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), divergence_N)
    assert gradient_N.tolist() == [1.0, 0.0]


def test_the_clipped_share_is_reported() -> None:
    """Of the scored tokens, each with its weight in the loss, and of the log-ratio that the term takes."""
    old_N, teacher_N = torch.tensor([-1.0, -1.0, -1.0, math.nan]), torch.tensor([-9.0, -1.5, math.nan, -9.0])
    inputs = PolicyInputs(
        log_probs_N=torch.tensor([-8.0, -6.0, -1.0, math.nan]),
        old_log_probs_N=old_N,
        advantages_N=torch.zeros(4),
        loss_weights_N=torch.tensor([0.3, 0.1, 0.2, 0.4]),
        loss_mask_N=torch.tensor([True, True, True, False]),
        teacher_log_probs_N=teacher_N,
        teacher_valid_N=torch.tensor([True, True, False, True]),
        sequences=Sequences(torch.zeros(4, dtype=torch.long), 1),
    )
    for importance, clipped in ((False, 0.3), (True, 0.1)):
        options = OpdOptions(opd_log_ratio_clip=2.0, opd_importance=importance)
        _, statistics = policy_objective(inputs, ObjectiveOptions(), 1.0, options)
        torch.testing.assert_close(statistics["train/opd_clipfrac"], torch.tensor([clipped, 0.4], dtype=torch.float64))


def value(options: OpdOptions, rollout_id: int, student_PV: Tensor, teacher_PV: Tensor) -> Tensor:
    return chosen_divergence(options, rollout_id)(student_PV, teacher_PV)[0].sum()


def test_a_schedule_leads_from_one_divergence_to_the_other(logits_PV: Tensor, teacher_PV: Tensor) -> None:
    student_PV = logits_PV.detach().log_softmax(-1)
    forward, reverse = (kind(student_PV, teacher_PV)[0].sum() for kind in (forward_kl, reverse_kl))
    options = OpdOptions(opd_divergence="forward_kl", opd_divergence_to="reverse_kl", opd_divergence_schedule="10:20")
    assert [mixing_weight(options, rollout) for rollout in (0, 10, 15, 20, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    for rollout, expected in ((0, forward), (15, (forward + reverse) / 2), (50, reverse)):
        torch.testing.assert_close(value(options, rollout, student_PV, teacher_PV), expected)
    mixed = OpdOptions(opd_divergence="forward_kl", opd_divergence_to="reverse_kl", opd_divergence_mix=0.25)
    torch.testing.assert_close(value(mixed, 7, student_PV, teacher_PV), 0.75 * forward + 0.25 * reverse)


def test_beta_leads_from_one_kl_to_the_other_without_a_jump(logits_PV: Tensor, teacher_PV: Tensor) -> None:
    student_PV = logits_PV.detach().log_softmax(-1)
    forward, reverse = (kind(student_PV, teacher_PV)[0].sum() for kind in (forward_kl, reverse_kl))
    options = OpdOptions(
        opd_divergence="jsd", opd_jsd_scaled=True, opd_jsd_beta=0.0, opd_jsd_beta_end=1.0,
        opd_divergence_schedule="10:1010",
    )  # fmt: skip
    assert [jsd_beta(options, rollout) for rollout in (0, 10, 260, 1010, 2000)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    for rollout, expected in ((3, forward), (10, forward), (1010, reverse), (5000, reverse)):
        torch.testing.assert_close(value(options, rollout, student_PV, teacher_PV), expected)
    middle = OpdOptions(opd_divergence="jsd", opd_jsd_beta=0.25, opd_jsd_scaled=True)
    expected = value(middle, 0, student_PV, teacher_PV)
    torch.testing.assert_close(value(options, 260, student_PV, teacher_PV), expected)
    along = torch.stack([value(options, rollout, student_PV, teacher_PV) for rollout in range(5, 1015)])
    assert along.diff().abs().max() < 0.01 * forward  # unscaled it would fall to 0 at both ends and jump there
    assert jsd_beta(OpdOptions(opd_jsd_beta=0.3), 7) == 0.3


def test_the_coefficient_moves_along_a_line() -> None:
    options = OpdOptions(opd_kl_coef=2.0, opd_kl_coef_end=1.0, opd_kl_coef_rollouts=4)
    assert [opd_coefficient(options, rollout) for rollout in (0, 1, 4, 9)] == [2.0, 1.75, 1.0, 1.0]
    assert opd_coefficient(OpdOptions(opd_kl_coef=0.3), 5) == 0.3


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_every_divergence_can_be_chosen(name: str, logits_PV: Tensor, teacher_PV: Tensor) -> None:
    found = value(OpdOptions(opd_divergence=name), 0, logits_PV.detach().log_softmax(-1), teacher_PV)
    assert found > 0
    assert value(OpdOptions(opd_divergence=name), 0, teacher_PV, teacher_PV).abs() < 1e-12


@pytest.mark.parametrize("form", ["sampled", "kl_loss"])
def test_self_distillation_moves_the_student_towards_what_it_says_with_the_context(form: str) -> None:
    """One table of logits is student and, at the prefixes with a context, teacher, whose side has no gradient."""
    generator = torch.Generator().manual_seed(6)
    table_2PV = torch.randn(2, PREFIXES, V, dtype=torch.float64, generator=generator).requires_grad_()
    teacher_PV = table_2PV[1].log_softmax(-1).detach()
    got = expected_gradient(table_2PV[0], teacher_PV, OpdOptions(opd_loss=form))
    exact = torch.autograd.grad(reverse_kl_of(table_2PV[0].log_softmax(-1), teacher_PV), table_2PV)[0]
    torch.testing.assert_close(got, exact[0], rtol=0, atol=1e-12)
    assert exact[1].abs().max() == 0
    both = torch.autograd.grad(reverse_kl_of(table_2PV[0].log_softmax(-1), table_2PV[1].log_softmax(-1)), table_2PV)[0]
    assert both[1].abs().max() > 0.01  # the gradient of a KL between the two would also pull the teacher
