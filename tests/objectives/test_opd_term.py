from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.log_probs import LOG_PROB_FLOOR
from opd_megatron.objectives.losses import PolicyInputs, policy_objective
from opd_megatron.objectives.opd import clip_distance, reverse_kl_statistics, sampled_term
from opd_megatron.objectives.sequences import Sequences
from opd_megatron.objectives.weights import scored_opd_weights, token_loss_weights

KEYS = {
    "opd/reverse_kl",
    "opd/reverse_kl_se",
    "opd/k3",
    "opd/student_log_prob",
    "opd/teacher_log_prob",
    "opd/student_perplexity",
    "opd/teacher_perplexity",
    "opd/perplexity_gap",
    "opd/floored_frac",
    "opd/scored_frac",
    "opd/tokens",
}


def test_the_term_is_there_on_valid_tokens_only() -> None:
    student_N = torch.tensor([-1.0, math.nan, -0.5], requires_grad=True)
    teacher_N = torch.tensor([-3.0, -math.inf, -0.25])
    got_N = sampled_term(student_N, teacher_N, torch.tensor([True, False, True]))
    # The student likes the first token more than the teacher does: its advantage falls.
    torch.testing.assert_close(got_N, torch.tensor([-2.0, 0.0, 0.25]))
    assert not got_N.requires_grad


def test_baseline_clip_and_future_enter_in_this_order() -> None:
    student_N, teacher_N = torch.tensor([-1.0, -1.0]), torch.tensor([-4.0, -4.0])
    got_N = sampled_term(
        student_N,
        teacher_N,
        torch.tensor([True, False]),
        baseline_N=torch.tensor([0.5, 0.5]),
        limit=2.0,
        future_N=torch.tensor([10.0, 10.0]),
    )
    # a token that the teacher did not score still has a future
    torch.testing.assert_close(got_N, torch.tensor([-(2.0 - 0.5 + 10.0), -10.0]))
    assert clip_distance(torch.tensor([-5.0]), None).item() == -5.0


def test_tokens_that_the_teacher_rules_out_are_pushed_away_with_a_finite_force() -> None:
    student_N = torch.full((4,), -1.0)
    teacher_N = torch.tensor([-math.inf, -200.0, -100.0, -1.0])
    got_N = sampled_term(student_N, teacher_N, torch.ones(4, dtype=torch.bool))
    floored = LOG_PROB_FLOOR + 1.0
    torch.testing.assert_close(got_N, torch.tensor([floored, floored, -99.0, 0.0]))
    assert np.float32(math.exp(LOG_PROB_FLOOR)) > 0 == np.float32(math.exp(LOG_PROB_FLOOR - 1))


def test_a_valid_nan_is_not_hidden() -> None:
    got_N = sampled_term(torch.zeros(1), torch.tensor([math.nan]), torch.ones(1, dtype=torch.bool))
    assert got_N.isnan().all()


def test_statistics_of_known_numbers() -> None:
    student = [torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-0.5]), torch.tensor([])]
    teacher = [torch.tensor([-2.0, -2.5, math.nan]), torch.tensor([-0.1]), torch.tensor([])]
    masks = [torch.tensor([True, True, True]), torch.tensor([True]), torch.tensor([]).bool()]
    valid = [torch.tensor([True, True, False]), torch.tensor([True]), torch.tensor([]).bool()]
    got = reverse_kl_statistics(student, teacher, masks, valid)
    assert set(got) == KEYS
    d = [1.0, 0.5, -0.4]
    mean = sum(d) / 3
    assert got["opd/reverse_kl"] == pytest.approx(mean)
    residuals = (1.5 - 2 * mean, -0.4 - mean)
    assert got["opd/reverse_kl_se"] == pytest.approx(math.sqrt(2 * sum(r * r for r in residuals)) / 3)
    assert got["opd/k3"] == pytest.approx(sum(math.exp(-x) + x - 1 for x in d) / 3)
    assert got["opd/student_log_prob"] == pytest.approx(-3.5 / 3)
    assert got["opd/teacher_log_prob"] == pytest.approx(-4.6 / 3)
    assert got["opd/student_perplexity"] == pytest.approx(math.exp(3.5 / 3))
    assert got["opd/teacher_perplexity"] == pytest.approx(math.exp(4.6 / 3))
    assert got["opd/perplexity_gap"] == pytest.approx(math.exp(4.6 / 3) - math.exp(3.5 / 3))
    assert got["opd/scored_frac"] == pytest.approx(0.75)
    assert got["opd/tokens"] == 3
    assert got["opd/floored_frac"] == 0


def test_loss_mask_keeps_tokens_out() -> None:
    student = [np.array([-1.0, np.nan, -1.0], dtype=np.float32), np.array([-2.0], dtype=np.float32)]
    teacher = [np.array([-2.0, -1.0, -3.0], dtype=np.float32), np.array([-2.0], dtype=np.float32)]
    masks = [np.array([True, False, True]), np.array([True])]
    got = reverse_kl_statistics(student, teacher, masks)
    assert got["opd/reverse_kl"] == pytest.approx(1.0)
    assert (got["opd/tokens"], got["opd/scored_frac"]) == (3, 1.0)


def test_ruled_out_tokens_are_counted() -> None:
    mask = [torch.ones(4, dtype=torch.bool)]
    got = reverse_kl_statistics([torch.full((4,), -1.0)], [torch.tensor([-math.inf, -1.0, -1.0, -1.0])], mask)
    assert got["opd/floored_frac"] == 0.25
    assert got["opd/reverse_kl"] == pytest.approx((-1.0 - LOG_PROB_FLOOR) / 4)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens_at_all_have_all_keys_and_no_mean(lengths: list[int]) -> None:
    tensors = [torch.zeros(length) for length in lengths]
    got = reverse_kl_statistics(tensors, tensors, tensors)
    assert set(got) == KEYS
    assert got.pop("opd/tokens") == 0
    assert all(math.isnan(mean) for mean in got.values())


def test_one_sample_has_a_mean_without_a_standard_error() -> None:
    got = reverse_kl_statistics([torch.zeros(2)], [torch.full((2,), -1.0)], [torch.ones(2)])
    assert got["opd/reverse_kl"] == 1.0
    assert math.isnan(got["opd/reverse_kl_se"])


def test_standard_error_is_the_spread_of_the_mean_over_rollouts() -> None:
    # Tokens of a response share an offset, so an error that took them as independent would be far too small.
    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    for _ in range(300):
        offsets = torch.randn(60, generator=generator)
        lengths = torch.randint(1, 30, (60,), generator=generator).tolist()
        distances = [
            offset + 0.3 * torch.randn(length, generator=generator)
            for offset, length in zip(offsets, lengths, strict=True)
        ]
        zeros = [torch.zeros(length) for length in lengths]
        got = reverse_kl_statistics(zeros, [-d for d in distances], [torch.ones(length) for length in lengths])
        means.append(got["opd/reverse_kl"])
        errors.append(got["opd/reverse_kl_se"])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_lengths_are_checked() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="sample 1: 2 student and 3 teacher"):
        reverse_kl_statistics([two, two], [two, three], [two, two])
    with pytest.raises(ValueError, match="shorter"):
        reverse_kl_statistics([two, two], [two], [two, two])


def sequences_of_lengths(lengths: list[int]) -> Sequences:
    return Sequences(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), len(lengths))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_a_masked_term_is_the_scored_sum_times_n_over_n_scored(per_token: bool, micro_batch: int) -> None:
    """Gradient of the loss with masked samples, against the sum over scored tokens written down, in float64."""
    generator = torch.Generator().manual_seed(3)
    lengths, scored = [4, 1, 7, 3, 6], [True, False, True, True, False]
    masks = [torch.rand(length, generator=generator) < 0.8 for length in lengths]
    student = [-torch.rand(length, generator=generator).double() for length in lengths]
    teacher = [-torch.rand(length, generator=generator).double() for length in lengths]
    weights = token_loss_weights(masks, per_token)
    opd_weights = scored_opd_weights(weights, scored)
    nothing = torch.full((), math.nan).double()
    found = []
    for first in range(0, 5, micro_batch):
        here = slice(first, first + micro_batch)
        log_probs_N = torch.cat(student[here]).requires_grad_()
        valid = [torch.full((length,), known) for length, known in zip(lengths[here], scored[here], strict=True)]
        answers = [t if known else nothing.expand_as(t) for t, known in zip(teacher[here], scored[here], strict=True)]
        inputs = PolicyInputs(
            log_probs_N=log_probs_N,
            advantages_N=torch.zeros_like(log_probs_N),
            loss_weights_N=torch.cat(weights[here]).double(),
            loss_mask_N=torch.cat(masks[here]),
            sequences=sequences_of_lengths(lengths[here]),
            teacher_log_probs_N=torch.cat(answers),
            teacher_valid_N=torch.cat(valid),
            opd_weights_N=torch.cat(opd_weights[here]).double(),
        )
        policy_objective(inputs, ObjectiveOptions(), 0.7)[0].backward()
        assert log_probs_N.grad is not None
        found.append(log_probs_N.grad)
    tokens = sum(int(mask.sum()) for mask in masks)
    each = [mask.double() / (tokens if per_token else 5 * mask.sum().clamp(min=1)) for mask in masks]
    kept = sum(float(w.sum()) for w, known in zip(each, scored, strict=True) if known)
    # d/d log p of -w * A with A = -coef * (log p_S - log p_T), detached
    expected = [
        (w * 0.7 * (s - t) / kept) if known else torch.zeros_like(w)
        for w, s, t, known in zip(each, student, teacher, scored, strict=True)
    ]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-6, atol=1e-9)


def test_without_a_scored_sample_the_term_is_gone() -> None:
    weights = token_loss_weights([torch.ones(3), torch.ones(2)], True)
    assert all(not weights_T.any() for weights_T in scored_opd_weights(weights, [False, False]))
    assert all((weights_T == 1).all() for weights_T in scored_opd_weights(weights, [True, True]))
