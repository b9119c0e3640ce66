"""Which prefixes are trained on, and runs in which nothing but distillation is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e import rewards
from tests.e2e.support import run_training


@pytest.fixture
def opd(teacher: Path) -> dict[str, Any]:
    return {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "save_interval": 100}


def test_a_prefix_is_sampled_and_trained_while_evaluation_goes_on(
    student: Path, prompts: Path, tmp_path: Path, opd: dict[str, Any]
) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        **opd,
        opd_prefix_len=3,
        rollout_max_response_len=12,
        eval_prompt_data=["held", prompts],
        eval_rm_type="column_arithmetic",
    )
    assert metrics[0]["eval/held/response_length_mean"] > 3
    for line in metrics[1:]:
        assert line["rollout/response_length_max"] == 3
        assert line["opd/tokens"] <= 3 * 8
        assert line["opd/only"] == 1
        assert line["train/grad_norm"] > 0


def test_what_goes_beyond_the_prefix_is_not_trained_on(
    student: Path, prompts: Path, tmp_path: Path, opd: dict[str, Any]
) -> None:
    """A recording of whole responses, trained on to their third token."""
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    run_training(student, prompts, tmp_path / "one", **opd, num_rollout=1, save_debug_rollout_data=pattern)
    del opd["opd_teacher_load"]
    recorded = {"prompt_data": None, "load_debug_rollout_data": pattern, "num_rollout": 1}
    recorded["advantage_estimator"] = "none"  # a recording has rewards of its own
    whole = run_training(student, prompts, tmp_path / "two", **opd, **recorded)
    cut = run_training(student, prompts, tmp_path / "three", **opd, **recorded, opd_prefix_len=3)
    assert cut[0]["rollout/response_length_max"] == whole[0]["rollout/response_length_max"] > 3
    assert cut[0]["opd/tokens"] <= 24 < whole[0]["opd/tokens"]


def test_without_a_task_nothing_is_computed_for_it(
    student: Path, prompts: Path, tmp_path: Path, opd: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither greedy responses nor rewards; the steps are those of distillation alone."""
    estimators = ("remax", "none")
    found = {}
    for estimator in estimators:
        found[estimator] = run_training(
            student, prompts, tmp_path / estimator, **opd, advantage_estimator=estimator, normalize_advantages=True
        )
    for one, two in zip(*found.values(), strict=True):
        assert "reward/greedy_mean" not in one
        assert "perf/reward_seconds" not in one
        assert (one["opd/only"], one["reward/mean"]) == (1, 0)
        assert one["train/loss"] == two["train/loss"]
    rewarded = {"rm_type": None, "custom_rm_path": f"{rewards.__name__}:count_sevens", "num_rollout": 1}
    with_task = run_training(student, prompts, tmp_path / "task", **opd, **rewarded, advantage_estimator="grpo")
    assert with_task[0]["opd/only"] == 0
    assert "perf/reward_seconds" in with_task[0]
    unused = run_training(student, prompts, tmp_path / "seen", **opd, **rewarded, advantage_estimator="none")
    assert unused[0]["opd/only"] == 1
    kept = {"kl_coef": 0.1, "num_rollout": 1}
    assert run_training(student, prompts, tmp_path / "near", **opd, **kept)[0]["opd/only"] == 0
