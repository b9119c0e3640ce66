"""Three steps of every estimator, policy loss and correction through the real loop, each with what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.cluster.group import LocalTrainerGroup
from opd_megatron.config.errors import UserError
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.sample import read_samples
from tests.e2e.support import run_training

OWN = "examples.own_objectives.objectives"
MOVING = {"global_batch_size": 4, "lr": 3e-3}
"""Two optimizer steps per rollout, the second off policy."""

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "grpo": ({"advantage_estimator": "grpo"}, "train/task_advantage_abs_mean"),
    "dr_grpo": (
        {"advantage_estimator": "grpo", "disable_grpo_std_normalization": True, "loss_length_divisor": 12},
        "train/task_advantage_abs_mean",
    ),
    "rloo": ({"advantage_estimator": "rloo"}, "train/task_advantage_abs_mean"),
    "opo": ({"advantage_estimator": "opo"}, "train/task_advantage_abs_mean"),
    "remax": ({"advantage_estimator": "remax", "n_samples_per_prompt": 1}, "reward/greedy_mean"),
    "gpg": ({"advantage_estimator": "gpg"}, "train/task_advantage_abs_mean"),
    "reinforce_plus_plus": ({"advantage_estimator": "reinforce_plus_plus"}, "train/task_advantage_abs_mean"),
    "reinforce_plus_plus_baseline": (
        {"advantage_estimator": "reinforce_plus_plus_baseline"},
        "train/task_advantage_abs_mean",
    ),
    "own estimator": ({"custom_advantage_path": f"{OWN}:median_baseline"}, "train/task_advantage_abs_mean"),
    "ppo_clip": ({"policy_loss": "ppo_clip", "eps_clip": 1e-4, **MOVING}, "train/pg_clipfrac"),
    "clip-higher, dual clip, k3, entropy": (
        {
            "eps_clip": 1e-4,
            "eps_clip_high": 2e-4,
            "eps_clip_c": 1.0001,
            "use_kl_loss": True,
            "kl_loss_coef": 0.1,
            "kl_loss_type": "k3",
            "entropy_coef": 0.01,
            **MOVING,
        },
        "train/pg_clipfrac train/kl_loss train/entropy",
    ),
    "gspo": ({"policy_loss": "gspo", "eps_clip": 1e-5, **MOVING}, "train/sequence_ratio"),
    "cispo": ({"policy_loss": "cispo", "eps_clip": 1e-4, **MOVING}, "train/pg_clipfrac"),
    "own loss": ({"custom_loss_path": f"{OWN}:soft_clip", **MOVING}, "train/ratio_distance"),
    "tis": ({"use_tis": True, "tis_level": "token"}, "train/tis_weight"),
    "tis of sequences": ({"use_tis": True, "tis_level": "sequence"}, "train/tis_weight"),
    "icepop": ({"use_tis": True, "tis_mode": "mask", "tis_clip_low": 0.5, "tis_clip": 5.0}, "train/tis_weight"),
    "opsm": ({"use_opsm": True, "opsm_delta": 0.0, **MOVING}, "train/opsm_masked_frac"),
    "ppo_epochs": ({"ppo_epochs": 3, "eps_clip": 1e-4, "lr": 3e-3}, "train/pg_clipfrac"),
    "k1+": ({"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k1+", "lr": 3e-3}, "train/kl_loss"),
    "k3+": ({"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3+", "lr": 3e-3}, "train/kl_loss"),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps(student: Path, prompts: Path, tmp_path: Path, case: str) -> None:
    changes, names = CASES[case]
    settings = {"rm_type": None, "custom_rm_path": "tests.e2e.rewards:count_sevens", **changes}
    metrics = run_training(student, prompts, tmp_path / "run", rollout_batch_size=4, save_interval=100, **settings)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["train/grad_norm"] > 0 for line in metrics)
    assert all(metrics[-1][name] != 0 for name in names.split())
    # one process and one precision: engine and trainer agree, so no weight differs from 1
    assert metrics[-1].get("train/tis_weight", 1.0) == pytest.approx(1.0, abs=1e-3)
    assert metrics[-1]["rollout/mismatch_ratio_mean"] == pytest.approx(1.0, abs=1e-3)
    assert metrics[-1]["rollout/mismatch_outside_frac"] == 0


def test_gspo_and_distillation_go_together(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    opd = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "advantage_estimator": "rloo"}
    metrics = run_training(student, prompts, tmp_path / "run", policy_loss="gspo", **opd, **MOVING)
    assert metrics[-1]["train/opd_advantage_abs_mean"] > 0
    assert metrics[-1]["train/sequence_ratio"] != 1.0


def test_the_greedy_reward_is_that_of_each_prompt_and_recorded(student: Path, prompts: Path, tmp_path: Path) -> None:
    """The reward of the response at temperature 0, the same for all samples of a prompt, and kept by a replay."""
    settings: dict[str, Any] = {"rm_type": None, "custom_rm_path": "tests.e2e.rewards:count_sevens", "lr": 0.0}
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    remax = {"advantage_estimator": "remax", "num_rollout": 1, "rollout_shuffle": False, "rollout_batch_size": 4}
    sampled = run_training(student, prompts, tmp_path / "one", **settings, **remax, save_debug_rollout_data=pattern)
    samples = list(read_samples(tmp_path / "recorded_0.jsonl"))
    baselines = {sample.group_index: sample.greedy_reward for sample in samples}
    assert all(sample.greedy_reward == baselines[sample.group_index] for sample in samples)
    # an evaluation at temperature 0 of the same prompts sees the same rewards
    held = tmp_path / "held.jsonl"
    held.write_text("".join(prompts.read_text().splitlines(keepends=True)[:4]))
    evaluated = run_training(
        student, prompts, tmp_path / "two", **settings, num_rollout=1, eval_prompt_data=["held", held]
    )
    expected = evaluated[0]["eval/held/reward_mean"]
    assert sampled[0]["reward/greedy_mean"] == pytest.approx(expected)
    assert len(set(baselines.values())) > 1
    replayed = run_training(
        student, prompts, tmp_path / "three", **settings, **remax, prompt_data=None, load_debug_rollout_data=pattern
    )
    assert replayed[0]["reward/greedy_mean"] == sampled[0]["reward/greedy_mean"]
    assert replayed[0]["train/loss"] == pytest.approx(sampled[0]["train/loss"], abs=1e-7)


def test_a_recording_without_greedy_rewards_is_no_use_to_remax(student: Path, prompts: Path, tmp_path: Path) -> None:
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    run_training(student, prompts, tmp_path / "one", num_rollout=1, save_debug_rollout_data=pattern)
    with pytest.raises(UserError, match="no greedy_reward, which --advantage-estimator remax needs"):
        run_training(
            student,
            prompts,
            tmp_path / "two",
            num_rollout=1,
            prompt_data=None,
            load_debug_rollout_data=pattern,
            advantage_estimator="remax",
        )


def test_the_engine_rests_after_the_greedy_responses_and_while_the_student_learns(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--sglang-free-memory`` takes the weights away in ``rest``: nothing may be asked before the next ones."""
    events: list[str] = []

    def noting(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def noted(self: Any, *arguments: Any, **more: Any) -> Any:
            events.append(name)
            return original(self, *arguments, **more)

        monkeypatch.setattr(owner, name, noted)

    for name in ("update_weights", "stream", "rest"):
        noting(LocalEngine, name)
    noting(LocalTrainerGroup, "train")
    rewarded: dict[str, Any] = {"rm_type": None, "custom_rm_path": "tests.e2e.rewards:count_sevens"}
    run_training(student, prompts, tmp_path / "run", advantage_estimator="remax", num_rollout=2, **rewarded)
    assert events == ["update_weights", "stream", "stream", "rest", "train"] * 2


def test_passes_over_a_rollout_are_optimizer_steps_of_the_schedule(
    student: Path, prompts: Path, tmp_path: Path
) -> None:
    """Two passes of two steps: the linear schedule ends with the run, and a resumed run goes on as a whole one."""
    settings: dict[str, Any] = {"ppo_epochs": 2, "global_batch_size": 4, "lr": 1e-3, "entropy_coef": 0.1}
    whole = run_training(student, prompts, tmp_path / "whole", **settings, num_rollout=3)
    rates = [1e-3 * (1 - step / 12) for step in range(12)]
    for line, first in zip(whole, (0, 4, 8), strict=True):
        assert line["train/lr"] == pytest.approx(sum(rates[first : first + 4]) / 4)
    parts = {**settings, "lr_decay_iters": 12}
    run_training(student, prompts, tmp_path / "parts", **parts, num_rollout=2)
    saved = tmp_path / "parts" / "checkpoints"
    resumed = run_training(student, prompts, tmp_path / "parts", **parts, num_rollout=3, load=saved)
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/ratio_mean"):
        assert resumed[-1][name] == whole[-1][name], name
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["rollouts"] == 3
