"""Scores of tokens, and what choosing by them does to a loss: by enumeration of every choice, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_megatron.objectives.token_selection import (
    TOKEN_SCORES,
    keep_probabilities,
    rescaled,
    sampled_tokens,
    token_scores,
    top_tokens,
)

UNITS = st.floats(0.0, 1.0, width=32)
SCORES = st.lists(UNITS, min_size=1, max_size=12).map(lambda values: torch.tensor(values, dtype=torch.float64))


def random_tokens(seed: int, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Entropies and divergences in nats, and which tokens are eligible."""
    generator = torch.Generator().manual_seed(seed)
    entropy, divergence, eligible = torch.rand(3, count, generator=generator, dtype=torch.float64)
    return 3.0 * entropy, math.log(2) * divergence, eligible > 0.3


def test_scores_are_those_of_their_formulas() -> None:
    entropy_N, divergence_N, eligible_N = random_tokens(0)
    entropy_N[~eligible_N], divergence_N[~eligible_N] = torch.nan, 1e9

    def unit(values_N: Tensor) -> Tensor:
        known = values_N[eligible_N]
        return (known - known.min()) / (known.max() - known.min())

    h, d = unit(entropy_N), unit(divergence_N)
    expected = {
        "entropy": h,
        "divergence": d,
        "low_entropy_high_divergence": (1 - h) * d,
        "soft_or": 1 - (1 - h) * (1 - d),
    }
    assert expected.keys() == TOKEN_SCORES.keys()
    for name, values in expected.items():
        found_N = token_scores(name, entropy_N, divergence_N, eligible_N)
        torch.testing.assert_close(found_N[eligible_N], values, rtol=0, atol=1e-14)
        assert not found_N[~eligible_N].any()
        # nats or parts of the largest possible value: the units do not matter
        scaled = token_scores(name, entropy_N / math.log(151936), divergence_N / math.log(2), eligible_N)
        torch.testing.assert_close(scaled, found_N, rtol=0, atol=1e-14)


def test_a_score_of_equal_tokens_says_nothing() -> None:
    equal, eligible = torch.full((4,), 0.7), torch.ones(4, dtype=torch.bool)
    assert rescaled(equal, eligible).tolist() == [0.0] * 4
    assert rescaled(equal, ~eligible).tolist() == [0.0] * 4
    divergence = torch.tensor([0.1, 0.2, 0.3, 0.5])
    torch.testing.assert_close(
        token_scores("soft_or", equal, divergence, eligible), token_scores("divergence", equal, divergence, eligible)
    )


def test_without_a_divergence_there_is_entropy_only() -> None:
    entropy_N, _, eligible_N = random_tokens(1)
    assert token_scores("entropy", entropy_N, None, eligible_N).max() == 1.0
    with pytest.raises(ValueError, match="score soft_or needs the divergence"):
        token_scores("soft_or", entropy_N, None, eligible_N)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_highest_scores_are_kept_and_the_term_keeps_its_size(ratio: float) -> None:
    scores_N, sizes_N, eligible_N = random_tokens(2, count=37)
    weights_N = top_tokens(scores_N, eligible_N, sizes_N, ratio=ratio)
    kept_N = weights_N > 0
    assert kept_N.sum() == math.ceil(ratio * int(eligible_N.sum()))
    assert not kept_N[~eligible_N].any()
    assert scores_N[kept_N].min() > scores_N[eligible_N & ~kept_N].max()
    # the weighted mean of the term over the kept tokens, times what all eligible tokens weigh in the loss
    values_N = torch.randn(37, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean = (sizes_N * values_N)[kept_N].sum() / sizes_N[kept_N].sum()
    total = (weights_N * sizes_N * values_N).sum()
    torch.testing.assert_close(total, mean * sizes_N[eligible_N].sum(), rtol=1e-12, atol=0)


def test_a_least_score_leaves_out_more() -> None:
    scores_N, sizes_N = torch.tensor([0.9, 0.2, 0.6, 0.4]), torch.ones(4)
    eligible_N = torch.ones(4, dtype=torch.bool)
    weights_N = top_tokens(scores_N, eligible_N, sizes_N, ratio=0.75, least=0.5)
    assert weights_N.tolist() == [2.0, 0.0, 2.0, 0.0]
    assert not top_tokens(scores_N, eligible_N, sizes_N, ratio=0.75, least=0.95).any()
    assert not top_tokens(scores_N, ~eligible_N, sizes_N, ratio=0.75).any()


@given(SCORES, st.floats(0.05, 0.95), st.floats(0.01, 1.0))
def test_keep_probabilities_sum_to_the_share_and_follow_the_scores(
    scores_E: Tensor, ratio: float, floor: float
) -> None:
    found_E = keep_probabilities(scores_E, ratio=ratio, floor=floor)
    assert float(found_E.sum()) == pytest.approx(ratio * len(scores_E), rel=1e-9)
    assert float(found_E.min()) >= floor * ratio - 1e-12
    assert float(found_E.max()) <= 1.0
    order = scores_E.argsort()
    assert (found_E[order].diff() >= -1e-9).all()
    # min(1, c score + eps) with one c for all tokens that are neither certain nor without a score
    between_E = (found_E < 1 - 1e-9) & (scores_E > 1e-6)
    slopes = (found_E - floor * ratio)[between_E] / scores_E[between_E]
    if len(slopes) > 1:
        torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-6, atol=1e-9)
    # reversed tokens have reversed probabilities
    reverse_E = keep_probabilities(scores_E.flip(0), ratio=ratio, floor=floor).flip(0)
    torch.testing.assert_close(reverse_E, found_E, rtol=1e-9, atol=1e-12)


def test_equal_scores_are_kept_alike_and_few_scores_are_certain() -> None:
    assert keep_probabilities(torch.zeros(4), ratio=0.3, floor=0.1).tolist() == pytest.approx([0.3] * 4)
    assert keep_probabilities(torch.tensor([0.0, 1.0, 0.0, 0.0]), ratio=0.5, floor=0.1).tolist() == pytest.approx(
        [1 / 3, 1.0, 1 / 3, 1 / 3]
    )
    assert len(keep_probabilities(torch.zeros(0), ratio=0.3, floor=0.1)) == 0


@pytest.mark.parametrize(
    "bad", [{"ratio": 0.5, "floor": 0.0}, {"ratio": 0.0, "floor": 0.1}, {"ratio": 1.1, "floor": 1}]
)
def test_a_hard_cut_off_of_sampled_tokens_does_not_exist(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        keep_probabilities(torch.ones(3), **bad)


@pytest.mark.parametrize("name", ["entropy", "low_entropy_high_divergence", "soft_or"])
def test_the_expected_loss_of_sampled_tokens_is_that_of_all_tokens(name: str) -> None:
    """Over every choice of tokens, with its probability: the loss and its gradient, with the divisor of all tokens."""
    entropy_N, divergence_N, _ = random_tokens(4, count=9)
    eligible_N = torch.tensor([True, True, False, True, True, True, False, True, True])
    scores_N = token_scores(name, entropy_N, divergence_N, eligible_N)
    generator = torch.Generator().manual_seed(5)
    logits_NV = torch.randn(9, 4, generator=generator, dtype=torch.float64).requires_grad_()
    teacher_NV = torch.randn(9, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    student_NV = logits_NV.log_softmax(-1)
    kl_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    sizes_N = torch.rand(9, generator=generator, dtype=torch.float64)
    whole = (sizes_N * kl_N)[eligible_N].sum()
    _, probabilities_N = sampled_tokens(scores_N, eligible_N, torch.ones(9), ratio=0.4, floor=0.2)
    places = eligible_N.nonzero()[:, 0].tolist()
    expected, total = torch.zeros((), dtype=torch.float64), 0.0
    for choice in itertools.product((False, True), repeat=len(places)):
        chance = 1.0
        uniform_N = torch.full((9,), 0.5, dtype=torch.float64)
        for place, kept in zip(places, choice, strict=True):
            probability = float(probabilities_N[place])
            chance *= probability if kept else 1 - probability
            uniform_N[place] = 0.999 * probability if kept else probability
        weights_N, _ = sampled_tokens(scores_N, eligible_N, uniform_N, ratio=0.4, floor=0.2)
        assert ((weights_N > 0)[eligible_N] == torch.tensor(choice)).all() or chance == 0
        expected, total = expected + chance * (weights_N * sizes_N * kl_N).sum(), total + chance
    assert total == pytest.approx(1.0, abs=1e-12)
    assert abs(float(expected - whole)) < 1e-10
    gradients = [torch.autograd.grad(value, logits_NV, retain_graph=True)[0] for value in (expected, whole)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10


def test_the_highest_scores_are_another_objective() -> None:
    """Where the student is certain and wrong, the term of the most uncertain half never sees it."""
    entropy_N, kl_N = torch.tensor([1.0, 0.9, 0.1, 0.0]), torch.tensor([0.1, 0.1, 5.0, 5.0], dtype=torch.float64)
    everything = torch.ones(4, dtype=torch.bool)
    scores_N = token_scores("entropy", entropy_N, None, everything)
    weights_N = top_tokens(scores_N, everything, torch.full((4,), 0.25), ratio=0.5)
    assert float((weights_N * kl_N).mean()) == pytest.approx(0.1)
    assert float(kl_N.mean()) == pytest.approx(2.55)
