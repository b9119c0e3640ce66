"""PPO with its critic through the real loop: metrics, warm-up, resuming, and a critic that knows of no teacher."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_megatron.config.errors import UserError
from tests.e2e.support import run_training
from tests.megatron.support import assert_equal_tensors, stored_tensors

PPO: dict[str, Any] = {
    "advantage_estimator": "ppo",
    "lambd": 0.9,
    "gamma": 0.99,
    "critic_lr": 3e-3,
    "rm_type": None,
    "custom_rm_path": "tests.e2e.rewards:count_sevens",
}
OF_CRITIC = ("train/value_loss", "train/explained_variance", "train/value_mean", "train/return_mean")


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer of both models."""
    return stored_tensors(run / "checkpoints" / f"iter_{step:07d}")


def of_critic(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("critic.")}


def of_student(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("critic.")}


@pytest.mark.parametrize("samples", [1, 2], ids=["one sample per prompt, with a teacher", "two"])
def test_three_steps(student: Path, teacher: Path, prompts: Path, tmp_path: Path, samples: int) -> None:
    """It compares no samples of a prompt, so that one is as good as several."""
    settings = PPO | {"n_samples_per_prompt": samples, "rollout_batch_size": 8 // samples, "normalize_advantages": True}
    if samples == 1:
        settings |= {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher}
    metrics = run_training(student, prompts, tmp_path / "run", **settings)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["train/grad_norm"] > 0
        assert line["train/critic_grad_norm"] > 0
        assert line["train/value_loss"] > 0
        assert line["train/task_advantage_abs_mean"] > 0
        assert line["train/critic_lr"] > line["train/lr"]
        assert (line.get("train/opd_advantage_abs_mean", 0.0) > 0) == (samples == 1)
    first, last = metrics[0], metrics[-1]
    assert first["train/value_mean"] == 0, "a critic that has learned nothing expects nothing"
    assert first["train/explained_variance"] == pytest.approx(0.0, abs=1e-12)
    assert 0 < last["train/value_mean"] < last["train/return_mean"]


def test_values_are_clipped_from_the_second_step_on_a_rollout(student: Path, prompts: Path, tmp_path: Path) -> None:
    settings = PPO | {"global_batch_size": 4, "value_clip": 1e-4}
    metrics = run_training(student, prompts, tmp_path / "run", **settings)
    assert metrics[-1]["train/value_clipfrac"] > 0.1
    free = run_training(student, prompts, tmp_path / "free", **(settings | {"value_clip": 0.0}))
    assert free[-1]["train/value_clipfrac"] == 0


def test_the_critic_alone_learns_in_its_first_rollouts(student: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = PPO | {"num_rollout": 4, "num_critic_only_steps": 2, "save_interval": 1}
    metrics = run_training(student, prompts, run, **settings)
    first, second, third = (checkpoint(run, step) for step in (1, 2, 3))
    weights = [name for name in first if not name.startswith(("critic.", "optimizer."))]
    assert len(weights) > 5
    assert all(torch.equal(first[name], second[name]) for name in weights)
    assert not any(torch.equal(second[name], third[name]) for name in weights)
    heads = [found["critic.value_head.weight"] for found in (first, second, third)]
    assert not torch.equal(heads[0], heads[1])
    for line in metrics[:2]:
        assert line["train/value_loss"] > 0
        assert "train/loss" not in line
        assert line["rollout/train_logprob_gap_max"] < 1e-4, "the engine speaks with the student that stands still"
    assert metrics[2]["train/grad_norm"] > 0
    # each model's linear decay is over its own steps
    assert [line["train/lr"] for line in metrics[2:]] == pytest.approx([1e-3, 5e-4])
    assert [line["train/critic_lr"] for line in metrics] == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 7.5e-4])


@pytest.mark.parametrize("distributed", [False, True])
def test_two_and_two_steps_are_four(student: Path, prompts: Path, tmp_path: Path, distributed: bool) -> None:
    """The critic-only rollouts end where they would have, and not a bit of either model differs."""
    settings = PPO | {
        "num_rollout": 4,
        "num_critic_only_steps": 1,
        "global_batch_size": 4,
        "critic_lr_warmup_iters": 3,
        "use_distributed_optimizer": distributed,
        "save_interval": 2,
    }
    straight = run_training(student, prompts, tmp_path / "straight", **settings)
    shutil.copytree(tmp_path / "straight", tmp_path / "parts")
    checkpoints = tmp_path / "parts" / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run_training(student, prompts, tmp_path / "parts", **settings, load=checkpoints)
    for one, two in zip(straight, resumed, strict=True):
        for name in (*OF_CRITIC, "train/critic_lr", "train/critic_grad_norm", "train/loss", "reward/mean"):
            assert one.get(name) == two.get(name), (one["step"], name)
    expected = checkpoint(tmp_path / "straight", 4)
    assert any("exp_avg" in name for name in of_critic(expected))
    assert_equal_tensors(checkpoint(tmp_path / "parts", 4), expected)


def test_the_critic_knows_of_no_teacher(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    """With distillation returns, values and the critic's whole state are what they are without it, to the bit."""
    opd = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "opd_kl_coef": 5.0}
    settings = PPO | {"num_rollout": 1, "normalize_advantages": True}
    plain = run_training(student, prompts, tmp_path / "plain", **settings)[0]
    with_opd = run_training(student, prompts, tmp_path / "opd", **settings, **opd)[0]
    for name in (*OF_CRITIC, "train/critic_grad_norm", "train/task_advantage_abs_mean"):
        assert with_opd[name] == plain[name], name
    assert with_opd["train/opd_advantage_abs_mean"] > 1
    states = [checkpoint(tmp_path / name, 1) for name in ("plain", "opd")]
    assert_equal_tensors(of_critic(states[1]), of_critic(states[0]))
    same = [torch.equal(states[0][name], states[1][name]) for name in of_student(states[0])]
    assert not all(same), "the student does learn from its teacher"


def test_a_kl_in_the_reward_reaches_the_returns(student: Path, prompts: Path, tmp_path: Path) -> None:
    settings = PPO | {"kl_coef": 0.5, "lr": 1e-2, "num_rollout": 2, "gamma": 1.0, "lambd": 1.0}
    metrics = run_training(student, prompts, tmp_path / "run", **settings)
    assert math.isfinite(metrics[1]["train/explained_variance"])
    assert metrics[1]["train/return_mean"] != pytest.approx(metrics[1]["reward/mean"], abs=1e-3)


def test_a_critic_begins_with_that_of_another_run(student: Path, prompts: Path, tmp_path: Path) -> None:
    settings = PPO | {"num_rollout": 1}
    run_training(student, prompts, tmp_path / "first", **settings)
    trained = checkpoint(tmp_path / "first", 1)
    still = {"critic_lr": 0.0, "lr": 0.0, "critic_load": tmp_path / "first" / "checkpoints"}
    metrics = run_training(student, prompts, tmp_path / "second", **(settings | still))
    assert metrics[0]["train/value_mean"] > 0
    found = of_critic(checkpoint(tmp_path / "second", 1))
    names = [name for name in found if "optimizer" not in name]
    assert_equal_tensors({name: found[name] for name in names}, {name: trained[name] for name in names})


def test_a_run_without_a_critic_does_not_go_on_with_ppo_unasked(student: Path, prompts: Path, tmp_path: Path) -> None:
    settings = {"num_rollout": 1, "rm_type": None, "custom_rm_path": PPO["custom_rm_path"]}
    run_training(student, prompts, tmp_path / "run", **settings, advantage_estimator="rloo")
    saved = tmp_path / "run" / "checkpoints"
    more = PPO | {"num_rollout": 2, "load": saved, "lr_decay_style": "constant"}
    with pytest.raises(UserError, match=r"was saved without a critic: name the weights .* by --critic-load"):
        run_training(student, prompts, tmp_path / "run", **more)
    metrics = run_training(student, prompts, tmp_path / "run", **more, critic_load=student)
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics[1]["train/value_mean"] == 0
