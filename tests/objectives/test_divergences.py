"""Divergences class by class: values, slopes as gradients, and probabilities of 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_megatron.objectives.divergences import Divergence, forward_kl, jensen_shannon, reverse_kl
from opd_megatron.objectives.log_probs import LOG_PROB_FLOOR

ALL: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd_0.1": jensen_shannon(0.1),
    "jsd_0.5": jensen_shannon(0.5),
}
every_divergence = pytest.mark.parametrize("divergence", ALL.values(), ids=list(ALL))


def random_logits(seed: int) -> Tensor:
    return 2 * torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kl(left: Tensor, right: Tensor) -> Tensor:
    return (left * (left / right).log()).sum(-1)


def value(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(student.log_softmax(-1), teacher.log_softmax(-1))[0].sum(-1)


def test_the_terms_add_up_to_the_definitions() -> None:
    student, teacher = random_logits(0), random_logits(1)
    p, q = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(value(reverse_kl, student, teacher), kl(p, q))
    torch.testing.assert_close(value(forward_kl, student, teacher), kl(q, p))
    for beta in (0.1, 0.5, 0.9):
        mixture = beta * q + (1 - beta) * p
        expected = beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
        torch.testing.assert_close(value(jensen_shannon(beta), student, teacher), expected)


@every_divergence
def test_the_slopes_give_the_gradient_of_the_logits(divergence: Divergence) -> None:
    student, teacher = random_logits(2).requires_grad_(), random_logits(3)
    log_student = student.log_softmax(-1)
    _, slopes = divergence(log_student.detach(), teacher.log_softmax(-1))
    found = slopes - log_student.exp().detach() * slopes.sum(-1, keepdim=True)
    step = 1e-6
    for column in range(student.shape[1]):
        change = torch.zeros_like(student)
        change[:, column] = step
        up, down = (value(divergence, student.detach() + sign * change, teacher) for sign in (1, -1))
        torch.testing.assert_close(found[:, column], (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


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


def test_the_ends_of_beta_are_the_two_kls() -> None:
    assert jensen_shannon(0.0) is forward_kl
    assert jensen_shannon(1.0) is reverse_kl
    student, teacher = random_logits(5), random_logits(6)
    for beta, end in ((1e-6, forward_kl), (1 - 1e-6, reverse_kl)):
        scaled = value(jensen_shannon(beta), student, teacher) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, value(end, student, teacher), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_other_betas_are_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        jensen_shannon(beta)
