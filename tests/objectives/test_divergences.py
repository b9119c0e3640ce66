"""Divergences class by class: values, slopes as gradients, and probabilities of 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_megatron.objectives.divergences import (
    Divergence,
    alpha_divergence,
    entropy_aware,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    weighted_sum,
)
from opd_megatron.objectives.log_probs import LOG_PROB_FLOOR

ALL: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd_0.1": jensen_shannon(0.1),
    "jsd_0.5": jensen_shannon(0.5),
    "scaled_jsd_0.001": jensen_shannon(0.001, scaled=True),
    "scaled_jsd_0.9": jensen_shannon(0.9, scaled=True),
    "skew_kl_0.1": skew_kl(0.1),
    "skew_reverse_kl_0.1": skew_reverse_kl(0.1),
    "alpha_0.3": alpha_divergence(0.3),
    "alpha_0.9": alpha_divergence(0.9),
    "sum": weighted_sum([(0.3, forward_kl), (0.7, reverse_kl)]),
}
every_divergence = pytest.mark.parametrize("divergence", ALL.values(), ids=list(ALL))


def random_logits(seed: int) -> Tensor:
    return 2 * torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kl(left: Tensor, right: Tensor) -> Tensor:
    return (left * (left / right).log()).sum(-1)


def value(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(student.log_softmax(-1), teacher.log_softmax(-1))[0].sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


Definition = Callable[[Tensor, Tensor], Tensor]
"""Student's and teacher's probabilities to the divergence, written out."""

DEFINITIONS: dict[str, tuple[Divergence, Definition]] = {
    "reverse_kl": (reverse_kl, lambda p, q: kl(p, q)),
    "forward_kl": (forward_kl, lambda p, q: kl(q, p)),
    **{f"jsd {beta}": (jensen_shannon(beta), lambda p, q, beta=beta: jsd(p, q, beta)) for beta in (0.1, 0.5, 0.9)},
    **{
        f"jsd {beta}, scaled": (
            jensen_shannon(beta, scaled=True),
            lambda p, q, beta=beta: jsd(p, q, beta) / (beta * (1 - beta)),
        )
        for beta in (0.01, 0.5, 0.9)
    },
    "jsd 0": (jensen_shannon(0.0), lambda p, q: kl(q, p)),
    "jsd 1": (jensen_shannon(1.0), lambda p, q: kl(p, q)),
    **{
        f"skew_kl {share}": (skew_kl(share), lambda p, q, share=share: kl(q, share * q + (1 - share) * p))
        for share in (0.0, 0.1, 0.6)
    },
    **{
        f"skew_reverse_kl {share}": (
            skew_reverse_kl(share),
            lambda p, q, share=share: kl(p, (1 - share) * q + share * p),
        )
        for share in (0.0, 0.1, 0.6)
    },
    **{
        f"alpha {alpha}": (
            alpha_divergence(alpha),
            lambda p, q, alpha=alpha: ((q**alpha * p ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1)),
        )
        for alpha in (0.1, 0.5, 0.9)
    },
    "alpha 0": (alpha_divergence(0.0), lambda p, q: kl(p, q)),
    "alpha 1": (alpha_divergence(1.0), lambda p, q: kl(q, p)),
    "sum": (
        weighted_sum([(0.25, forward_kl), (2.0, reverse_kl)]),
        lambda p, q: 0.25 * kl(q, p) + 2 * kl(p, q),
    ),
}
defined = pytest.mark.parametrize(("divergence", "definition"), DEFINITIONS.values(), ids=list(DEFINITIONS))


@defined
def test_the_terms_add_up_to_the_definitions(divergence: Divergence, definition: Definition) -> None:
    student, teacher = random_logits(0), random_logits(1)
    expected = definition(student.softmax(-1), teacher.softmax(-1))
    torch.testing.assert_close(value(divergence, student, teacher), expected, rtol=0, atol=1e-12)


@defined
def test_the_slopes_give_the_gradient_of_the_definitions(divergence: Divergence, definition: Definition) -> None:
    """With respect to the student's logits, as the fused kernels make it of the slopes."""
    student, teacher = random_logits(2).requires_grad_(), random_logits(3)
    (expected,) = torch.autograd.grad(definition(student.softmax(-1), teacher.softmax(-1)).sum(), student)
    log_student = student.detach().log_softmax(-1)
    _, slopes = divergence(log_student, teacher.log_softmax(-1))
    found = slopes - log_student.exp() * slopes.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 0.01


@every_divergence
def test_equal_distributions_have_no_distance_and_no_gradient(divergence: Divergence) -> None:
    logs = random_logits(4).log_softmax(-1)
    terms, slopes = divergence(logs, logs)
    torch.testing.assert_close(terms.sum(-1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    gradient = slopes - logs.exp() * slopes.sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, torch.zeros_like(logs), rtol=0, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_probabilities_of_zero_stay_finite(divergence: Divergence, dtype: torch.dtype) -> None:
    values = torch.tensor([-torch.inf, -1e4, LOG_PROB_FLOOR, -1.0, 0.0], dtype=dtype)
    for tensor in divergence(values[:, None].expand(5, 5), values.expand(5, 5)):
        assert torch.isfinite(tensor).all()
    # of no use to either, so of no weight
    assert divergence(values[:1], values[:1])[0].item() == 0.0


def test_a_ruled_out_token_counts_as_the_floor() -> None:
    student, teacher = torch.tensor([-0.5]), torch.tensor([-torch.inf])
    terms, slopes = reverse_kl(student, teacher)
    assert terms.item() == pytest.approx(student.exp().item() * (-0.5 - LOG_PROB_FLOOR))
    assert slopes.item() == terms.item()


Family = Callable[[float], Divergence]


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        (lambda beta: jensen_shannon(beta, scaled=True), {0.0: forward_kl, 1.0: reverse_kl}),
        (alpha_divergence, {0.0: reverse_kl, 1.0: forward_kl}),
        (skew_kl, {0.0: forward_kl}),
        (skew_reverse_kl, {0.0: reverse_kl}),
    ],
    ids=["scaled_jsd", "alpha", "skew_kl", "skew_reverse_kl"],
)
def test_the_ends_are_the_two_kls_and_nothing_jumps_there(family: Family, ends: dict[float, Divergence]) -> None:
    student, teacher = random_logits(5), random_logits(6)
    for end, kl_of_end in ends.items():
        assert family(end) is kl_of_end
        near = family(abs(end - 1e-8))
        torch.testing.assert_close(value(near, student, teacher), value(kl_of_end, student, teacher), rtol=1e-4, atol=0)


def test_the_plain_jensen_shannon_vanishes_at_its_ends_so_beta_0_and_1_are_defined_apart() -> None:
    student, teacher = random_logits(5), random_logits(6)
    assert value(jensen_shannon(1e-6), student, teacher).max() < 1e-4
    assert jensen_shannon(0.0) is forward_kl
    assert jensen_shannon(1.0) is reverse_kl


def test_small_betas_keep_their_precision_in_float32() -> None:
    student, teacher = random_logits(7).float(), random_logits(8).float()
    scaled = jensen_shannon(1e-4, scaled=True)
    torch.testing.assert_close(
        value(scaled, student, teacher).double(),
        value(scaled, student.double(), teacher.double()),
        rtol=1e-4,
        atol=1e-6,
    )


def test_skew_slopes_are_bounded_where_a_probability_vanishes() -> None:
    logs, ruled_out = torch.tensor([-0.1]), torch.tensor([-torch.inf])
    assert skew_reverse_kl(0.1)(logs, ruled_out)[0].item() < -math.log(0.1)
    assert skew_kl(0.1)(ruled_out, logs)[1].abs().item() < 1 / 0.1


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_entropy_aware_distillation_is_its_formula(weight: float) -> None:
    """Value and gradient of ``KL(S||T) + w H(T)/ln V KL(T||S)``, made of slopes as the fused kernels make them."""
    logits, teacher = random_logits(10).requires_grad_(), random_logits(11)
    p, q = logits.softmax(-1), teacher.softmax(-1)
    entropy = torch.special.entr(q).sum(-1)
    exact = kl(p, q) + weight * entropy / math.log(5) * kl(q, p)
    (expected,) = torch.autograd.grad(exact.sum(), logits)
    values, gradients = [], []
    for divergence in (reverse_kl, forward_kl):
        terms, slopes = divergence(logits.detach().log_softmax(-1), teacher.log_softmax(-1))
        values.append(terms.sum(-1).requires_grad_())
        gradients.append(slopes - p.detach() * slopes.sum(-1, keepdim=True))
    found = entropy_aware(*values, entropy.requires_grad_(), vocab_size=5, weight=weight)
    torch.testing.assert_close(found.detach(), exact.detach(), rtol=0, atol=1e-12)
    of_values = torch.autograd.grad(found.sum(), values, materialize_grads=True, retain_graph=True)
    chained = sum(outer[:, None] * inner for outer, inner in zip(of_values, gradients, strict=True))
    torch.testing.assert_close(chained, expected, rtol=0, atol=1e-12)
    assert torch.autograd.grad(found.sum(), entropy, allow_unused=True) == (None,)  # the teacher is a constant


def test_the_less_sure_the_teacher_the_more_the_forward_kl_counts() -> None:
    nothing, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    entropies = torch.tensor([0.0, math.log(7)], dtype=torch.float64)
    assert entropy_aware(nothing, one, entropies, vocab_size=7, weight=3.0).tolist() == pytest.approx([0.0, 3.0])
    with pytest.raises(ValueError, match="weight -1"):
        entropy_aware(nothing, one, entropies, vocab_size=7, weight=-1.0)


def test_a_truncated_top_k_sum_is_not_a_divergence() -> None:
    """The raw sum of ``S log(S/T)`` over the teacher's top two of three tokens, and what a tail makes of it.

    It is negative at ``S = T/e`` on the support, where its gradient is 0 in every free probability, so nothing draws S
    to T from there; at ``S = T`` it draws S away. With the tail as one more class all of this is gone.
    """
    teacher = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    shrunk = torch.tensor([0.6 / math.e, 0.3 / math.e, 1 - 0.9 / math.e], dtype=torch.float64)

    def raw_sum(probabilities: Tensor) -> tuple[float, Tensor]:
        listed = probabilities[:2].clone().requires_grad_()
        total = (listed * (listed / teacher[:2]).log()).sum()
        return total.item(), torch.autograd.grad(total, listed)[0]

    negative, pull = raw_sum(shrunk)
    assert negative == pytest.approx(-0.9 / math.e, abs=1e-12)  # -0.331
    torch.testing.assert_close(pull, torch.zeros_like(pull), rtol=0, atol=1e-12)
    nothing, push = raw_sum(teacher)
    assert nothing == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(push, torch.ones_like(push), rtol=0, atol=1e-12)

    def with_tail(probabilities: Tensor) -> tuple[float, Tensor]:
        """Value, and the gradient of the logits of the three classes."""
        terms, slopes = reverse_kl(probabilities.log(), teacher.log())
        return terms.sum().item(), slopes - probabilities * slopes.sum()

    positive, pull = with_tail(shrunk)
    assert positive > 0.5
    assert pull[:2].max() < -0.1  # descending it gives the listed tokens their mass back
    nothing, pull = with_tail(teacher)
    assert nothing == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(pull, torch.zeros_like(pull), rtol=0, atol=1e-12)
    # at least twice the squared total variation (Pinsker), which is 0 at S = T alone
    generator = torch.Generator().manual_seed(9)
    students = (2 * torch.randn(200, 3, dtype=torch.float64, generator=generator)).log_softmax(-1)
    found = reverse_kl(students, teacher.log().expand_as(students))[0].sum(-1)
    variation = (students.exp() - teacher).abs().sum(-1) / 2
    assert bool((found >= 2 * variation.square() - 1e-12).all())


@given(
    name=st.sampled_from(sorted(ALL)),
    student=st.lists(st.floats(-30, 5), min_size=2, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_never_negative_whatever_the_distributions(name: str, student: list[float], seed: int) -> None:
    teacher = 5 * torch.randn(len(student), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = value(ALL[name], torch.tensor(student, dtype=torch.float64), teacher)
    assert found.item() > -1e-12


@given(name=st.sampled_from(sorted(ALL)), seed=st.integers(0, 2**16))
def test_merging_classes_never_raises_a_divergence(name: str, seed: int) -> None:
    """So K classes with a tail bound the divergence over the vocabulary from below (data processing)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(2))
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    merged = [torch.cat([log[:3], log[3:].logsumexp(0, keepdim=True)]) for log in (p, q)]
    assert ALL[name](*merged)[0].sum() <= ALL[name](p, q)[0].sum() + 1e-12


@pytest.mark.parametrize(
    ("family", "wrong", "message"),
    [
        (jensen_shannon, -0.1, "not between 0 and 1"),
        (jensen_shannon, 1.1, "not between 0 and 1"),
        (alpha_divergence, 1.5, "not between 0 and 1"),
        (skew_kl, 1.0, "not in"),
        (skew_reverse_kl, -0.5, "not in"),
    ],
)
def test_parameters_outside_their_range_are_refused(family: Family, wrong: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(wrong)


@pytest.mark.parametrize("weights", [(), (0.0,), (1.0, -0.5)])
def test_sums_without_a_positive_weight_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights"):
        weighted_sum([(weight, reverse_kl) for weight in weights])
