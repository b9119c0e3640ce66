"""One rank's trainer: whole steps against transformers, metrics against dense computations, frozen models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.config.errors import RunError
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.megatron.vocab_head import shard
from opd_megatron.questions import LogProbs
from opd_megatron.sample import Sample, TeacherScores
from tests.megatron.support import (
    FAMILIES,
    GRADIENT_FLAGS,
    WHOLE_RESPONSES,
    assert_equal_tensors,
    assert_same_tensors,
    exported,
    load_reference,
    make_samples,
    make_trainer,
    off_policy_samples,
    reference_gradients,
    reference_log_probs,
    reference_logits,
    reference_loss,
    relative_error,
    save_reference,
    step_gradients,
    tiny_config,
)


def _train(trainer: MegatronTrainer, samples: Sequence[Sample]) -> dict[str, float]:
    metrics = trainer.train(samples).metrics
    assert metrics is not None
    return metrics


@pytest.mark.parametrize(("per_token", "temperature"), [(False, 1.0), (True, 0.7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_opd_with_task_advantages_has_the_gradient_of_transformers(
    folders: dict[str, Path], family: str, per_token: bool, temperature: float
) -> None:
    samples = make_samples(11)
    flags = {"use_opd": True, "opd_kl_coef": 0.7, "calculate_per_token_loss": per_token}
    flags |= {"rollout_temperature": temperature}
    metrics, found = step_gradients(make_trainer(folders[family], **flags, **GRADIENT_FLAGS), samples)
    model = load_reference(folders[family])
    loss = reference_loss(model, samples, opd_coef=0.7, per_token=per_token, temperature=temperature)
    expected = reference_gradients(model, loss)
    assert_same_tensors(found, expected, 2e-5)
    assert metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    norm = torch.stack([gradient.double().norm() for gradient in expected.values()]).norm()
    assert metrics["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("wrong_coef", [-0.7, 0.0])
def test_the_gradient_comparison_is_sharp(folders: dict[str, Path], wrong_coef: float) -> None:
    """With the other sign of the term, or without it, no tensor of the reference would agree."""
    samples = make_samples(11)
    _, found = step_gradients(make_trainer(folders["qwen3"], use_opd=True, opd_kl_coef=0.7, **GRADIENT_FLAGS), samples)
    model = load_reference(folders["qwen3"])
    expected = reference_gradients(model, reference_loss(model, samples, opd_coef=wrong_coef))
    assert min(relative_error(found[name], expected[name]) for name in expected) > 0.05


def test_distillation_moves_the_student_towards_the_teacher(folders: dict[str, Path], teacher_folder: Path) -> None:
    """Tokens that the teacher likes more than the student become more probable, the others less."""
    samples = make_samples(4)
    trainer = make_trainer(folders["qwen2"], teacher=teacher_folder, use_opd=True, optimizer="sgd", lr=1e-2)
    for place, log_probs in trainer.ask(LogProbs("teacher"), samples).items():
        samples[place].teacher_scores = TeacherScores(log_probs_T=log_probs)
        samples[place].advantages = np.zeros_like(log_probs)
    before = trainer.ask(LogProbs("student"), samples)
    trainer.train(samples)
    after = trainer.ask(LogProbs("student"), samples)
    moved = np.concatenate([after[place] - before[place] for place in range(len(samples))])
    teacher = np.concatenate([scores.log_probs_T for sample in samples if (scores := sample.teacher_scores)])
    distance = np.concatenate([before[place] for place in range(len(samples))]) - teacher
    assert np.corrcoef(moved, distance)[0, 1] < -0.3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_has_the_gradient_of_transformers(folders: dict[str, Path], family: str, temperature: float) -> None:
    samples = make_samples(12)
    flags = {"loss_type": "sft_loss", "rollout_temperature": temperature}
    metrics, found = step_gradients(make_trainer(folders[family], **flags, **GRADIENT_FLAGS), samples)
    model = load_reference(folders[family])
    loss = reference_loss(model, samples, loss_type="sft_loss", temperature=temperature)
    assert_same_tensors(found, reference_gradients(model, loss), 2e-5)
    assert metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_the_step_does_not_depend_on_the_micro_batch_size(folders: dict[str, Path]) -> None:
    samples = make_samples(13)
    results = [
        step_gradients(make_trainer(folders["qwen3"], use_opd=True, micro_batch_size=size, **GRADIENT_FLAGS), samples)
        for size in (1, 5, 12)
    ]
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5)
        assert_same_tensors(gradients, results[0][1], 1e-5)


@pytest.mark.parametrize(
    "flags",
    [WHOLE_RESPONSES, {"policy_loss": "cispo", "eps_clip": 0.5, "loss_length_divisor": 30}],
    ids=["whole responses", "cispo"],
)
def test_no_policy_loss_depends_on_the_micro_batch_size(folders: dict[str, Path], flags: dict[str, Any]) -> None:
    samples = off_policy_samples(13)
    layouts: list[dict[str, Any]] = [
        {"micro_batch_size": 1},
        {"micro_batch_size": 5},
        {"micro_batch_size": 12, "qkv_format": "bshd"},
    ]
    results = [
        step_gradients(make_trainer(folders["qwen3"], **flags, **layout, **GRADIENT_FLAGS), samples)
        for layout in layouts
    ]
    assert 0 < results[0][0]["train/pg_clipfrac"] < 1
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5)
        assert_same_tensors(gradients, results[0][1], 1e-5)


def test_passes_over_a_rollout_repeat_its_steps(folders: dict[str, Path]) -> None:
    """Two passes are the rollout trained twice; what is returned are the log-probabilities before the first."""
    settings: dict[str, Any] = {"lr": 1e-3, "global_batch_size": 6, "lr_decay_style": "constant"}
    samples = off_policy_samples(16)
    apart = make_trainer(folders["qwen3"], **settings)
    first = apart.train(samples).log_probs
    apart.train(samples)
    expected = exported(apart)
    together = make_trainer(folders["qwen3"], ppo_epochs=2, **settings)
    found = together.train(samples).log_probs
    assert_equal_tensors(exported(together), expected)
    assert found.keys() == first.keys()
    for place, log_probs in first.items():
        np.testing.assert_array_equal(found[place], log_probs)


def test_an_entropy_bonus_has_the_gradient_of_transformers(folders: dict[str, Path]) -> None:
    samples = make_samples(14)
    _, found = step_gradients(make_trainer(folders["qwen3"], entropy_coef=0.3, **GRADIENT_FLAGS), samples)
    model = load_reference(folders["qwen3"])
    loss = reference_loss(model, samples)
    trained = [sample for sample in samples if sample.loss_mask.any()]
    for sample in trained:
        log_probs = torch.log_softmax(reference_logits(model, sample).double(), dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)[torch.from_numpy(sample.loss_mask)]
        loss = loss - 0.3 * entropy.mean() / len(trained)
    assert_same_tensors(found, reference_gradients(model, loss), 2e-5)


def _opd_samples(trainer: MegatronTrainer, seed: int) -> list[Sample]:
    samples = make_samples(seed)
    for place, log_probs in trainer.ask(LogProbs("student"), samples).items():
        samples[place].old_log_probs = log_probs
    return samples


def test_the_distance_stays_that_of_the_sampling_weights(folders: dict[str, Path]) -> None:
    """Two optimizer steps of one rollout: the second one still uses the log-probabilities of before the first."""
    trainer = make_trainer(folders["qwen2"], use_opd=True, global_batch_size=6, lr=3e-2)
    samples = _opd_samples(trainer, 15)
    coef = trainer.options.opd.opd_kl_coef
    result = trainer.train(samples)
    assert sorted(result.log_probs) == list(range(12))
    totals = []
    for half in (samples[:6], samples[6:]):
        parts = []
        for sample in half:
            assert sample.teacher_scores is not None
            assert sample.old_log_probs is not None
            distance = (sample.old_log_probs - sample.teacher_scores.log_probs_T) * sample.teacher_scores.valid_T
            if sample.loss_mask.any():
                parts.append(np.abs(coef * distance)[sample.loss_mask].mean(dtype=np.float64))
        totals.append(np.mean(parts))
    assert result.metrics is not None
    assert result.metrics["train/opd_advantage_abs_mean"] == pytest.approx(np.mean(totals), rel=1e-5)
    # the second half was seen under moved weights
    moved = max(np.abs(result.log_probs[place] - samples[place].old_log_probs).max(initial=0) for place in range(6, 12))
    same = max(np.abs(result.log_probs[place] - samples[place].old_log_probs).max(initial=0) for place in range(6))
    assert same < 1e-5
    assert moved > 1e-2


def test_several_optimizer_steps_equal_separate_rollouts(folders: dict[str, Path]) -> None:
    """The divisor of each step is the count of its own samples, not of the rollout."""
    samples = make_samples(16)
    together = make_trainer(folders["qwen3"], loss_type="sft_loss", global_batch_size=6, lr=1e-3)
    apart = make_trainer(folders["qwen3"], loss_type="sft_loss", rollout_batch_size=6, lr=1e-3)
    apart.train(samples[:6])
    apart.train(samples[6:])
    expected = exported(apart)
    together = make_trainer(folders["qwen3"], loss_type="sft_loss", global_batch_size=6, lr=1e-3)
    together.train(samples)
    assert_same_tensors(exported(together), expected, 1e-6)


def test_a_step_without_tokens_does_not_spoil_the_means(folders: dict[str, Path]) -> None:
    samples = make_samples(4)
    for sample in samples[6:]:
        sample.loss_mask[:] = False
    flags = {"use_opd": True, "rollout_batch_size": 12}
    alone = _train(make_trainer(folders["qwen3"], **flags, global_batch_size=6), samples[:6])
    both = _train(make_trainer(folders["qwen3"], **flags, global_batch_size=6), samples)
    assert (alone.pop("train/skipped_steps"), both.pop("train/skipped_steps")) == (0, 1)
    assert both == pytest.approx(alone, rel=1e-6)
    assert all(np.isfinite(value) for value in both.values())
    # a rollout without any has none
    assert np.isnan(_train(make_trainer(folders["qwen3"], **flags, global_batch_size=3), samples[6:])["train/loss"])


def test_frozen_models_leave_the_student_as_it_was(folders: dict[str, Path], teacher_folder: Path) -> None:
    alone = exported(make_trainer(folders["qwen2"]))
    other = save_reference(teacher_folder.parent / "reference", tiny_config("qwen2"), seed=21)
    trainer = make_trainer(folders["qwen2"], teacher=teacher_folder, reference=other, use_opd=True)
    assert_equal_tensors(exported(trainer), alone)
    samples = make_samples(2)
    student = trainer.ask(LogProbs("student"), samples)
    trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    trainer.ask(LogProbs("reference"), samples)
    assert_equal_tensors(exported(trainer), alone)
    again = trainer.ask(LogProbs("student"), samples)
    assert all(np.array_equal(again[place], student[place]) for place in student)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_model_speaks_with_its_own_voice(
    folders: dict[str, Path], teacher_folder: Path, temperature: float
) -> None:
    other = save_reference(teacher_folder.parent / "other", tiny_config("qwen3"), seed=22)
    trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, reference=other, rollout_temperature=temperature)
    samples = make_samples(3)
    for name, folder in (("student", folders["qwen3"]), ("teacher", teacher_folder), ("reference", other)):
        model = load_reference(folder)
        found = trainer.ask(LogProbs(name), samples)  # type: ignore[arg-type]
        for place, sample in enumerate(samples):
            expected = reference_log_probs(model, sample, temperature).detach().numpy()
            np.testing.assert_allclose(found[place], expected, rtol=0, atol=1e-5, err_msg=name)


def test_frozen_models_do_not_learn(folders: dict[str, Path], teacher_folder: Path) -> None:
    trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, use_opd=True, lr=1e-2)
    samples = make_samples(3)
    before = trainer.ask(LogProbs("teacher"), samples)
    trainer.train(samples)
    after = trainer.ask(LogProbs("teacher"), samples)
    assert all(np.array_equal(after[place], before[place]) for place in before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_exact_reverse_kl_equals_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], teacher_folder: Path, temperature: float
) -> None:
    monkeypatch.setattr(shard, "chunk_tokens", lambda *_: 5)
    flags: dict[str, Any] = {"use_opd": True, "rollout_temperature": temperature}
    trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, **flags)
    samples = make_samples(5)
    for place, log_probs in trainer.ask(LogProbs("teacher", keep_hidden=True), samples).items():
        samples[place].teacher_scores = TeacherScores(log_probs_T=log_probs)
    student, teacher = load_reference(folders["qwen3"]), load_reference(teacher_folder)
    kls = []
    with torch.no_grad():
        for sample in samples:
            mine, theirs = (
                torch.log_softmax(reference_logits(model, sample).double() / temperature, dim=-1)
                for model in (student, teacher)
            )
            kls.append((mine.exp() * (mine - theirs)).sum(-1)[torch.from_numpy(sample.loss_mask)])
    assert _train(trainer, samples)["opd/reverse_kl_exact"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-5)
    # the hidden states served one step
    assert "opd/reverse_kl_exact" not in _train(trainer, samples)


def test_a_teacher_with_the_students_weights_has_no_distance(folders: dict[str, Path]) -> None:
    trainer = make_trainer(folders["llama"], teacher=folders["llama"], use_opd=True)
    samples = make_samples(6)
    for place, log_probs in trainer.ask(LogProbs("teacher", keep_hidden=True), samples).items():
        samples[place].teacher_scores = TeacherScores(log_probs_T=log_probs)
    metrics = _train(trainer, samples)
    assert metrics["opd/reverse_kl_exact"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["train/opd_advantage_abs_mean"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "flags",
    [{}, {"use_distributed_optimizer": True, "bf16": True}, {"clip_grad": 0.0, "offload_optimizer": True}],
    ids=lambda flags: "-".join(flags) or "plain",
)
def test_a_step_with_nothing_to_learn_moves_no_weight(folders: dict[str, Path], flags: dict[str, Any]) -> None:
    """Momentum and weight decay would; the schedule counts the step, and the next one is what it would have been."""
    flags = {"weight_decay": 0.1, "lr": 1e-2, "lr_decay_style": "linear", "num_rollouts": 5} | flags
    nothing, unweighted = make_samples(5), make_samples(6)
    for sample in nothing:
        sample.loss_mask[:] = False
    for sample in unweighted:
        sample.advantages, sample.opd_weights = (np.zeros(sample.response_length, dtype=np.float32) for _ in range(2))
    trainer = make_trainer(folders["qwen3"], use_opd=True, **flags)
    first = _train(trainer, make_samples(4))
    before = exported(trainer)
    skipped = [_train(trainer, samples) for samples in (nothing, unweighted)]
    assert_equal_tensors(exported(trainer), before)
    last = _train(trainer, make_samples(7))
    after = exported(trainer)
    assert [found["train/skipped_steps"] for found in (first, *skipped, last)] == [0, 1, 1, 0]
    assert [found["train/grad_norm"] for found in skipped] == [0, 0]
    rates = [found["train/lr"] for found in (first, *skipped, last)]
    assert rates == sorted(set(rates), reverse=True)

    without = make_trainer(folders["qwen3"], use_opd=True, **flags)
    _train(without, make_samples(4))
    for _ in range(2):
        without.scheduler.step(increment=1)
    assert _train(without, make_samples(7)) == last
    assert_equal_tensors(exported(without), after)


def test_a_gradient_that_is_not_finite_ends_the_run(folders: dict[str, Path]) -> None:
    trainer = make_trainer(folders["qwen3"])
    samples = make_samples(7)
    assert samples[0].advantages is not None
    samples[0].loss_mask[:] = True
    samples[0].advantages[:] = np.nan
    with pytest.raises(RunError, match="gradient norm is nan"):
        trainer.train(samples)


def test_the_gradient_norm_is_measured_without_clipping_too(folders: dict[str, Path]) -> None:
    samples = make_samples(8)
    clipped, free = (
        _train(make_trainer(folders["qwen3"], clip_grad=limit, use_opd=True), samples)["train/grad_norm"]
        for limit in (0.1, 0.0)
    )
    assert clipped == pytest.approx(free, rel=1e-6)
    assert clipped > 0.1


def test_clipping_limits_the_step(folders: dict[str, Path]) -> None:
    samples = make_samples(8)
    flags = GRADIENT_FLAGS | {"clip_grad": 0.01, "use_opd": True}
    _, gradients = step_gradients(make_trainer(folders["qwen3"], **flags), samples)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_samples_that_lack_what_others_have_are_an_error(folders: dict[str, Path]) -> None:
    samples = make_samples(9)
    samples[3].teacher_scores = None
    with pytest.raises(ValueError, match="lack"):
        make_trainer(folders["qwen3"], use_opd=True).train(samples)
    for sample in samples:
        sample.teacher_scores = None
    with pytest.raises(ValueError, match="no teacher scores"):
        make_trainer(folders["qwen3"], use_opd=True).train(samples)


@pytest.mark.parametrize(
    "flags",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
    ],
    ids=["uniform", "block", "selective"],
)
def test_recomputing_activations_changes_no_gradient(folders: dict[str, Path], flags: dict[str, Any]) -> None:
    samples = make_samples(10)
    _, expected = step_gradients(make_trainer(folders["qwen3"], use_opd=True, **GRADIENT_FLAGS), samples)
    _, found = step_gradients(make_trainer(folders["qwen3"], use_opd=True, **flags, **GRADIENT_FLAGS), samples)
    assert_same_tensors(found, expected, 1e-6)


def test_bfloat16_trains_with_float32_master_weights(folders: dict[str, Path]) -> None:
    """Steps far below bfloat16's resolution add up, and the loss is near the float32 one."""
    samples = make_samples(17)
    trainer = make_trainer(folders["qwen3"], bf16=True, loss_type="sft_loss", lr=2e-4, weight_decay=0.0)
    before = exported(trainer)
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    losses = [_train(trainer, samples)["train/loss"] for _ in range(20)]
    reference = reference_loss(load_reference(folders["qwen3"]), samples, loss_type="sft_loss").item()
    assert losses[0] == pytest.approx(reference, rel=1e-2)
    assert losses[-1] < losses[0] - 0.05
    after = exported(trainer)
    moved = torch.cat([(after[name] != before[name]).flatten() for name in before]).float().mean()
    assert moved > 0.3
