"""Samples that the teacher could not score, through a whole optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.flow.masking import complete_unscored, leave_out_failed
from opd_megatron.questions import LogProbs
from opd_megatron.sample import Sample
from tests.megatron.support import (
    GRADIENT_FLAGS,
    assert_same_tensors,
    load_reference,
    make_options,
    make_samples,
    make_trainer,
    reference_logits,
    save_reference,
    step_gradients,
    tiny_config,
)

FAILED = (1, 4, 9)


def masked_samples() -> list[Sample]:
    """A rollout without a task, in which three samples have no scores."""
    samples = make_samples(17)
    for sample in samples:
        assert sample.teacher_scores is not None
        sample.advantages = np.zeros(sample.response_length)
        if sample.index in FAILED:
            sample.teacher_failure = "timeout"
            sample.teacher_scores.valid_T[:] = False
            sample.teacher_scores.log_probs_T[:] = np.nan
        sample.validate()
    return samples


@pytest.mark.parametrize("per_token", [True, False])
def test_the_gradient_is_n_over_n_scored_times_that_of_the_scored_tokens(
    folders: dict[str, Path], per_token: bool
) -> None:
    flags: dict[str, Any] = {"use_opd": True, "calculate_per_token_loss": per_token, **GRADIENT_FLAGS}
    samples = masked_samples()
    _, unscaled = step_gradients(make_trainer(folders["qwen3"], **flags), samples)
    counts = np.array([sample.loss_mask.sum() for sample in samples], dtype=np.float64)
    weights = counts / counts.sum() if per_token else (counts > 0) / (counts > 0).sum()
    scored = np.array([sample.index not in FAILED for sample in samples])
    leave_out_failed(make_options(rollout_batch_size=12, **flags), samples)
    expected = {name: gradient / weights[scored].sum() for name, gradient in unscaled.items()}
    for micro_batch_size in (1, 5):
        trainer = make_trainer(folders["qwen3"], micro_batch_size=micro_batch_size, **flags)
        metrics, found = step_gradients(trainer, samples)
        assert_same_tensors(found, expected, 2e-5)
        assert np.isfinite(metrics["train/loss"])


def test_each_optimizer_step_is_scaled_by_its_own_failures() -> None:
    samples = masked_samples()
    options = make_options(rollout_batch_size=12, global_batch_size=4, calculate_per_token_loss=True)
    leave_out_failed(options, samples)
    for first in (0, 4, 8):
        step = samples[first : first + 4]
        counts = {sample.index: int(sample.loss_mask.sum()) for sample in step}
        kept = sum(count for index, count in counts.items() if index not in FAILED)
        for sample in step:
            factor = 0.0 if sample.index in FAILED else sum(counts.values()) / kept
            assert sample.opd_weights is not None
            np.testing.assert_allclose(sample.opd_weights, np.full(sample.response_length, factor), rtol=1e-6)


def test_nothing_is_scaled_where_nothing_failed() -> None:
    samples = make_samples(17)
    leave_out_failed(make_options(rollout_batch_size=12), samples)
    assert all(sample.opd_weights is None for sample in samples)


def test_the_exact_kl_is_of_the_scored_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    """Rows of the teacher are there for masked samples, too, but of another prompt than what it should have seen."""
    teacher_folder = save_reference(tmp_path, tiny_config("qwen3"), seed=9)
    trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, use_opd=True)
    samples = masked_samples()
    trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    student, teacher = load_reference(folders["qwen3"]), load_reference(teacher_folder)
    kls = []
    with torch.no_grad():
        for sample in samples:
            assert sample.teacher_scores is not None
            mine, theirs = (reference_logits(model, sample).double().log_softmax(-1) for model in (student, teacher))
            scored = torch.from_numpy(sample.loss_mask & sample.teacher_scores.valid_T)
            kls.append((mine.exp() * (mine - theirs)).sum(-1)[scored])
    metrics = trainer.train(samples).metrics
    assert metrics is not None
    assert metrics["opd/reverse_kl_exact"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-5)


def test_where_nobody_was_scored_whole_distributions_are_trained_all_the_same(folders: dict[str, Path]) -> None:
    """The term is 0, not an error for want of the distributions that nobody reads."""
    flags: dict[str, Any] = {
        "use_opd": True, "opd_type": "sglang", "opd_loss": "distribution", "opd_support": "teacher_topk",
        "opd_top_k": 3, **GRADIENT_FLAGS,
    }  # fmt: skip
    samples = masked_samples()
    for sample in samples:
        assert sample.teacher_scores is not None
        sample.teacher_failure = "timeout"
        sample.teacher_scores.valid_T[:] = False
        sample.advantages = np.ones(sample.response_length)
    options = make_options(rollout_batch_size=12, **flags)
    complete_unscored(options, samples)
    leave_out_failed(options, samples)
    metrics, gradients = step_gradients(make_trainer(folders["qwen3"], **flags), samples)
    assert metrics["train/opd_divergence"] == 0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert any(bool(gradient.any()) for gradient in gradients.values())
