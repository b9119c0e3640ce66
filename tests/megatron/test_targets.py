"""Targets other than one teacher through the trainer: gradients against transformers, by the targets' definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.questions import LogProbs, StudentTokens
from opd_megatron.sample import TeacherScores
from tests.megatron.support import (
    GRADIENT_FLAGS,
    VOCAB_SIZE,
    assert_same_tensors,
    load_reference,
    make_samples,
    make_trainer,
    reference_gradients,
    reference_logits,
    save_reference,
    step_gradients,
    tiny_config,
)

COEFFICIENT = 0.6
SHARED = VOCAB_SIZE - 6
"""Tokens that all models know, of which the samples are."""
WHOLE: dict[str, Any] = {"use_opd": True, "opd_loss": "distribution", "opd_kl_coef": COEFFICIENT}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The student and frozen models, each of another size, some of another number of tokens."""
    root = tmp_path_factory.mktemp("models")
    sizes = {
        "teacher": (48, 1, 6, 3, VOCAB_SIZE),
        "second": (32, 2, 4, 2, VOCAB_SIZE),
        "third": (24, 1, 2, 1, VOCAB_SIZE),
        "larger": (24, 1, 4, 2, VOCAB_SIZE + 11),
        "smaller": (32, 1, 4, 2, SHARED),
    }
    configs = {
        name: tiny_config(
            "llama",
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=vocabulary,
        )
        for name, (size, layers, heads, groups, vocabulary) in sizes.items()
    }
    saved = {name: save_reference(root / name, config, seed=9 + i) for i, (name, config) in enumerate(configs.items())}
    return {"student": folders["qwen3"], **saved}


def normalized(log_weights: Tensor) -> Tensor:
    return log_weights.log_softmax(-1)


# flags of the options, which model has which name in the trainer, and the target's log-probabilities
Definition = Callable[[dict[str, Tensor]], Tensor]
CASES: dict[str, tuple[dict[str, Any], dict[str, str], Definition]] = {
    "the student's start as the reference": (
        {"opd_reward_scale": 1.4},
        {"teacher": "teacher", "reference": "student"},
        lambda p: normalized(1.4 * p["teacher"] - 0.4 * p["student"]),
    ),
    "a reference of its own": (
        {"opd_reward_scale": 0.3, "opd_ref_load": "second", "opd_temperature": 0.7},
        {"teacher": "teacher", "opd_reference": "second"},
        lambda p: normalized(0.3 * p["teacher"] + 0.7 * p["second"]),
    ),
    "arithmetic": (
        {"opd_teacher_mixture": "arithmetic", "opd_teacher_weights": (1.0, 3.0)},
        {"teacher": "teacher", "teacher_2": "second"},
        lambda p: (0.25 * p["teacher"].exp() + 0.75 * p["second"].exp()).log(),
    ),
    "geometric": (
        {"opd_teacher_mixture": "geometric", "opd_temperature": 1.3},
        {"teacher": "teacher", "teacher_2": "second", "teacher_3": "third"},
        lambda p: normalized((p["teacher"] + p["second"] + p["third"]) / 3),
    ),
    "a teacher with rows that no token uses": ({}, {"teacher": "larger"}, lambda p: p["larger"]),
    "a student with rows that no token uses": ({}, {"teacher": "smaller"}, lambda p: p["smaller"]),
    "three vocabularies": (
        {"opd_teacher_mixture": "geometric"},
        {"teacher": "larger", "teacher_2": "smaller"},
        lambda p: normalized((p["larger"] + p["smaller"]) / 2),
    ),
    "arithmetic, extrapolated": (
        {"opd_teacher_mixture": "arithmetic", "opd_reward_scale": 1.5},
        {"teacher": "teacher", "teacher_2": "second", "reference": "student"},
        lambda p: normalized(1.5 * (0.5 * p["teacher"].exp() + 0.5 * p["second"].exp()).log() - 0.5 * p["student"]),
    ),
}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_step_is_that_of_the_kl_to_the_target(
    models: dict[str, Path], case: str, offload: bool
) -> None:
    flags, names, definition = CASES[case]
    frozen = {name: models[model] for name, model in names.items()}
    teacher, reference = frozen.pop("teacher"), frozen.pop("reference", None)
    trainer = make_trainer(
        models["student"],
        teacher=teacher,
        reference=reference,
        further=frozen,
        advantage_estimator="none",
        offload_teacher=offload,
        opd_more_teachers=tuple(str(folder) for name, folder in frozen.items() if name.startswith("teacher_")),
        opd_type="megatron",
        **{name: value if name != "opd_ref_load" else str(models["second"]) for name, value in flags.items()},
        **WHOLE,
        **GRADIENT_FLAGS,
    )
    samples = make_samples(3, vocab_size=SHARED)
    for name in names:
        scored = trainer.ask(LogProbs(name, keep_hidden=True), samples)
    for place, sample in enumerate(samples):
        assert sample.advantages is not None
        sample.advantages = 0 * sample.advantages
        sample.teacher_scores = TeacherScores(log_probs_T=scored[place])
    metrics, found = step_gradients(trainer, samples)

    transformers = {name: load_reference(models[name]) for name in {*names.values(), "student"}}
    shared = min(model.config.vocab_size for model in transformers.values())
    student, temperature = load_reference(models["student"]), flags.get("opd_temperature", 1.0)
    trained = [sample for sample in samples if sample.loss_mask.any()]
    loss = torch.zeros((), dtype=torch.float64)
    for sample in trained:

        def log_probs(model: Any, sample: Any = sample) -> Tensor:
            return (reference_logits(model, sample)[:, :shared].double() / temperature).log_softmax(-1)

        with torch.no_grad():
            target_TV = definition({name: log_probs(model) for name, model in transformers.items()})
        student_TV = log_probs(student)
        kl_T = (student_TV.exp() * (student_TV - target_TV)).sum(-1)
        loss = loss + COEFFICIENT * kl_T[torch.from_numpy(sample.loss_mask)].mean() / len(trained)
    expected = reference_gradients(student, loss)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_tensors(found, {name: expected[name] for name in found}, 2e-5)


@pytest.mark.parametrize("case", ["arithmetic", "geometric", "three vocabularies"])
def test_tokens_are_chosen_by_the_divergence_from_the_mixture(models: dict[str, Path], case: str) -> None:
    """Where the mixture scored: the Jensen-Shannon divergence, at the temperature of the term."""
    flags, names, definition = CASES[case]
    frozen = {name: models[model] for name, model in names.items()}
    teacher = frozen.pop("teacher")
    trainer = make_trainer(
        models["student"],
        teacher=teacher,
        further=frozen,
        opd_more_teachers=tuple(map(str, frozen.values())),
        opd_type="megatron",
        opd_token_select="top",
        opd_token_score="divergence",
        **flags,
        **WHOLE,
    )
    samples = make_samples(5, vocab_size=SHARED)
    for name in names:
        trainer.ask(LogProbs(name, keep_hidden=True), samples)
    found = trainer.ask(StudentTokens(divergence=True), samples)
    transformers = {name: load_reference(models[name]) for name in {*names.values(), "student"}}
    shared = min(model.config.vocab_size for model in transformers.values())
    for place, sample in enumerate(samples):
        with torch.no_grad():
            logits = {name: reference_logits(model, sample) for name, model in transformers.items()}
        temperature = flags.get("opd_temperature", 1.0)
        logs = {name: (rows_TV[:, :shared].double() / temperature).log_softmax(-1) for name, rows_TV in logits.items()}
        student_TV, target_TV = logs["student"], definition(logs)
        middle_TV = torch.logaddexp(student_TV, target_TV) - math.log(2)
        sides = [(side_TV.exp() * (side_TV - middle_TV)).sum(-1) for side_TV in (student_TV, target_TV)]
        assert sample.teacher_scores is not None
        heard = torch.from_numpy(sample.loss_mask & sample.teacher_scores.valid_T)
        expected_T = torch.where(heard, (sides[0] + sides[1]) / 2, 0.0)
        np.testing.assert_allclose(found[place]["divergence"], expected_T.numpy(), rtol=0, atol=2e-5)
