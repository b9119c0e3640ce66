"""Filters, failures and their saved state in whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.cli import run_cli
from opd_megatron.config.errors import UserError
from opd_megatron.flow import FilterError
from opd_megatron.observe.run_folder import read_metrics
from opd_megatron.sample import read_samples
from tests.e2e.support import base_arguments, run_training
from tests.e2e.test_resume import assert_same_checkpoint


def test_a_run_with_refills_repeats_itself_and_resumes_bit_for_bit(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": teacher,
        "advantage_estimator": "grpo",
        "rm_type": None,
        "custom_rm_path": "tests.e2e.rewards:has_a_seven",
        "dynamic_filter": "unequal_rewards",
        "n_samples_per_prompt": 3,
        "rollout_batch_size": 8,
        "micro_batch_size": 12,
        "num_rollout": 4,
        "save_interval": 2,
    }
    pattern = "recorded_{rollout_id}.jsonl"
    straight = run_training(
        student, prompts, tmp_path / "one", **common, save_debug_rollout_data=tmp_path / "one" / pattern
    )
    assert sum(line["rollout/filtered_groups"] for line in straight) > 0
    run_training(student, prompts, tmp_path / "two", **common, save_debug_rollout_data=tmp_path / "two" / pattern)
    checkpoints = tmp_path / "two" / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run_training(student, prompts, tmp_path / "two", **common, load=checkpoints)
    for one, two in zip(straight, resumed, strict=True):
        for name in ("train/loss", "train/grad_norm", "reward/mean", "rollout/filtered_groups", "rollout/tokens"):
            assert one[name] == two[name], (one["step"], name)
    assert_same_checkpoint(tmp_path / "one" / "checkpoints" / "iter_0000004", checkpoints / "iter_0000004")
    for number in range(4):
        name = pattern.replace("{rollout_id}", str(number))
        samples = list(read_samples(tmp_path / "one" / name))
        assert len(samples) == 24
        assert all(len({sample.reward for sample in samples[start : start + 3]}) > 1 for start in range(0, 24, 3))
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_rollout_that_cannot_be_made_leaves_the_state_before_it(
    student: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The filter drops everything in the third rollout; resumed without it, the run goes on as one that had none."""
    common: dict[str, Any] = {"rm_type": None, "custom_rm_path": "tests.e2e.rewards:count_sevens", "num_rollout": 4}
    run = tmp_path / "run"
    stopping = base_arguments(
        student, prompts, run, **common, dynamic_filter_path="tests.e2e.rewards:keep_all_for_two_rollouts"
    )
    assert run_cli(train.main, stopping) == 1
    shown = capsys.readouterr()
    assert "stopped and saved; resume with: python" in shown.out
    assert shown.err.splitlines()[-1].startswith("error: the dynamic filter dropped 17 of 20 groups of rollout 2")
    assert inspect_checkpoint(run / "checkpoints").steps == [2]
    resumed = run_training(student, prompts, run, **common, load=run / "checkpoints")
    straight = run_training(student, prompts, tmp_path / "straight", **common)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for one, two in zip(straight, resumed, strict=True):
        assert one["train/loss"] == two["train/loss"]


def test_nothing_is_saved_where_nothing_was_trained(student: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(FilterError, match="groups of rollout 0"):
        run_training(
            student, prompts, tmp_path / "run", dynamic_filter_path="tests.e2e.rewards:keep_none", rm_type="zero"
        )
    assert inspect_checkpoint(tmp_path / "run" / "checkpoints").kind is None


def test_recorded_failures_train_as_they_did(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "num_rollout": 1}
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    run_training(student, prompts, tmp_path / "one", **common, save_debug_rollout_data=pattern)
    path = tmp_path / "recorded_0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    length = len(rows[0]["response_tokens"])
    rows[0]["teacher_failure"] = "timeout"
    rows[0]["teacher_scores"] |= {"log_probs_T": [float("nan")] * length, "valid_T": [False] * length}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = run_training(
        student,
        prompts,
        tmp_path / "two",
        **(common | {"opd_teacher_load": None}),
        prompt_data=None,
        load_debug_rollout_data=pattern,
    )
    assert line["opd/teacher_failed_frac"] == 1 / 8
    assert 0 < line["opd/scored_frac"] < 1
    assert line["train/grad_norm"] > 0


def test_a_recording_without_the_top_tokens_that_are_wanted_is_refused(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    """Else the loss would be of other tokens than the options say, or fail in its middle."""
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    common: dict[str, Any] = {"use_opd": True, "num_rollout": 1}
    run_training(
        student, prompts, tmp_path / "one", **common, opd_type="megatron", opd_teacher_load=teacher,
        save_debug_rollout_data=pattern,
    )  # fmt: skip
    replay: dict[str, Any] = {
        **common,
        "opd_type": "sglang",
        "opd_loss": "distribution",
        "opd_support": "teacher_topk",
        "opd_top_k": 3,
        "prompt_data": None,
        "load_debug_rollout_data": pattern,
    }
    path = tmp_path / "recorded_0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for k, complaint in ((0, True), (2, True), (3, False)):
        for row in rows if k else []:
            length = len(row["response_tokens"])
            row["teacher_scores"] |= {
                "top_ids_TK": [list(range(k))] * length,
                "top_log_probs_TK": [[-2.0] * k] * length,
                "tail_log_mass_T": [float(np.log(1 - k * np.exp(-2.0)))] * length,
            }
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if complaint:
            with pytest.raises(UserError, match="do not hold the 3 most probable tokens of each position"):
                run_training(student, prompts, tmp_path / f"two_{k}", **replay)
        else:
            (line,) = run_training(student, prompts, tmp_path / f"two_{k}", **replay)
            assert line["train/opd_divergence"] > 0


def test_seconds_of_the_stages_are_reported(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    opd = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher}
    for line in run_training(student, prompts, tmp_path / "run", **opd):
        assert 0 < line["perf/sampling_seconds"] <= line["perf/rollout_seconds"]
        assert line["perf/teacher_wait_seconds"] == line["perf/teacher_seconds"]
        assert line["perf/teacher_wait_frac"] == line["perf/teacher_seconds"] / line["perf/step_seconds"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
