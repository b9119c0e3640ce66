"""The student as its own teacher behind another prompt: every row at its place in the response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.megatron.hf_weights import export_hf_weights
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import LogProbs
from opd_megatron.sample import Sample, TeacherScores
from tests.megatron.support import (
    GRADIENT_FLAGS,
    VOCAB_SIZE,
    assert_same_tensors,
    exported,
    load_reference,
    make_samples,
    make_trainer,
    reference_gradients,
    reference_log_probs,
    reference_logits,
    relative_error,
    step_gradients,
)

TAUGHT: dict[str, Any] = {
    "use_opd": True,
    "opd_type": "megatron",
    "opd_teacher": "self",
    "opd_self_context_key": "hint",
}
COEFFICIENT = 0.6


def privileged_samples(seed: int) -> list[Sample]:
    """A rollout without a task; what the teacher sees is longer, shorter, as long as, or what the student sees."""
    random, samples = np.random.default_rng(seed + 100), make_samples(seed)
    for sample in samples:
        own = len(sample.prompt_tokens)
        length = [own + 11, own, max(1, own - 1), own + 1][sample.index % 4]
        if sample.index != 7:
            sample.teacher_prompt_tokens = random.integers(0, VOCAB_SIZE, length)
        sample.advantages = np.zeros(sample.response_length)
        sample.validate()
    return samples


def behind_the_context(sample: Sample) -> Sample:
    """The response with the teacher's prompt before it, put together by hand."""
    given = sample.prompt_tokens if sample.teacher_prompt_tokens is None else sample.teacher_prompt_tokens
    return Sample(0, 0, "", prompt_tokens=given, response_tokens=sample.response_tokens, loss_mask=sample.loss_mask)


def own_trainer(folder: Path, weights: str, **flags: Any) -> MegatronTrainer:
    frozen = {"teacher": folder} if weights == "frozen" else {}
    return make_trainer(folder, opd_self_weights=weights, **TAUGHT, **frozen, **flags)


def scored(trainer: MegatronTrainer, samples: list[Sample]) -> dict[int, np.ndarray]:
    """Attach the teacher's scores, its hidden rows kept."""
    scores = trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    for place, sample in enumerate(samples):
        sample.teacher_scores = TeacherScores(log_probs_T=scores[place])
    return scores


def far_from(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max(initial=0.0) > 1e-2)


@pytest.mark.parametrize("weights", ["frozen", "ema", "current"])
@pytest.mark.parametrize("packed", ["thd", "bshd"])
def test_the_scores_are_those_of_the_response_behind_the_privileged_prompt(
    folders: dict[str, Path], weights: str, packed: str
) -> None:
    """To 1e-5 of transformers; the same response one token too early or too late is far off."""
    trainer, samples = own_trainer(folders["qwen3"], weights, qkv_format=packed), privileged_samples(5)
    scores, model = scored(trainer, samples), load_reference(folders["qwen3"])
    shifted = 0
    for place, sample in enumerate(samples):
        seen = behind_the_context(sample)
        with torch.no_grad():
            expected = reference_log_probs(model, seen).numpy()
            longer = Sample(0, 0, "", np.append(seen.prompt_tokens, 1), response_tokens=seen.response_tokens)
            wrong = reference_log_probs(model, longer).numpy()
            own = reference_log_probs(model, sample).numpy()
        np.testing.assert_allclose(scores[place], expected, atol=1e-5)
        shifted += far_from(wrong, expected)
        if sample.teacher_prompt_tokens is not None and sample.response_length:
            assert far_from(own, expected)
    assert shifted == sum(sample.response_length > 0 for sample in samples)


def self_distillation_loss(student: Any, teacher: Any, samples: list[Sample]) -> tuple[Tensor, float]:
    """KL(S(. | prompt) || T(. | privileged prompt)), averaged over sequences of token means, and over tokens."""
    sequences = sum(bool(sample.loss_mask.any()) for sample in samples)
    tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    total, mean = torch.zeros((), dtype=torch.float64), 0.0
    for sample in samples:
        if not sample.loss_mask.any():
            continue
        student_TV = reference_logits(student, sample).double().log_softmax(-1)
        with torch.no_grad():
            teacher_TV = reference_logits(teacher, behind_the_context(sample)).double().log_softmax(-1)
        kl_T = (student_TV.exp() * (student_TV - teacher_TV)).sum(-1)[torch.from_numpy(sample.loss_mask)]
        total = total + COEFFICIENT * kl_T.sum() / (sequences * len(kl_T))
        mean += float(kl_T.detach().sum()) / tokens
    return total, mean


@pytest.mark.parametrize("weights", ["frozen", "current"])
def test_the_gradient_is_that_of_the_kl_to_itself_with_the_context(folders: dict[str, Path], weights: str) -> None:
    """Hidden rows of one prompt meet those of the other at the same token; the teacher's side has no gradient."""
    flags = {"opd_loss": "distribution", "opd_kl_coef": COEFFICIENT, "advantage_estimator": "none", **GRADIENT_FLAGS}
    trainer, samples = own_trainer(folders["qwen3"], weights, **flags), privileged_samples(3)
    scored(trainer, samples)
    metrics, found = step_gradients(trainer, samples)
    student = load_reference(folders["qwen3"])
    loss, mean = self_distillation_loss(student, load_reference(folders["qwen3"]), samples)
    expected = reference_gradients(student, loss)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["opd/reverse_kl_exact"] == pytest.approx(mean, rel=1e-5)
    assert_same_tensors(found, {name: expected[name] for name in found}, 2e-5)


def test_current_weights_are_those_of_the_rollout_and_frozen_ones_of_the_start(folders: dict[str, Path]) -> None:
    samples = privileged_samples(3)
    first: dict[str, dict[int, np.ndarray]] = {}
    second: dict[str, dict[int, np.ndarray]] = {}
    for weights in ("frozen", "current"):
        trainer = own_trainer(folders["qwen3"], weights, lr=1e-2, advantage_estimator="none")
        first[weights] = scored(trainer, samples)
        trainer.train(samples)
        second[weights] = trainer.ask(LogProbs("teacher"), samples)
        seen = [behind_the_context(sample) for sample in samples]
        student = trainer.ask(LogProbs("student"), seen)
        assert all(np.array_equal(student[p], second[weights][p]) for p in student) is (weights == "current")
    for place in range(len(samples)):
        np.testing.assert_allclose(first["frozen"][place], first["current"][place], atol=1e-6)
        np.testing.assert_array_equal(first["frozen"][place], second["frozen"][place])
    assert any(far_from(second["current"][place], first["current"][place]) for place in first["current"])


def test_several_optimizer_steps_have_one_teacher(folders: dict[str, Path]) -> None:
    """The teacher is the student of the rollout's beginning: its output weight does not move with the steps."""
    flags: dict[str, Any] = {
        "opd_loss": "distribution",
        "advantage_estimator": "none",
        "lr": 1e-2,
        "global_batch_size": 4,
    }
    found = {}
    for weights in ("frozen", "current"):
        trainer, samples = own_trainer(folders["qwen3"], weights, **flags), privileged_samples(3)
        scored(trainer, samples)
        found[weights] = trainer.train(samples).metrics
    assert found["current"] == pytest.approx(found["frozen"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("own", [{"opd_teacher_micro_batch_size": 5}, {"opd_teacher_max_tokens_per_gpu": 70}])
def test_micro_batches_of_the_teacher_follow_its_own_lengths(folders: dict[str, Path], own: dict[str, int]) -> None:
    flags: dict[str, Any] = {"opd_loss": "distribution", "advantage_estimator": "none"}
    found = []
    for settings in ({}, own):
        trainer, samples = own_trainer(folders["qwen3"], "current", **flags, **settings), privileged_samples(3)
        scored(trainer, samples)
        found.append(trainer.train(samples).metrics)
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)


def averages(trainer: MegatronTrainer) -> dict[str, Tensor]:
    """The average's weights by Hugging Face name."""
    assert trainer.average is not None
    return {name: tensor.clone() for name, tensor in export_hf_weights(trainer.average.chunks)}


def test_the_average_follows_the_student(folders: dict[str, Path]) -> None:
    """Against the recursion in float64 on the exported weights; the teacher of a rollout is that of its beginning."""
    decay = 0.8
    flags: dict[str, Any] = {"opd_self_ema_decay": decay, "lr": 1e-2, "advantage_estimator": "none"}
    trainer, samples = own_trainer(folders["qwen3"], "ema", global_batch_size=4, **flags), privileged_samples(3)
    expected = {name: tensor.double() for name, tensor in exported(trainer).items()}
    assert_same_tensors(averages(trainer), expected, 1e-7)
    for _ in range(3):
        scored(trainer, samples)
        trainer.train(samples)
        student = exported(trainer)
        expected = {name: decay * expected[name] + (1 - decay) * student[name].double() for name in student}
        assert_same_tensors(averages(trainer), expected, 1e-6)
    moved = [relative_error(student[name], expected[name]) for name in student]
    assert max(moved) > 1e-2


def test_small_steps_are_not_rounded_away_in_bfloat16(folders: dict[str, Path]) -> None:
    """A hundred steps of a thousandth towards weights that moved once: 1 - 0.999^100 of the way, not none of it."""
    trainer = own_trainer(folders["qwen3"], "ema", opd_self_ema_decay=0.999, bf16=True, offload_teacher=True)
    assert trainer.average is not None
    before = {name: tensor.double() for name, tensor in exported(trainer).items()}
    with trainer.memory.holding("teacher"), torch.no_grad():
        for chunk in trainer.chunks:
            for weight in chunk.parameters():
                weight.mul_(1.5)
        for _ in range(100):
            trainer.average.follow()
        found = averages(trainer)
    share = 0.5 * (1 - 0.999**100)
    assert_same_tensors(found, {name: (1 + share) * tensor for name, tensor in before.items()}, 5e-3)
