"""Distillation by whole distributions through the trainer: gradients against transformers in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.megatron.distribution import Record
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import LogProbs
from opd_megatron.sample import Sample, TeacherScores, prompt_as_response
from tests.megatron.support import (
    GRADIENT_FLAGS,
    assert_same_tensors,
    load_reference,
    make_samples,
    make_trainer,
    reference_gradients,
    reference_logits,
    step_gradients,
)

K = 5
COEFFICIENT = 0.6


def distil(trainer: MegatronTrainer, samples: list[Sample]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of a step; which tokens the teacher scored stays as the samples say."""
    scores = trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    for place, sample in enumerate(samples):
        assert sample.teacher_scores is not None
        sample.teacher_scores = TeacherScores(log_probs_T=scores[place], valid_T=sample.teacher_scores.valid_T)
    return step_gradients(trainer, samples)


def classes(student_TV: Tensor, teacher_TV: Tensor, support: str, tail: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the classes that are compared."""
    if support == "full":
        return student_TV, teacher_TV
    ids_TK = (teacher_TV if support == "teacher_topk" else student_TV).topk(K).indices
    found = []
    for log_TV in (student_TV, teacher_TV):
        listed_TK = log_TV.gather(1, ids_TK)
        if tail == "renormalized":
            found.append(listed_TK.log_softmax(-1))
        else:
            rest_TV = log_TV.scatter(1, ids_TK, -torch.inf)
            found.append(torch.cat([listed_TK, rest_TV.logsumexp(-1, keepdim=True)], dim=1))
    return found[0], found[1]


def kl(left: Tensor, right: Tensor) -> Tensor:
    return (left.exp() * (left - right)).sum(-1)


def dense_loss(student: Any, teacher: Any, samples: list[Sample], flags: dict[str, Any]) -> Tensor:
    """Reverse KL over the support, averaged over sequences of their token means, and the entropy-aware part."""
    sequences = sum(bool(sample.loss_mask.any()) for sample in samples)
    temperature = flags.get("opd_temperature", 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        if not sample.loss_mask.any() or sample.teacher_scores is None:
            continue
        student_TV = (reference_logits(student, sample).double() / temperature).log_softmax(-1)
        with torch.no_grad():
            teacher_TV = (reference_logits(teacher, sample).double() / temperature).log_softmax(-1)
        pair = classes(student_TV, teacher_TV, flags.get("opd_support", "full"), flags.get("opd_tail", "bucket"))
        value_T = kl(*pair)
        if "opd_entropy_aware" in flags:
            entropy_T = torch.special.entr(teacher_TV.exp()).sum(-1) / math.log(teacher_TV.shape[1])
            value_T = value_T + flags["opd_entropy_aware"] * entropy_T * kl(pair[1], pair[0])
        scored_T = torch.from_numpy(sample.loss_mask & sample.teacher_scores.valid_T)
        total = total + COEFFICIENT * value_T[scored_T].sum() / (sequences * sample.loss_mask.sum())
    return total


PROMPT_FORMS: dict[str, dict[str, Any]] = {
    "mean over sequences": {},
    "mean over tokens": {"calculate_per_token_loss": True, "opd_support": "teacher_topk", "opd_top_k": K},
    "constant divisor": {"loss_length_divisor": 7, "use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k2"},
}


@pytest.mark.parametrize("form", PROMPT_FORMS)
def test_prompts_are_compared_like_responses(folders: dict[str, Path], teacher_folder: Path, form: str) -> None:
    """Every prompt token but the first weighs as a trained one; other terms do not see them."""
    flags = PROMPT_FORMS[form]
    trainer = make_trainer(
        folders["qwen3"],
        teacher=teacher_folder,
        use_opd=True,
        opd_loss="distribution",
        opd_kl_coef=COEFFICIENT,
        opd_include_prompt=True,
        **flags,
        **GRADIENT_FLAGS,
    )
    samples = make_samples(3)
    for sample in samples:
        assert sample.advantages is not None
        sample.advantages = 0 * sample.advantages
        sample.teacher_scores = TeacherScores(log_probs_T=np.zeros(sample.response_length))
        sample.ref_log_probs = np.full(sample.response_length, -2.0)
    metrics, found = distil(trainer, samples)
    student, teacher = load_reference(folders["qwen3"]), load_reference(teacher_folder)
    places = [len(sample.prompt_tokens) - 1 + int(sample.loss_mask.sum()) for sample in samples]
    of_prompts = torch.zeros((), dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for sample, count in zip(samples, places, strict=True):
        divisor = len(samples) * flags.get("loss_length_divisor", 0) or sum(bool(n) for n in places) * max(count, 1)
        if flags.get("calculate_per_token_loss"):
            divisor = sum(places)
        whole = prompt_as_response(sample)
        student_TV = reference_logits(student, whole).double().log_softmax(-1)
        with torch.no_grad():
            teacher_TV = reference_logits(teacher, whole).double().log_softmax(-1)
        value_T = COEFFICIENT * kl(*classes(student_TV, teacher_TV, flags.get("opd_support", "full"), "bucket"))
        before = len(sample.prompt_tokens) - 1
        of_prompts = of_prompts + value_T[:before].sum() / divisor
        trained_T = torch.from_numpy(sample.loss_mask)
        loss = loss + value_T[before:][trained_T].sum() / divisor
        if "use_kl_loss" in flags:
            tokens = torch.from_numpy(sample.response_tokens)[:, None]
            log_ratio_T = student_TV[before:].gather(1, tokens)[:, 0] + 2.0
            loss = loss + 0.3 * (log_ratio_T.square() / 2)[trained_T].sum() / divisor
    expected = reference_gradients(student, loss + of_prompts)
    if "use_kl_loss" not in flags:
        assert metrics["train/loss"] == pytest.approx((loss + of_prompts).item(), rel=1e-5)
        assert metrics["train/opd_loss"] == pytest.approx((loss + of_prompts).item() / COEFFICIENT, rel=1e-5)
    assert metrics["train/opd_prompt_divergence"] > 0
    assert_same_tensors(found, {name: expected[name] for name in found}, 2e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"opd_temperature": 0.7},
        {"opd_support": "teacher_topk", "opd_top_k": K},
        {"opd_support": "teacher_topk", "opd_top_k": K, "opd_tail": "renormalized"},
        {"opd_support": "student_topk", "opd_top_k": K},
        {"opd_entropy_aware": 0.5},
        {"opd_entropy_aware": 0.5, "opd_support": "student_topk", "opd_top_k": K},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())) or "full",
)
def test_the_gradient_of_a_step_is_that_of_the_divergence(
    folders: dict[str, Path], teacher_folder: Path, flags: dict[str, Any]
) -> None:
    trainer = make_trainer(
        folders["qwen3"],
        teacher=teacher_folder,
        use_opd=True,
        opd_loss="distribution",
        opd_kl_coef=COEFFICIENT,
        advantage_estimator="none",
        **flags,
        **GRADIENT_FLAGS,
    )
    samples = make_samples(3)
    for sample in samples:
        assert sample.advantages is not None
        sample.advantages = 0 * sample.advantages
    metrics, found = distil(trainer, samples)
    student, teacher = load_reference(folders["qwen3"]), load_reference(teacher_folder)
    loss = dense_loss(student, teacher, samples, flags)
    expected = reference_gradients(student, loss)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_tensors(found, {name: expected[name] for name in found}, 2e-5)


def test_a_recorded_top_k_is_the_megatron_teacher_s(folders: dict[str, Path], teacher_folder: Path) -> None:
    """What a server gives and what is made of the teacher's own hidden states have one gradient."""
    flags: dict[str, Any] = {
        "use_opd": True,
        "opd_loss": "distribution",
        "opd_support": "teacher_topk",
        "opd_top_k": K,
        **GRADIENT_FLAGS,
    }
    _, expected = distil(make_trainer(folders["qwen3"], teacher=teacher_folder, **flags), make_samples(3))
    model, samples = load_reference(teacher_folder), make_samples(3)
    for sample in samples:
        assert sample.teacher_scores is not None
        with torch.no_grad():
            log_TV = reference_logits(model, sample).double().log_softmax(-1)
        top = log_TV.topk(K)
        sample.teacher_scores = TeacherScores(
            log_probs_T=log_TV.gather(1, torch.from_numpy(sample.response_tokens)[:, None])[:, 0].numpy(),
            valid_T=sample.teacher_scores.valid_T,
            top_ids_TK=top.indices.numpy(),
            top_log_probs_TK=top.values.numpy(),
            tail_log_mass_T=log_TV.scatter(1, top.indices, -torch.inf).logsumexp(-1).numpy(),
        )
    _, found = step_gradients(make_trainer(folders["qwen3"], **flags), samples)
    assert_same_tensors(found, expected, 2e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_entropy_of_a_rescaled_record_is_that_of_its_tokens_alone(temperature: float) -> None:
    """At another temperature the record's own numbers do not add up to 1, and its tail is not known."""
    generator = torch.Generator().manual_seed(0)
    logits_NK = torch.randn((6, 4), generator=generator, dtype=torch.float64)
    log_probs_NK = logits_NK - torch.logsumexp(torch.cat([logits_NK, torch.ones(6, 1)], dim=1), dim=1, keepdim=True)
    record = Record(torch.zeros(6, 4, dtype=torch.int64), log_probs_NK / temperature, torch.full((6,), -1.0))
    expected = torch.distributions.Categorical(logits=logits_NK / temperature).entropy()
    torch.testing.assert_close(record.entropy(renormalized=True), expected)
