"""Weights of the distillation term through the trainer: what the student says before the step, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.flow.student_pass import ask_student
from opd_megatron.flow.weighting import OpdWeighting
from opd_megatron.megatron import distribution, forward
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import LogProbs, StudentTokens
from opd_megatron.sample import Sample, TeacherScores
from tests.megatron.support import (
    GRADIENT_FLAGS,
    assert_same_tensors,
    load_reference,
    make_samples,
    make_trainer,
    reference_gradients,
    reference_log_probs,
    reference_logits,
    step_gradients,
)

CHOSEN: dict[str, Any] = {"use_opd": True, "opd_token_select": "sample", "opd_token_score": "soft_or"}
PURE: dict[str, Any] = {"advantage_estimator": "none"}
WHOLE: dict[str, Any] = {"opd_loss": "distribution"}


def samples_without_a_task(seed: int = 21) -> list[Sample]:
    samples = make_samples(seed)
    for sample in samples:
        sample.advantages = np.zeros(sample.response_length, dtype=np.float32)
    return samples


def weighed(trainer: MegatronTrainer, samples: list[Sample]) -> list[np.ndarray]:
    """Score with the teacher, look with the student, make the weights; the student's answers."""
    scores = trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    for place, sample in enumerate(samples):
        assert sample.teacher_scores is not None
        sample.teacher_scores = TeacherScores(log_probs_T=scores[place], valid_T=sample.teacher_scores.valid_T)

    class Alone:
        def ask(self, question: Any, samples: Any) -> list[np.ndarray]:
            assert question == StudentTokens(divergence=True), "one pass is enough"
            found = trainer.ask(question, samples)
            return [found[place] for place in range(len(samples))]

    answers = ask_student(trainer.options, Alone(), samples, 2)
    assert answers is not None
    OpdWeighting(trainer.options, range(3)).apply(samples, 2, answers)
    return answers


def jensen_shannon(log_a: Tensor, log_b: Tensor) -> Tensor:
    middle = torch.logaddexp(log_a, log_b) - math.log(2)
    return ((log_a.exp() * (log_a - middle)).sum(-1) + (log_b.exp() * (log_b - middle)).sum(-1)) / 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_student_says_of_each_token_what_transformers_says(
    folders: dict[str, Path], teacher_folder: Path, temperature: float
) -> None:
    trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, rollout_temperature=temperature, **CHOSEN)
    samples = samples_without_a_task()
    answers = weighed(trainer, samples)
    models = [load_reference(folder, torch.float64) for folder in (folders["qwen3"], teacher_folder)]
    for sample, answer in zip(samples, answers, strict=True):
        student, teacher = (
            torch.log_softmax(reference_logits(model, sample).detach() / temperature, -1) for model in models
        )
        assert sample.teacher_scores is not None
        compared = torch.from_numpy(sample.loss_mask & sample.teacher_scores.valid_T)
        expected = {
            "student_log_prob": student.gather(1, torch.from_numpy(sample.response_tokens)[:, None])[:, 0],
            "student_entropy": -(student.exp() * student).sum(-1),
            "divergence": torch.where(compared, jensen_shannon(student, teacher), 0.0),
        }
        assert set(answer.dtype.names or ()) == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(answer[name], values.numpy(), rtol=0, atol=2e-5)
        np.testing.assert_array_equal(sample.old_log_probs, answer["student_log_prob"])
        np.testing.assert_array_equal(sample.entropies, answer["student_entropy"])


def test_a_servers_record_is_compared_by_its_classes(folders: dict[str, Path], teacher_folder: Path) -> None:
    """The K most probable tokens and the rest of them together, as in the loss itself."""
    flags: dict[str, Any] = {**CHOSEN, **WHOLE, "opd_type": "sglang", "opd_support": "teacher_topk", "opd_top_k": 4}
    trainer = make_trainer(folders["qwen3"], **flags)
    samples = samples_without_a_task()
    models = [load_reference(folder, torch.float64) for folder in (folders["qwen3"], teacher_folder)]
    expected = []
    for sample in samples:
        student, teacher = (torch.log_softmax(reference_logits(model, sample).detach(), -1) for model in models)
        top = teacher.topk(4)
        rest = torch.log1p(-top.values.exp().sum(-1))
        assert sample.teacher_scores is not None
        sample.teacher_scores = TeacherScores(
            log_probs_T=np.full(sample.response_length, -1.0),
            top_ids_TK=top.indices.numpy(),
            top_log_probs_TK=top.values.numpy(),
            tail_log_mass_T=rest.numpy(),
        )
        listed = student.gather(1, top.indices)
        classes = torch.cat([listed, torch.log1p(-listed.exp().sum(-1, keepdim=True))], dim=1)
        record = torch.cat([top.values, rest[:, None]], dim=1)
        expected.append(torch.where(torch.from_numpy(sample.loss_mask), jensen_shannon(classes, record), 0.0))
    found = trainer.ask(StudentTokens(divergence=True), samples)
    for place, values in enumerate(expected):
        np.testing.assert_allclose(found[place]["divergence"], values.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", ["sampled", "distribution"])
def test_weights_are_those_of_the_whole_rollout(folders: dict[str, Path], teacher_folder: Path, form: str) -> None:
    """Against the loss written out in float64, for any size of micro-batches: nothing is made anew for each of them."""
    flags: dict[str, Any] = {**CHOSEN, **PURE, **GRADIENT_FLAGS, "opd_loss": form, "opd_mask_special_tokens": True}
    flags |= {"opd_prompt_weight": "paced", "opd_pass_above": 1.0, "opd_kl_coef": 0.6}
    student, teacher = (load_reference(folder, torch.float64) for folder in (folders["qwen3"], teacher_folder))
    expected: dict[str, Tensor] = {}
    for size in (1, 5, 12):
        trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, micro_batch_size=size, **flags)
        samples = samples_without_a_task()
        weighed(trainer, samples)
        if not expected:
            loss = _reference(student, teacher, samples, form)
            expected = reference_gradients(student, 0.6 * loss)
        metrics, found = step_gradients(trainer, samples)
        assert_same_tensors(found, expected, 2e-5)
        if form == "distribution":
            assert metrics["train/opd_divergence"] == pytest.approx(float(loss), rel=1e-4)
            assert metrics["train/loss"] == pytest.approx(0.6 * float(loss), rel=1e-4)


def _reference(student: Any, teacher: Any, samples: list[Sample], form: str) -> Tensor:
    """Mean over sequences of token means of the weighted term."""
    total, sequences = torch.zeros((), dtype=torch.float64), 0
    kept = 0
    for sample in samples:
        mask = torch.from_numpy(sample.loss_mask)
        if not mask.any():
            continue
        sequences += 1
        weights = torch.from_numpy(sample.opd_weights).double()
        kept += int((weights > 0).sum())
        if form == "distribution":
            log_s = torch.log_softmax(reference_logits(student, sample), -1)
            log_t = torch.log_softmax(reference_logits(teacher, sample).detach(), -1)
            term = (log_s.exp() * (log_s - log_t)).sum(-1)
        else:
            log_s = reference_log_probs(student, sample)
            term = (log_s.detach() - reference_log_probs(teacher, sample).detach()) * log_s
        assert sample.teacher_scores is not None
        heard = mask & torch.from_numpy(sample.teacher_scores.valid_T)
        total = total + (weights * term)[heard].sum() / mask.sum()
    assert 10 < kept < 100
    return total / sequences


@pytest.fixture
def rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Tokens for which logits were made, by what they were made for."""
    counts = {"tokens": 0, "divergence": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(hidden_Nh: Tensor, *rest: Any, **named: Any) -> Any:
            counts[name] += len(hidden_Nh)
            return function(hidden_Nh, *rest, **named)

        return counted

    monkeypatch.setattr(forward, "token_log_probs", counting("tokens", forward.token_log_probs))
    monkeypatch.setattr(distribution, "target_divergence", counting("divergence", distribution.target_divergence))
    return counts


@pytest.mark.parametrize("select", ["top", "sample"])
def test_tokens_that_are_left_out_cost_no_logits(
    folders: dict[str, Path], teacher_folder: Path, rows_of_logits: dict[str, int], select: str
) -> None:
    """None at all where the term is the whole loss; with a task those of the task, and the gradients are the same."""
    flags: dict[str, Any] = {**CHOSEN, **WHOLE, **GRADIENT_FLAGS, "opd_token_select": select, "opd_token_ratio": 0.2}
    found = []
    for estimator in ("none", "grpo"):
        trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, advantage_estimator=estimator, **flags)
        samples = samples_without_a_task()
        weighed(trainer, samples)
        rows_of_logits |= {"tokens": 0, "divergence": 0}
        found.append(step_gradients(trainer, samples))
        kept = sum(
            int(((sample.opd_weights > 0) & sample.loss_mask & sample.teacher_scores.valid_T).sum())
            for sample in samples
            if sample.opd_weights is not None and sample.teacher_scores is not None
        )
        total = sum(sample.response_length for sample in samples)
        assert 0 < kept < total / 3
        assert rows_of_logits == {"tokens": kept if estimator == "none" else total, "divergence": kept}
    assert_same_tensors(found[0][1], found[1][1], 1e-5)
    for name in ("train/loss", "train/entropy", "train/ratio_mean", "train/opd_divergence"):
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=1e-5)


def test_weights_act_on_the_distillation_term_alone(folders: dict[str, Path], teacher_folder: Path) -> None:
    """Without any weight what is left is the step of the task."""
    flags: dict[str, Any] = {"use_opd": True, "entropy_coef": 0.01, **GRADIENT_FLAGS}
    silent = make_samples(21)
    for sample in silent:
        sample.opd_weights = np.zeros(sample.response_length, dtype=np.float32)
    _, found = step_gradients(make_trainer(folders["qwen3"], **flags), silent)
    _, expected = step_gradients(make_trainer(folders["qwen3"], **flags | {"use_opd": False}), make_samples(21))
    assert_same_tensors(found, expected, 1e-5)
    _, heard = step_gradients(make_trainer(folders["qwen3"], **flags), make_samples(21))
    assert max(float((heard[name] - expected[name]).abs().max()) for name in heard) > 1e-3
