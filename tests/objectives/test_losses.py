from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.kl import KL_LOSSES
from opd_megatron.objectives.losses import PolicyInputs, policy_objective, sft_objective
from opd_megatron.objectives.sequences import Sequences
from opd_megatron.objectives.statistics import finalize_statistics, merge_statistics
from opd_megatron.objectives.weights import token_loss_weights

LENGTHS = (4, 0, 7, 1, 3, 5, 2, 6)
EVERYTHING = ObjectiveOptions(
    eps_clip_high=0.3, eps_clip_c=3.0, entropy_coef=0.01, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3"
)


def random_inputs(seed: int, per_token: bool = False) -> PolicyInputs:
    """A step of eight samples with masked tokens, unscored tokens, an empty response and a wholly masked one."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(LENGTHS)

    def draw() -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    mask_N = draw() < 0.75
    mask_N[sum(LENGTHS[:4]) : sum(LENGTHS[:5])] = False
    old_N = -3 * draw()
    return PolicyInputs(
        log_probs_N=(old_N + draw() - 0.5).requires_grad_(),
        advantages_N=4 * draw() - 2,
        loss_weights_N=torch.cat(token_loss_weights(mask_N.split(LENGTHS), per_token)).double(),
        loss_mask_N=mask_N,
        sequences=sequences_of(range(len(LENGTHS))),
        old_log_probs_N=old_N,
        rollout_log_probs_N=old_N + 0.6 * (draw() - 0.5),
        teacher_log_probs_N=-3 * draw(),
        teacher_valid_N=draw() < 0.9,
        opd_baseline_N=draw(),
        opd_future_N=draw(),
        opd_divergence_N=draw().requires_grad_(),
        ref_log_probs_N=-3 * draw(),
        entropy_N=draw().requires_grad_(),
    )


def given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def sequences_of(samples: Iterable[int]) -> Sequences:
    lengths = torch.tensor([LENGTHS[sample] for sample in samples], dtype=torch.int64)
    return Sequences(torch.arange(len(lengths)).repeat_interleave(lengths), len(lengths))


def select(inputs: PolicyInputs, samples: list[int]) -> PolicyInputs:
    """The micro-batch of these samples."""
    positions_N = positions_of(samples)
    given_ones = {item.name: getattr(inputs, item.name) for item in fields(inputs) if item.name != "sequences"}
    chosen = {name: values_N[positions_N] for name, values_N in given_ones.items() if values_N is not None}
    return replace(inputs, sequences=sequences_of(samples), **chosen)


def positions_of(samples: list[int]) -> Tensor:
    starts = torch.tensor((0, *LENGTHS)).cumsum(0)
    ranges = [torch.arange(int(starts[s]), int(starts[s + 1])) for s in samples]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *ranges])


@pytest.mark.parametrize("per_token", [True, False])
def test_weights_sum_to_one_and_average_as_they_say(per_token: bool) -> None:
    masks = [torch.tensor([1, 0, 1]), torch.tensor([]), torch.tensor([0, 0]), torch.tensor([1])]
    weights = token_loss_weights(masks, per_token)
    third: list[list[float]] = [[1 / 3, 0.0, 1 / 3], [], [0.0, 0.0], [1 / 3]]
    halves: list[list[float]] = [[0.25, 0.0, 0.25], [], [0.0, 0.0], [0.5]]
    for got, expected in zip(weights, third if per_token else halves, strict=True):
        torch.testing.assert_close(got, torch.tensor(expected))
    assert torch.cat(weights).double().sum().item() == pytest.approx(1.0, abs=1e-7)
    assert all((w == 0).all() for w in token_loss_weights([torch.zeros(3), torch.zeros(0)], per_token))
    assert token_loss_weights([], per_token) == []


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    "partition",
    [
        [[s] for s in range(8)],
        [[7, 0], [1], [4], [3, 5, 2], [6]],
        [[0, 1, 2, 3], [], [4, 5, 6, 7]],
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy_loss": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.08},
        {"policy_loss": "cispo", "eps_clip_c": None},
        {"use_tis": True, "tis_level": "sequence", "tis_clip": 1.2},
        {"use_tis": True, "tis_mode": "mask", "tis_clip": 1.2, "tis_clip_low": 0.8},
        {"use_opsm": True, "opsm_delta": 0.01},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()) or "clip",
)
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(
    per_token: bool, partition: list[list[int]], changes: dict[str, Any]
) -> None:
    objective = replace(EVERYTHING, **changes)
    inputs = random_inputs(1, per_token)
    leaves = [inputs.log_probs_N, given(inputs.entropy_N)]
    whole, statistics = policy_objective(inputs, objective, 0.7)
    expected_gradients = torch.autograd.grad(whole, leaves)
    losses, parts = [], []
    for samples in partition:
        loss, part = policy_objective(select(inputs, samples), objective, 0.7)
        losses.append(loss)
        parts.append(part)
    total = torch.stack(losses).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, leaves), expected_gradients)
    expected = finalize_statistics(statistics)
    assert finalize_statistics(merge_statistics(parts)) == pytest.approx(expected)
    assert expected["train/loss"] == pytest.approx(whole.item())
    for name in ("train/tis_clipfrac", "train/opsm_masked_frac", "train/pg_clipfrac"):
        assert 0 < expected.get(name, 0.5) < 1  # something of each kind takes part


def test_loss_is_the_mean_over_sequences_of_their_token_means_or_the_mean_over_tokens() -> None:
    objective = ObjectiveOptions()
    for per_token in (True, False):
        inputs = replace(random_inputs(2, per_token), old_log_probs_N=None)
        loss, _ = policy_objective(inputs, objective, None)
        rows = [
            row[mask]
            for row, mask in zip(inputs.advantages_N.split(LENGTHS), inputs.loss_mask_N.split(LENGTHS), strict=True)
            if mask.any()
        ]
        mean = torch.cat(rows).mean() if per_token else torch.stack([row.mean() for row in rows]).mean()
        torch.testing.assert_close(loss, -mean, rtol=1e-6, atol=1e-6)


def test_metrics_show_both_terms_and_add_up_to_the_loss() -> None:
    inputs = random_inputs(3)
    _, statistics = policy_objective(inputs, EVERYTHING, 0.7)
    means = finalize_statistics(statistics)
    assert set(means) == {
        "train/loss",
        "train/pg_loss",
        "train/pg_clipfrac",
        "train/ratio_mean",
        "train/advantage_mean",
        "train/task_advantage_abs_mean",
        "train/opd_advantage_abs_mean",
        "train/kl_loss",
        "train/entropy",
    }
    assert means["train/loss"] == pytest.approx(
        means["train/pg_loss"] + 0.1 * means["train/kl_loss"] - 0.01 * means["train/entropy"]
    )
    weights_N = inputs.loss_weights_N
    distance_N = given(inputs.old_log_probs_N) - given(inputs.teacher_log_probs_N) - given(inputs.opd_baseline_N)
    distance_N = torch.where(given(inputs.teacher_valid_N), distance_N, 0.0) + given(inputs.opd_future_N)
    assert means["train/opd_advantage_abs_mean"] == pytest.approx((weights_N * 0.7 * distance_N.abs()).sum().item())
    assert means["train/task_advantage_abs_mean"] == pytest.approx((weights_N * inputs.advantages_N.abs()).sum().item())
    assert means["train/advantage_mean"] == pytest.approx(
        (weights_N * (inputs.advantages_N - 0.7 * distance_N)).sum().item()
    )
    assert 0 < means["train/pg_clipfrac"] < 1


def test_without_distillation_the_teacher_is_not_looked_at() -> None:
    inputs = random_inputs(4)
    bare = replace(inputs, teacher_log_probs_N=None, teacher_valid_N=None, entropy_N=None, ref_log_probs_N=None)
    with_teacher, statistics = policy_objective(inputs, ObjectiveOptions(), None)
    without, bare_statistics = policy_objective(bare, ObjectiveOptions(), None)
    assert with_teacher.item() == without.item()
    assert "train/opd_advantage_abs_mean" not in statistics
    assert statistics.keys() - bare_statistics.keys() == {"train/entropy"}


def test_on_policy_is_the_same_with_and_without_old_log_probs() -> None:
    inputs = random_inputs(5)
    explicit = replace(inputs, old_log_probs_N=inputs.log_probs_N.detach().clone())
    implicit = replace(inputs, old_log_probs_N=None)
    results = []
    for case in (explicit, implicit):
        loss, statistics = policy_objective(case, EVERYTHING, 0.7)
        results.append((loss, torch.autograd.grad(loss, case.log_probs_N)[0]))
        assert finalize_statistics(statistics)["train/ratio_mean"] == pytest.approx(1.0)
        assert finalize_statistics(statistics)["train/pg_clipfrac"] == 0
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "changes",
    [
        *({"kl_loss_type": kind} for kind in KL_LOSSES),
        {"policy_loss": "gspo", "use_opsm": True},
        {"policy_loss": "cispo"},
        {"use_tis": True, "tis_level": "sequence"},
        {"use_tis": True, "tis_mode": "mask"},
    ],
    ids=str,
)
def test_masked_positions_may_hold_anything(garbage: float, changes: dict[str, Any]) -> None:
    objective = replace(EVERYTHING, **changes)
    clean = random_inputs(6)
    spoiled = {}
    for item in fields(clean):
        value = getattr(clean, item.name)
        if isinstance(value, Tensor) and value.dtype != torch.bool:
            value = torch.where(clean.loss_mask_N, value.detach(), garbage)
            spoiled[item.name] = value.requires_grad_(item.name in ("log_probs_N", "entropy_N"))
    dirty = replace(clean, **spoiled)
    results = []
    for case in (clean, dirty):
        loss, statistics = policy_objective(case, objective, 0.7)
        gradients = torch.autograd.grad(loss, [case.log_probs_N, given(case.entropy_N)])
        results.append((loss, gradients, merge_statistics([statistics])))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[1][1][0][~clean.loss_mask_N] == 0).all()


def test_unscored_tokens_keep_their_task_advantage() -> None:
    inputs = random_inputs(7)
    nothing_scored = replace(inputs, teacher_valid_N=torch.zeros_like(inputs.loss_mask_N), opd_future_N=None)
    plain, _ = policy_objective(inputs, ObjectiveOptions(), None)
    unscored, _ = policy_objective(nothing_scored, ObjectiveOptions(), 5.0)
    assert unscored.item() == plain.item()
    unscored_nan = torch.where(given(inputs.teacher_valid_N), given(inputs.teacher_log_probs_N), math.nan)
    loss, _ = policy_objective(replace(inputs, teacher_log_probs_N=unscored_nan), ObjectiveOptions(), 5.0)
    assert loss.isfinite()
    assert loss.item() != plain.item()


def test_a_teacher_that_rules_a_token_out_leaves_a_finite_step() -> None:
    inputs = random_inputs(8)
    ruled_out = replace(inputs, teacher_log_probs_N=torch.full_like(inputs.log_probs_N.detach(), -math.inf))
    loss, _ = policy_objective(ruled_out, EVERYTHING, 1.0)
    gradient_N = torch.autograd.grad(loss, inputs.log_probs_N)[0]
    assert loss.isfinite()
    assert gradient_N.isfinite().all()


@pytest.mark.parametrize("size", [0, 5])
def test_micro_batches_without_trained_tokens_have_a_graph_and_no_gradient(size: int) -> None:
    log_probs_N = torch.full((size,), -1.0, requires_grad=True)
    zeros_N = torch.zeros(size)
    sequences = Sequences(torch.zeros(size, dtype=torch.int64), min(size, 1))
    inputs = PolicyInputs(log_probs_N, zeros_N, zeros_N, zeros_N, sequences, teacher_log_probs_N=zeros_N)
    loss, statistics = policy_objective(inputs, ObjectiveOptions(), 1.0)
    sft_loss, _ = sft_objective(log_probs_N, zeros_N, zeros_N)
    for scalar in (loss, sft_loss):
        assert scalar.item() == 0
        (gradient_N,) = torch.autograd.grad(scalar, log_probs_N)
        assert (gradient_N == 0).all()
    assert all(math.isnan(mean) for mean in finalize_statistics(statistics).values())


def test_entropy_bonus_raises_the_entropy() -> None:
    inputs = random_inputs(9)
    loss, _ = policy_objective(inputs, ObjectiveOptions(entropy_coef=0.3), None)
    (gradient_N,) = torch.autograd.grad(loss, given(inputs.entropy_N))
    torch.testing.assert_close(gradient_N, -0.3 * inputs.loss_weights_N)


def test_gradcheck_of_the_whole_objective() -> None:
    inputs = random_inputs(10)
    # Without clipping there are no corners; k3 is differentiable throughout.
    objective = replace(EVERYTHING, eps_clip=0.99, eps_clip_high=50.0, eps_clip_c=None)

    def loss(log_probs_N: Tensor, entropy_N: Tensor) -> Tensor:
        return policy_objective(replace(inputs, log_probs_N=log_probs_N, entropy_N=entropy_N), objective, 0.7)[0]

    assert torch.autograd.gradcheck(loss, (inputs.log_probs_N, given(inputs.entropy_N)))


def test_sft_is_the_weighted_negative_log_likelihood() -> None:
    inputs = random_inputs(11)
    log_probs_N = torch.where(inputs.loss_mask_N, inputs.log_probs_N.detach(), math.nan).requires_grad_()
    loss, statistics = sft_objective(log_probs_N, inputs.loss_weights_N, inputs.loss_mask_N)
    expected = -(inputs.loss_weights_N * inputs.log_probs_N)[inputs.loss_mask_N].sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_probs_N)[0], -inputs.loss_weights_N)
    assert finalize_statistics(statistics)["train/loss"] == pytest.approx(loss.item())


def test_missing_or_misshapen_inputs_are_errors() -> None:
    inputs = random_inputs(12)
    bare = replace(inputs, teacher_log_probs_N=None, ref_log_probs_N=None, entropy_N=None)
    with pytest.raises(ValueError, match="opd_coef needs teacher_log_probs_N"):
        policy_objective(bare, ObjectiveOptions(), 1.0)
    with pytest.raises(ValueError, match="use_kl_loss needs ref_log_probs_N"):
        policy_objective(bare, ObjectiveOptions(use_kl_loss=True), None)
    with pytest.raises(ValueError, match="entropy_coef needs entropy_N"):
        policy_objective(bare, ObjectiveOptions(entropy_coef=0.1), None)
    with pytest.raises(ValueError, match="advantages_N has shape"):
        replace(inputs, advantages_N=torch.zeros(3))


def test_parts_with_other_metrics_are_not_merged() -> None:
    part = {"train/loss": torch.tensor([1.0, 0.5], dtype=torch.float64)}
    assert finalize_statistics(merge_statistics([part, part])) == {"train/loss": 2.0}
    assert merge_statistics([]) == {}
    with pytest.raises(ValueError, match="train/entropy"):
        merge_statistics([part, {**part, "train/entropy": part["train/loss"]}])
