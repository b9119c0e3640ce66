"""Expected gradients by exact enumeration: every response over a tiny vocabulary, weighted with its probability.

Shape legend: ``S`` all responses, ``T`` tokens of each, ``V`` vocabulary, ``N = S * T`` flattened positions.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.advantages import task_advantages
from opd_megatron.objectives.kl import KL_LOSSES, kl_estimate, kl_loss
from opd_megatron.objectives.log_probs import log_ratio
from opd_megatron.objectives.losses import PolicyInputs, policy_objective
from opd_megatron.objectives.opd import future_distances, importance_weighted_term
from opd_megatron.objectives.sequences import Sequences

V, T = 4, 3
RESPONSES_ST = torch.tensor(list(itertools.product(range(V), repeat=T)))


class TabularPolicy:
    """A softmax of free logits for every prefix of up to T - 1 tokens."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = [
            (scale * torch.randn(V**t, V, generator=generator, dtype=torch.float64)).requires_grad_() for t in range(T)
        ]

    def near(self, seed: int, distance: float) -> TabularPolicy:
        other = TabularPolicy(seed, distance)
        other.logits = [
            (mine.detach() + step.detach()).requires_grad_()
            for mine, step in zip(self.logits, other.logits, strict=True)
        ]
        return other

    def all_log_probs_STV(self) -> Tensor:
        """Distribution at each position of each response."""
        prefix_S = torch.zeros(len(RESPONSES_ST), dtype=torch.int64)
        rows = []
        for t in range(T):
            rows.append(self.logits[t].log_softmax(-1)[prefix_S])
            prefix_S = prefix_S * V + RESPONSES_ST[:, t]
        return torch.stack(rows, dim=1)

    def log_probs_ST(self) -> Tensor:
        return self.all_log_probs_STV().gather(-1, RESPONSES_ST[..., None]).squeeze(-1)

    def gradient(self, loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, self.logits, materialize_grads=True, retain_graph=True)
        return torch.cat([g.flatten() for g in gradients])


def response_probs(policy: TabularPolicy) -> Tensor:
    return policy.log_probs_ST().sum(dim=1).exp().detach()


def per_token_kl(student: TabularPolicy, other: TabularPolicy, sampler: TabularPolicy) -> Tensor:
    """Sum over positions of KL(S||other), prefixes from a fixed ``sampler``."""
    student_STV, other_STV = student.all_log_probs_STV(), other.all_log_probs_STV().detach()
    kl_ST = (student_STV.exp() * (student_STV - other_STV)).sum(-1)
    return (response_probs(sampler)[:, None] * kl_ST).sum()


def sequence_kl(student: TabularPolicy, other: TabularPolicy) -> Tensor:
    student_S, other_S = student.log_probs_ST().sum(1), other.log_probs_ST().sum(1).detach()
    return (student_S.exp() * (student_S - other_S)).sum()


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def expected_policy_gradient(
    student: TabularPolicy,
    *,
    objective: ObjectiveOptions,
    sampler: TabularPolicy | None = None,
    advantages_ST: Tensor | None = None,
    teacher: TabularPolicy | None = None,
    reference: TabularPolicy | None = None,
    opd_coef: float | None = None,
    baseline_ST: Tensor | None = None,
    future_ST: Tensor | None = None,
    mask_T: Tensor | None = None,
) -> Tensor:
    log_probs_ST = student.log_probs_ST()
    inputs = PolicyInputs(
        log_probs_N=log_probs_ST.flatten(),
        advantages_N=torch.zeros(len(RESPONSES_ST) * T, dtype=torch.float64)
        if advantages_ST is None
        else advantages_ST.flatten(),
        loss_weights_N=response_probs(sampler or student).repeat_interleave(T),
        loss_mask_N=(torch.ones(T, dtype=torch.bool) if mask_T is None else mask_T).repeat(len(RESPONSES_ST)),
        sequences=Sequences(torch.arange(len(RESPONSES_ST)).repeat_interleave(T), len(RESPONSES_ST)),
        old_log_probs_N=None if sampler is None else sampler.log_probs_ST().detach().flatten(),
        teacher_log_probs_N=None if teacher is None else teacher.log_probs_ST().detach().flatten(),
        ref_log_probs_N=None if reference is None else reference.log_probs_ST().detach().flatten(),
        opd_baseline_N=None if baseline_ST is None else baseline_ST.flatten(),
        opd_future_N=None if future_ST is None else future_ST.flatten(),
    )
    loss, _ = policy_objective(inputs, objective, opd_coef)
    return student.gradient(loss)


@pytest.fixture
def student() -> TabularPolicy:
    return TabularPolicy(1)


@pytest.fixture
def teacher() -> TabularPolicy:
    return TabularPolicy(2, scale=1.5)


def test_opd_gradient_is_that_of_the_per_token_reverse_kl(student: TabularPolicy, teacher: TabularPolicy) -> None:
    got = expected_policy_gradient(student, objective=ObjectiveOptions(), teacher=teacher, opd_coef=0.7)
    exact = student.gradient(0.7 * per_token_kl(student, teacher, sampler=student))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-14)
    # The immediate term is not the gradient of the KL between whole responses, ...
    whole = student.gradient(0.7 * sequence_kl(student, teacher))
    assert relative_error(got, whole) > 0.1
    # ... nor that of the forward KL.
    assert relative_error(got, student.gradient(0.7 * per_token_kl_forward(student, teacher))) > 0.1


def per_token_kl_forward(student: TabularPolicy, other: TabularPolicy) -> Tensor:
    student_STV, other_STV = student.all_log_probs_STV(), other.all_log_probs_STV().detach()
    kl_ST = (other_STV.exp() * (other_STV - student_STV)).sum(-1)
    return (response_probs(student)[:, None] * kl_ST).sum()


def baselines(student: TabularPolicy, teacher: TabularPolicy) -> dict[str, Tensor]:
    """The exact KL of each position, and the baseline that weighs each action by its squared score."""
    log_p, log_q = student.all_log_probs_STV().detach(), teacher.all_log_probs_STV().detach()
    weight = log_p.exp() * (1 - 2 * log_p.exp() + log_p.exp().square().sum(-1, keepdim=True))
    return {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "optimal": (weight * (log_p - log_q)).sum(-1) / weight.sum(-1),
    }


@pytest.mark.parametrize("name", ["kl", "optimal"])
def test_a_baseline_leaves_the_expected_gradient(name: str, student: TabularPolicy, teacher: TabularPolicy) -> None:
    plain, based = (
        expected_policy_gradient(
            student, objective=ObjectiveOptions(), teacher=teacher, opd_coef=0.7, baseline_ST=baseline_ST
        )
        for baseline_ST in (None, baselines(student, teacher)[name])
    )
    torch.testing.assert_close(based, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_the_optimal_baseline_has_the_least_noise(seed: int) -> None:
    teacher = TabularPolicy(seed, scale=3.0)
    student = teacher.near(seed + 50, distance=0.5)

    def noise(baseline_ST: Tensor | float) -> float:
        """Summed variance of the gradient of one sampled response."""
        advantages_ST = (student.log_probs_ST() - teacher.log_probs_ST()).detach() - baseline_ST
        gradients = torch.stack(
            [
                student.gradient((advantages_T * log_probs_T).sum())
                for advantages_T, log_probs_T in zip(advantages_ST, student.log_probs_ST(), strict=True)
            ]
        )
        probs_S1 = response_probs(student)[:, None]
        return ((probs_S1 * gradients**2).sum() - (probs_S1 * gradients).sum(0).square().sum()).item()

    found = baselines(student, teacher)
    assert noise(found["optimal"]) < 0.95 * min(noise(0.0), noise(found["kl"]))


def test_opd_descends(student: TabularPolicy, teacher: TabularPolicy) -> None:
    before = sequence_kl(student, teacher).item()
    for _ in range(200):
        step = expected_policy_gradient(student, objective=ObjectiveOptions(), teacher=teacher, opd_coef=1.0)
        sizes = [logits.numel() for logits in student.logits]
        for logits, change in zip(student.logits, step.split(sizes), strict=True):
            logits.data -= 2.0 * change.view_as(logits)
    assert sequence_kl(student, teacher).item() < 0.05 * before


@pytest.mark.parametrize("holes", [False, True])
def test_future_distances_lead_from_the_per_token_kl_to_that_of_whole_responses(
    student: TabularPolicy, teacher: TabularPolicy, holes: bool
) -> None:
    """With ``holes`` the second token is not the student's own: it is no step of time and has no distance."""
    exact = {0.0: per_token_kl(student, teacher, sampler=student), 1.0: sequence_kl(student, teacher)}
    mask_T = torch.tensor([True, not holes, True])
    log_probs_ST, teacher_ST = student.log_probs_ST().detach(), teacher.log_probs_ST().detach()
    count = len(RESPONSES_ST)
    got = {}
    for discount in (0.0, 0.5, 1.0):
        future = future_distances(
            list(log_probs_ST),
            list(torch.where(mask_T, teacher_ST, math.nan)),
            [mask_T] * count,
            [mask_T] * count,
            discount=discount,
        )
        got[discount] = expected_policy_gradient(
            student,
            objective=ObjectiveOptions(),
            teacher=teacher,
            opd_coef=1.0,
            future_ST=torch.stack(future),
            mask_T=mask_T,
        )
    if holes:
        d_ST = torch.where(mask_T, log_ratio(log_probs_ST, teacher_ST), 0.0)
        reward_S = response_probs(student) * d_ST.sum(1)
        scored_S = torch.where(mask_T, student.log_probs_ST(), 0.0).sum(1)
        # the tokens of others are sampled all the same, so a response's probability is that of all its tokens
        torch.testing.assert_close(got[1.0], student.gradient((reward_S * scored_S).sum()), rtol=0, atol=1e-10)
        return
    for discount in (0.0, 1.0):
        torch.testing.assert_close(got[discount], student.gradient(exact[discount]), rtol=0, atol=1e-10)
        assert relative_error(got[0.5], student.gradient(exact[discount])) > 0.05


@pytest.mark.parametrize("length", [1, 2])
def test_a_prefix_descends_the_kl_of_its_own_positions(
    student: TabularPolicy, teacher: TabularPolicy, length: int
) -> None:
    """The first tokens alone: per token at discount 0, the KL of their distribution as a whole at discount 1."""
    mask_T = torch.arange(T) < length
    log_probs_ST, teacher_ST = student.log_probs_ST(), teacher.log_probs_ST().detach()
    apart_STV = student.all_log_probs_STV() - teacher.all_log_probs_STV().detach()
    kl_ST = (student.all_log_probs_STV().exp() * apart_STV).sum(-1)
    exact = {
        0.0: (response_probs(student).detach()[:, None] * kl_ST)[:, :length].sum(),
        1.0: (log_probs_ST.sum(1).exp() * (log_probs_ST - teacher_ST)[:, :length].sum(1)).sum(),
    }
    for discount, value in exact.items():
        masks = [mask_T] * len(RESPONSES_ST)
        future = future_distances(list(log_probs_ST.detach()), list(teacher_ST), masks, masks, discount=discount)
        got = expected_policy_gradient(
            student,
            objective=ObjectiveOptions(),
            teacher=teacher,
            opd_coef=1.0,
            future_ST=torch.stack(future),
            mask_T=mask_T,
        )
        torch.testing.assert_close(got, student.gradient(value), rtol=0, atol=1e-10)


def test_future_distances_of_one_response() -> None:
    student, teacher = np.array([-1.0, -2.0, -0.5, -4.0]), np.array([-2.0, np.nan, -0.1, -1.0])
    mask, valid = np.array([True, True, False, True]), np.array([True, False, True, True])
    (found,) = future_distances([student], [teacher], [mask], [valid], discount=0.5)
    # d = 1, 0 (not scored), none (masked), -3
    torch.testing.assert_close(found, torch.tensor([0.25 * -3.0, 0.5 * -3.0, 0.0, 0.0]).double())
    (clipped,) = future_distances([student], [teacher], [mask], [valid], discount=0.5, limit=2.0)
    torch.testing.assert_close(clipped, torch.tensor([0.25 * -2.0, 0.5 * -2.0, 0.0, 0.0]).double())
    assert future_distances([student[:0]], [teacher[:0]], [mask[:0]], [valid[:0]], discount=1.0)[0].shape == (0,)
    with pytest.raises(ValueError, match="between 0 and 1"):
        future_distances([], [], [], [], discount=1.5)


def test_the_importance_weighted_term_has_the_gradient_of_the_current_students_kl(
    student: TabularPolicy, teacher: TabularPolicy
) -> None:
    sampler = student.near(seed=3, distance=0.3)
    term_N = importance_weighted_term(
        student.log_probs_ST().flatten(),
        sampler.log_probs_ST().detach().flatten(),
        teacher.log_probs_ST().detach().flatten(),
        torch.ones(len(RESPONSES_ST) * T, dtype=torch.bool),
    )
    got = student.gradient((response_probs(sampler).repeat_interleave(T) * term_N).sum())
    # At the first token the prefix is the same for both; later prefixes are those of the old weights.
    exact = student.gradient(per_token_kl(student, teacher, sampler=sampler))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-14)
    fresh = student.gradient(per_token_kl(student, teacher, sampler=student))
    assert relative_error(got, fresh) > 0.05


def test_the_importance_weighted_term_of_unscored_tokens_is_nothing() -> None:
    log_probs_N = torch.tensor([-1.0, math.nan, -2.0], requires_grad=True)
    old_N, teacher_N = torch.tensor([-1.0, math.nan, -3.0]), torch.tensor([-3.0, math.nan, -2.5])
    term_N = importance_weighted_term(log_probs_N, old_N, teacher_N, torch.tensor([True, False, True]), limit=1.0)
    torch.testing.assert_close(term_N.detach(), torch.tensor([1.0, 0.0, math.e * 0.5]))
    (gradient_N,) = torch.autograd.grad(term_N.sum(), log_probs_N)
    torch.testing.assert_close(gradient_N, torch.tensor([1.0, 0.0, math.e * 0.5]))


def test_opd_off_policy_keeps_the_distance_of_the_sampling_weights(
    student: TabularPolicy, teacher: TabularPolicy
) -> None:
    sampler = student.near(seed=3, distance=0.3)
    objective = ObjectiveOptions(eps_clip=0.999, eps_clip_high=100.0)
    got = expected_policy_gradient(student, objective=objective, sampler=sampler, teacher=teacher, opd_coef=1.3)

    def surrogate(distance_STV: Tensor) -> Tensor:
        kl_ST = (student.all_log_probs_STV().exp() * distance_STV.detach()).sum(-1)
        return 1.3 * (response_probs(sampler)[:, None] * kl_ST).sum()

    teacher_STV = teacher.all_log_probs_STV()
    exact = student.gradient(surrogate(sampler.all_log_probs_STV() - teacher_STV))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-14)
    assert relative_error(got, student.gradient(surrogate(student.all_log_probs_STV() - teacher_STV))) > 0.05


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "none"])
def test_whitening_leaves_the_opd_coefficient_alone(
    student: TabularPolicy, teacher: TabularPolicy, estimator: str
) -> None:
    objective = ObjectiveOptions(advantage_estimator=estimator, normalize_advantages=True)
    count = len(RESPONSES_ST)
    masks = [torch.ones(T, dtype=torch.bool)] * count
    advantages_ST = torch.stack(task_advantages(objective, [0.0] * count, [0] * count, masks)).double()
    gradients = {
        coef: expected_policy_gradient(
            student, objective=objective, advantages_ST=advantages_ST, teacher=teacher, opd_coef=coef
        )
        for coef in (0.25, 1.0)
    }
    assert gradients[1.0].norm() > 0.1
    torch.testing.assert_close(gradients[0.25], 0.25 * gradients[1.0], rtol=0, atol=1e-15)
    # Whitened together with the distillation term, the task's zeros would have cancelled the coefficient.
    distance_ST = log_ratio(student.log_probs_ST(), teacher.log_probs_ST())
    whitened = [coef * distance_ST / (coef * distance_ST).std() for coef in (0.25, 1.0)]
    torch.testing.assert_close(whitened[0], whitened[1])


@pytest.mark.parametrize("kl_coef", [0.0, 0.8])
def test_task_advantages_with_kl_in_the_reward_give_the_gradient_of_the_regularised_return(
    student: TabularPolicy, kl_coef: float
) -> None:
    # The group's mean is a constant baseline here, as all responses are one group, so the expectation is exact.
    reference = TabularPolicy(5)
    rewards = torch.randn(len(RESPONSES_ST), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    kls = list(log_ratio(student.log_probs_ST(), reference.log_probs_ST()))
    masks = [torch.ones(T, dtype=torch.bool)] * len(RESPONSES_ST)
    student_S = student.log_probs_ST().sum(1).exp()
    exact = student.gradient(kl_coef * sequence_kl(student, reference) - (student_S * rewards).sum())
    for estimator in ("grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        objective = ObjectiveOptions(
            advantage_estimator=estimator, disable_grpo_std_normalization=True, kl_coef=kl_coef
        )
        advantages = task_advantages(objective, rewards.tolist(), [0] * len(rewards), masks, kls)
        got = expected_policy_gradient(student, objective=objective, advantages_ST=torch.stack(advantages).double())
        # Whitening, part of both REINFORCE++ forms, changes the length only. Advantages are float32.
        cosine = torch.nn.functional.cosine_similarity(got, exact, dim=0).item()
        assert cosine == pytest.approx(1.0, abs=1e-10), estimator
        if estimator == "grpo":
            assert relative_error(got, exact) < 1e-6


@pytest.mark.parametrize("kind", sorted(KL_LOSSES))
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_loss_has_the_gradient_of_the_reverse_kl(student: TabularPolicy, kind: str, on_policy: bool) -> None:
    reference = TabularPolicy(4)
    sampler = None if on_policy else student.near(seed=7, distance=0.7)
    objective = ObjectiveOptions(use_kl_loss=True, kl_loss_coef=0.6, kl_loss_type=kind)
    got = expected_policy_gradient(student, objective=objective, sampler=sampler, reference=reference)
    exact = student.gradient(0.6 * per_token_kl(student, reference, sampler or student))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_straight_through_forms_show_the_kl(student: TabularPolicy, kind: str) -> None:
    """Their value is the estimate's, whose mean is the KL; their gradient is that of k2, token by token."""
    reference, sampler = TabularPolicy(4), student.near(seed=7, distance=0.7)
    log_probs_N, ref_N, old_N = (policy.log_probs_ST().flatten() for policy in (student, reference, sampler))
    through_N, k2_N = (kl_loss(name, log_probs_N, ref_N, old_N) for name in (f"{kind}+", "k2"))
    ratio_N = (log_probs_N - old_N).exp()
    torch.testing.assert_close(through_N, ratio_N * kl_estimate(kind, log_probs_N - ref_N))
    gradients = [torch.autograd.grad(loss_N.sum(), log_probs_N, retain_graph=True)[0] for loss_N in (through_N, k2_N)]
    torch.testing.assert_close(gradients[0], gradients[1])
    mean = (response_probs(sampler).repeat_interleave(T) * through_N).sum()
    torch.testing.assert_close(mean, per_token_kl(student, reference, sampler))


def test_kl_estimates_are_unbiased_but_wrong_when_backpropagated_as_they_stand(student: TabularPolicy) -> None:
    reference = TabularPolicy(4)
    exact = per_token_kl(student, reference, student)
    weights_S1 = response_probs(student)[:, None]
    distance_ST = student.log_probs_ST() - reference.log_probs_ST().detach()
    expectation = {kind: (weights_S1 * kl_estimate(kind, distance_ST)).sum() for kind in ("k1", "k2", "k3")}
    assert expectation["k1"].item() == pytest.approx(exact.item(), abs=1e-14)
    assert expectation["k3"].item() == pytest.approx(exact.item(), abs=1e-14)
    assert abs(expectation["k2"].item() - exact.item()) > 1e-3
    assert student.gradient(expectation["k1"]).abs().max() < 1e-14
    forward = student.gradient(per_token_kl_forward(student, reference))
    torch.testing.assert_close(student.gradient(expectation["k3"]), forward, rtol=0, atol=1e-14)
    assert relative_error(forward, student.gradient(per_token_kl(student, reference, student))) > 0.1


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_off_policy_kl_loss_is_differentiable_in_its_ratio(kind: str) -> None:
    generator = torch.Generator().manual_seed(11)
    log_probs_N, ref_N, old_N = -torch.rand(3, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda current_N: kl_loss(kind, current_N, ref_N, old_N), log_probs_N.clone().requires_grad_()
    )


def test_k3_is_clamped_inside_the_exponential_only() -> None:
    log_ratio_N = torch.tensor([-90.0, -30.0, 0.0, 30.0, 90.0], requires_grad=True)
    values_N = kl_estimate("k3", log_ratio_N)
    assert values_N.isfinite().all()
    (gradient_N,) = torch.autograd.grad(values_N.sum(), log_ratio_N)
    # The linear term keeps its gradient where the exponential is cut off.
    torch.testing.assert_close(gradient_N, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))


def test_unknown_kl_estimator_is_an_error() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate("k4", torch.zeros(2))
