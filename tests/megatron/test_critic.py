"""The critic of one rank: its values and gradients against a dense reference, what it starts from, what leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron.checkpoint import stored_dtype
from opd_megatron.megatron.hf_weights import local_parameters, model_maps
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import Values
from opd_megatron.sample import Sample
from tests.megatron.critic_support import critic_gradients, critic_of, give_head, head_numbers, judged_samples
from tests.megatron.support import (
    FAMILIES,
    GRADIENT_FLAGS,
    LINEAR_STEP,
    assert_equal_tensors,
    assert_same_tensors,
    exported,
    load_reference,
    make_samples,
    make_trainer,
    optimizer_state,
    relative_error,
    stored_tensors,
)

PPO: dict[str, Any] = {"advantage_estimator": "ppo", "critic_lr": 2e-3, "lr": 2e-3}
STEEP: dict[str, Any] = {"advantage_estimator": "ppo", **GRADIENT_FLAGS}


def reference_values(model: Any, head: tuple[Tensor, Tensor], sample: Sample) -> Tensor:
    """``[T]`` float64 values before the response tokens, from one unpadded forward pass of transformers."""
    hidden = model.model(input_ids=torch.from_numpy(sample.tokens)[None]).last_hidden_state[0]
    first = len(sample.prompt_tokens) - 1
    return (hidden[first : first + sample.response_length] @ head[0].t() + head[1])[:, 0]


def reference_value_loss(model: Any, head: tuple[Tensor, Tensor], samples: list[Sample], value_clip: float) -> Tensor:
    """Mean over sequences of token means of ``1/2 max((v - R)^2, (clip(v) - R)^2)``, sample by sample."""
    losses = []
    for sample in samples:
        if not sample.loss_mask.any():
            continue
        keep = torch.from_numpy(sample.loss_mask)
        values = reference_values(model, head, sample)[keep]
        old, returns = (torch.from_numpy(part).double()[keep] for part in (sample.values, sample.returns))
        bound = old + (values - old).clamp(-value_clip, value_clip)
        losses.append(torch.maximum((values - returns) ** 2, (bound - returns) ** 2).mean() / 2)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_a_dense_reference(folders: dict[str, Path], family: str) -> None:
    samples = judged_samples(21)
    trainer = make_trainer(folders[family], value_clip=0.3, **STEEP)
    critic = critic_of(trainer)
    give_head(trainer)
    model = load_reference(folders[family], torch.float64)
    head = tuple(part.double().requires_grad_() for part in head_numbers(model.config.hidden_size))
    for place, values in trainer.ask(Values(), samples).items():
        expected = reference_values(model, head, samples[place])
        np.testing.assert_allclose(values, expected.detach(), rtol=0, atol=1e-5)
        assert values.dtype == np.float32
    before = {name: parameter.detach().double().clone() for name, parameter in critic.chunks[0].named_parameters()}
    student = exported(trainer)
    metrics = critic.train(samples, trainer._share(samples))
    loss = reference_value_loss(model, head, samples, 0.3)
    loss.backward()
    assert metrics["train/value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0.1 < metrics["train/value_clipfrac"] < 0.9
    found = {
        name: (before[name] - parameter.detach().double()) / LINEAR_STEP
        for name, parameter in critic.chunks[0].named_parameters()
    }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected_by_name = {
        row.megatron_name: row.layout.merge([gradients[name] for name in row.hf_names])
        for row in model_maps(critic.chunks)
        if row.megatron_name != "output_layer.weight"
    }
    vocabulary = expected_by_name["embedding.word_embeddings.weight"]
    found["embedding.word_embeddings.weight"] = found["embedding.word_embeddings.weight"][: len(vocabulary)]
    expected_by_name |= {"value_head.weight": head[0].grad, "value_head.bias": head[1].grad}
    assert_same_tensors(found, expected_by_name, 2e-5)
    norm = torch.stack([gradient.norm() for gradient in expected_by_name.values()]).norm()
    assert metrics["train/critic_grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert_equal_tensors(exported(trainer), student)


def test_the_gradient_comparison_is_sharp(folders: dict[str, Path]) -> None:
    """Without the factor one half, without clipping, or with values of the next token no tensor would agree."""
    samples = judged_samples(21)
    model = load_reference(folders["qwen3"], torch.float64)
    head = head_numbers(model.config.hidden_size)
    head = head[0].double().requires_grad_(), head[1].double().requires_grad_()

    def gradient(value_clip: float) -> Tensor:
        (found,) = torch.autograd.grad(reference_value_loss(model, head, samples, value_clip), head[0])
        return found

    right = gradient(0.3)
    assert relative_error(2 * right, right) > 0.05
    assert relative_error(gradient(1e9), right) > 0.05
    for sample in samples:
        sample.prompt_tokens, sample.response_tokens = (
            np.append(sample.prompt_tokens, sample.response_tokens[:1]),
            np.append(sample.response_tokens[1:], sample.response_tokens[:1]),
        )
    assert relative_error(gradient(0.3), right) > 0.05


def test_the_step_does_not_depend_on_micro_batches(folders: dict[str, Path], tmp_path: Path) -> None:
    samples, found = judged_samples(13), []
    layouts: list[dict[str, Any]] = [
        {"micro_batch_size": 1},
        {"micro_batch_size": 5},
        {"micro_batch_size": 12, "qkv_format": "bshd"},
        {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 50},
    ]
    for number, layout in enumerate(layouts):
        trainer = make_trainer(folders["qwen3"], **STEEP, **layout)
        give_head(trainer)
        found.append(critic_gradients(trainer, samples, tmp_path / str(number), folders["qwen3"]))
    for metrics, gradients in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5)
        assert_same_tensors(gradients, found[0][1], 1e-5)


def test_a_new_critic_expects_nothing_and_sees_what_the_student_sees(folders: dict[str, Path]) -> None:
    trainer = make_trainer(folders["qwen2"], **PPO)
    assert all(not values.any() for values in trainer.ask(Values(), make_samples(1)).values())
    critic, student = local_parameters(critic_of(trainer).chunks), local_parameters(trainer.chunks)
    assert student.keys() - critic.keys() == {"output_layer.weight"}
    assert critic.keys() - student.keys() == {"value_head.weight", "value_head.bias"}
    assert all(torch.equal(critic[name], student[name]) for name in critic.keys() & student.keys())
    assert all(critic[name] is not student[name] for name in critic.keys() & student.keys())
    random = make_trainer(folders["qwen2"], start=StartingPoint("random", folders["qwen2"]), **PPO)
    again, initial = local_parameters(critic_of(random).chunks), local_parameters(random.chunks)
    assert all(torch.equal(again[name], initial[name]) for name in again.keys() & initial.keys())


def test_nothing_of_a_teacher_or_of_the_advantage_reaches_the_critic(folders: dict[str, Path]) -> None:
    """Teacher scores, coefficient, weights of the term and task advantages may be anything: not a bit differs."""
    states = []
    for flags in ({}, {"use_opd": True, "opd_kl_coef": 7.0, "normalize_advantages": True}):
        trainer = make_trainer(folders["qwen3"], **PPO, **flags)
        samples = judged_samples(5)
        if flags:
            for sample in samples:
                sample.advantages = np.full(sample.response_length, 1e3)
                sample.opd_weights = np.full(sample.response_length, 9.0)
        metrics = trainer.train(samples).metrics or {}
        critic = critic_of(trainer)
        weights = {name: parameter.detach().clone() for name, parameter in critic.chunks[0].named_parameters()}
        states.append((weights, {name: metrics[name] for name in metrics if "critic" in name or "value" in name}))
    assert_equal_tensors(states[1][0], states[0][0])
    assert states[1][1] == states[0][1]
    assert states[0][1]["train/value_loss"] > 0.1


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_critic_learns_its_returns(folders: dict[str, Path], bf16: bool) -> None:
    trainer = make_trainer(folders["qwen2"], **PPO | {"critic_lr": 2e-2, "value_clip": 0.0}, bf16=bf16)
    samples = judged_samples(8)
    losses = []
    for _ in range(20):
        losses.append(critic_of(trainer).train(samples, trainer._share(samples))["train/value_loss"])
    assert losses[-1] < 0.2 * losses[0]


def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_critics_rate(folders: dict[str, Path]) -> None:
    trainer, samples = make_trainer(folders["qwen3"], **PPO), judged_samples(8)
    for sample in samples:
        sample.returns = np.full(sample.response_length, np.inf)
    with pytest.raises(RunError, match="Lower --critic-lr"):
        trainer.train(samples)


def _three_rollouts(trainer: MegatronTrainer, folder: Path, hf_folder: Path) -> list[dict[str, float] | None]:
    found = []
    for number in range(3):
        samples = judged_samples(number)
        for place, values in trainer.ask(Values(), samples).items():
            samples[place].values = values
        found.append(trainer.train(samples, rollout_id=number).metrics)
    trainer.save(folder, 3, hf_folder, {"rollouts": 3})
    return found


@pytest.mark.parametrize("flags", [{}, {"bf16": True, "use_distributed_optimizer": True}], ids=["fp32", "bf16"])
def test_offloading_changes_no_bit_and_leaves_nothing_of_it_on_the_device(
    folders: dict[str, Path], tmp_path: Path, flags: dict[str, Any]
) -> None:
    settings = PPO | flags | {"num_critic_only_steps": 1, "global_batch_size": 6}
    stays = _three_rollouts(make_trainer(folders["qwen3"], **settings), tmp_path / "stays", folders["qwen3"])
    away = {"offload_train": True, "offload_optimizer": True, "offload_dir": str(tmp_path / "files")}
    trainer = make_trainer(folders["qwen3"], **settings, **away)
    assert _three_rollouts(trainer, tmp_path / "away", folders["qwen3"]) == stays
    steps = [stored_tensors(tmp_path / name / "iter_0000003") for name in ("away", "stays")]
    assert_equal_tensors(*steps)
    held = [parameter.untyped_storage().nbytes() for parameter in critic_of(trainer).chunks[0].parameters()]
    assert sum(held) == 0
    seen: list[int] = []
    watched = next(trainer.student.parameters()), next(critic_of(trainer).chunks[0].parameters())
    for mine, other in (watched, watched[::-1]):
        model = trainer.student if mine is watched[0] else critic_of(trainer).chunks[0]
        model.register_forward_pre_hook(lambda *_, other=other: seen.append(other.untyped_storage().nbytes()))
    trainer.train(judged_samples(4), rollout_id=3)
    assert len(seen) > 2
    assert sum(seen) == 0, "while one model works the other is away"


def test_a_checkpoint_with_a_critic_is_still_one_of_the_student(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = make_trainer(folders["qwen2"], **PPO, bf16=False)
    trainer.train(judged_samples(1))
    trainer.save(tmp_path, 1, folders["qwen2"], {"rollouts": 1})
    start = StartingPoint("load", tmp_path / "iter_0000001")
    plain = make_trainer(folders["qwen2"], start=start, lr=2e-3)
    assert plain.resume() is not None
    assert_equal_tensors(exported(plain), exported(trainer))
    assert_equal_tensors(optimizer_state(plain), optimizer_state(trainer))
    assert stored_dtype(start.folder) == torch.float32


def test_a_critic_of_another_architecture_is_refused_by_its_flag(folders: dict[str, Path], tmp_path: Path) -> None:
    """As a Hugging Face folder and as a step folder; the student's own folder is not blamed on the critic."""
    trainer = make_trainer(folders["qwen2"])
    trainer.save(tmp_path, 1, folders["qwen2"], {})
    for folder in (folders["qwen2"], tmp_path):
        with pytest.raises(UserError, match=r"--critic-load .*: a critic has the student's architecture"):
            make_trainer(folders["qwen3"], **PPO, critic_load=str(folder))


def test_resuming_without_parts_of_a_critic(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = make_trainer(folders["qwen2"], **PPO, no_save_optim=True)
    trainer.train(judged_samples(1))
    trainer.save(tmp_path, 1, folders["qwen2"], {"rollouts": 1})
    start = StartingPoint("load", tmp_path / "iter_0000001")
    samples = make_samples(2)
    expected = trainer.ask(Values(), samples)
    with pytest.raises(UserError, match="was saved without the optimizer's state: resume with --no-load-optim"):
        make_trainer(folders["qwen2"], start=start, **PPO).resume()
    for flags in ({"no_load_optim": True}, {"finetune": True}, {"no_load_optim": True, "critic_load": "unread"}):
        resumed = make_trainer(folders["qwen2"], start=start, **PPO, **flags)
        assert (resumed.resume() is None) == ("finetune" in flags)
        for place, values in resumed.ask(Values(), samples).items():
            np.testing.assert_array_equal(values, expected[place])
            assert values.any() or not len(values)
