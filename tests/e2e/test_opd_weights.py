"""Three steps of every weight of the distillation term through the real loop, each with what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from opd_megatron.config.errors import UserError
from opd_megatron.objectives.token_selection import TOKEN_SCORES
from opd_megatron.sample import read_samples, write_samples
from tests.e2e.support import run_training
from tests.megatron.support import assert_equal_tensors

WHOLE: dict[str, Any] = {"opd_loss": "distribution"}
REWARDED: dict[str, Any] = {"rm_type": None, "custom_rm_path": "tests.e2e.rewards:has_a_seven"}
PACED: dict[str, Any] = {**REWARDED, "opd_prompt_weight": "paced", "n_samples_per_prompt": 4}
MOVING: dict[str, Any] = {"global_batch_size": 4}
"""Two optimizer steps per rollout."""

CASES: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"top by {name}": ({"opd_token_select": "top", "opd_token_score": name}, "opd/token_kept_frac")
        for name in TOKEN_SCORES
    },
    "sampled, a tenth": (
        {"opd_token_select": "sample", "opd_token_score": "soft_or", "opd_token_ratio": 0.1, "opd_token_floor": 0.5},
        "opd/token_kept_frac",
    ),
    "sampled, whole distributions": ({"opd_token_select": "sample", **WHOLE, **MOVING}, "opd/token_kept_frac"),
    "top of the teacher's top": (
        {
            **WHOLE,
            "opd_token_select": "top",
            "opd_token_score": "low_entropy_high_divergence",
            "opd_support": "teacher_topk",
            "opd_top_k": 4,
        },
        "opd/token_kept_frac",
    ),
    "least score": ({"opd_token_select": "top", "opd_token_min_score": 0.6}, "opd/token_kept_frac"),
    "beside a task": ({"opd_token_select": "sample", "advantage_estimator": "grpo", **REWARDED}, "opd/token_kept_frac"),
    "paced": (PACED, "opd/pass_rate"),
    "paced, running, with a schedule": (
        {
            **PACED,
            **WHOLE,
            "opd_pass_rate": "running",
            "opd_divergence": "forward_kl",
            "opd_divergence_to": "reverse_kl",
            "opd_divergence_schedule": "0:2",
        },
        "opd/pass_rate",
    ),
    "rewards": ({**REWARDED, "opd_reward_beta": 0.5, "n_samples_per_prompt": 4}, "opd/weight_ess"),
    "correct": ({**REWARDED, "opd_on": "correct"}, "opd/token_kept_frac"),
    "incorrect": ({**REWARDED, "opd_on": "incorrect"}, "opd/token_kept_frac"),
    "short": ({"opd_mask_longer_than": 11}, "opd/token_kept_frac"),
    "not cut": ({"opd_mask_truncated": True}, "opd/token_kept_frac"),
    "plain tokens": ({"opd_mask_special_tokens": True}, "opd/token_kept_frac"),
    "everything at once": (
        {
            **PACED,
            "opd_token_select": "sample",
            "opd_token_score": "soft_or",
            "opd_reward_beta": 1.0,
            "opd_paced_alpha": 2.0,
            "opd_paced_beta": 0.5,
            "opd_mask_special_tokens": True,
            "opd_kl_discount": 0.5,
        },
        "opd/weight_ess",
    ),
}


def opd(teacher: Path) -> dict[str, Any]:
    return {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "advantage_estimator": "none"}


@pytest.mark.parametrize("case", CASES)
def test_three_steps(student: Path, teacher: Path, prompts: Path, tmp_path: Path, case: str) -> None:
    changes, metric = CASES[case]
    settings = {**opd(teacher), "rollout_batch_size": 6, "save_interval": 100, **changes}
    metrics = run_training(student, prompts, tmp_path / "run", **settings)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["train/grad_norm"] > 0 for line in metrics)
    assert all(0 < line[metric] < 1 for line in metrics)
    for line in metrics:
        assert 0 < line["opd/weight_ess"] <= line["opd/token_kept_frac"] + 1e-6 < 1 + 2e-6
        assert line["opd/weight_max"] >= line["opd/weight_mean"] > 0
    if changes.get("opd_token_select") == "top" and "opd_token_min_score" not in changes:
        assert metrics[0]["opd/token_kept_frac"] == pytest.approx(0.5, abs=0.02)


def test_the_teacher_says_nothing_where_every_weight_is_zero(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And no weight of the student moves."""
    settings = {**opd(teacher), **PACED, "save_hf": tmp_path / "hf_{rollout_id}"}
    metrics = run_training(student, prompts, tmp_path / "run", **settings, opd_pass_above=1.0)
    assert all(line["train/grad_norm"] == 0.0 and line["opd/weight_mean"] == 0.0 for line in metrics)
    assert all(line["train/skipped_steps"] == 1 for line in metrics)
    assert_equal_tensors(load_file(tmp_path / "hf_3" / "model.safetensors"), load_file(student / "model.safetensors"))
    assert "every prompt has weight 0" in caplog.text


def test_running_pass_rates_go_on_after_a_resume(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:4]))
    settings: dict[str, Any] = {**opd(teacher), **PACED, "opd_pass_rate": "running", "num_rollout": 4}
    straight = run_training(student, few, tmp_path / "straight", **settings, save_interval=2)
    checkpoints = tmp_path / "parts" / "checkpoints"
    shutil.copytree(tmp_path / "straight", tmp_path / "parts")
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run_training(student, few, tmp_path / "parts", **settings, load=checkpoints)
    for one, two in zip(straight, resumed, strict=True):
        for name in ("opd/pass_rate", "opd/weight_ess", "train/loss", "train/grad_norm"):
            assert one[name] == two[name], (one["step"], name)
    assert len({line["opd/pass_rate"] for line in straight}) > 1


def test_pass_rates_of_the_metadata_must_be_there(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["metadata"] = {"solved": number % 5 / 5}
    file = tmp_path / "rated.jsonl"
    settings: dict[str, Any] = {
        **opd(teacher),
        "opd_prompt_weight": "paced",
        "opd_pass_rate": "metadata",
        "opd_pass_rate_key": "solved",
    }
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = run_training(student, file, tmp_path / "run", **settings)
    assert all(0 < line["opd/pass_rate"] < 1 for line in metrics)
    rows[30]["metadata"] = {"solved": 3}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="number 31: metadata has a bad solved: give a number from 0 to 1"):
        run_training(student, file, tmp_path / "other", **settings)


def test_a_recorded_servers_most_probable_tokens_choose_too(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    run_training(student, prompts, tmp_path / "one", **opd(teacher), num_rollout=3, save_debug_rollout_data=pattern)
    random = np.random.default_rng(0)
    for rollout_id in range(3):
        file = tmp_path / f"recorded_{rollout_id}.jsonl"
        samples = list(read_samples(file))
        for sample in samples:
            assert sample.teacher_scores is not None
            shape = (sample.response_length, 3)
            ids_TK = np.argsort(random.random((sample.response_length, 18)), axis=1)[:, :3]
            probabilities_TK = np.sort(random.dirichlet(np.ones(4), sample.response_length), axis=1)[:, ::-1]
            sample.teacher_scores.top_ids_TK = ids_TK.reshape(shape).astype(np.int32)
            sample.teacher_scores.top_log_probs_TK = np.log(probabilities_TK[:, :3]).reshape(shape).astype(np.float32)
            sample.teacher_scores.tail_log_mass_T = np.log(probabilities_TK[:, 3]).astype(np.float32)
        write_samples(file, samples)
    changes: dict[str, Any] = {
        **opd(teacher),
        **WHOLE,
        "opd_type": "sglang",
        "opd_teacher_load": None,
        "opd_support": "teacher_topk",
        "opd_top_k": 3,
        "opd_token_select": "top",
        "opd_token_score": "divergence",
    }
    metrics = run_training(
        student, prompts, tmp_path / "two", prompt_data=None, load_debug_rollout_data=pattern, **changes
    )
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["opd/token_kept_frac"] == pytest.approx(0.5, abs=0.02) for line in metrics)
    assert all(line["train/grad_norm"] > 0 for line in metrics)
