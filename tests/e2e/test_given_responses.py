"""Responses of the data in place of some of the student's, through the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opd_megatron import steps
from opd_megatron.config.errors import UserError
from opd_megatron.data.column_arithmetic import sample_problems
from opd_megatron.sample import Sample, read_samples
from tests.e2e import rewards
from tests.e2e.support import check_resumed, run_training
from tests.megatron.support import (
    GRADIENT_FLAGS,
    LINEAR_STEP,
    assert_same_tensors,
    load_reference,
    reference_log_probs,
    reference_logits,
)

TASK = {"rm_type": None, "custom_rm_path": f"{rewards.__name__}:count_sevens", "normalize_advantages": True}


@pytest.fixture
def given(teacher: Path) -> dict[str, Any]:
    return {
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": teacher,
        "opd_loss": "distribution",
        "opd_data_response_key": "answer",
        "opd_student_data_fraction": 0.5,
        "save_interval": 100,
    }


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with a response; every second one has it in the metadata."""
    path = tmp_path_factory.mktemp("answered") / "prompts.jsonl"
    rows: list[dict[str, Any]] = []
    for problem in sample_problems(40, 3, held_out=False):
        answer = {"answer": problem.answer()}
        rows.append({"prompt": problem.prompt(), **(answer if len(rows) % 2 else {"metadata": answer})})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recorded(pattern: Path, rollout_id: int) -> list[Sample]:
    return list(read_samples(str(pattern).replace("{rollout_id}", str(rollout_id))))


def test_whole_groups_take_the_data_s_response_and_the_task_does_not_see_them(
    student: Path, answered: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    pattern = tmp_path / "{rollout_id}.jsonl"
    run = {**given, **TASK, "save_debug_rollout_data": pattern, "opd_diagnostics_interval": 1}
    metrics = run_training(student, answered, tmp_path / "run", **run)
    shares = []
    for rollout_id, line in enumerate(metrics):
        samples = recorded(pattern, rollout_id)
        own = [sample for sample in samples if not sample.from_data]
        shares.append(line["opd/student_data_frac"])
        assert shares[-1] == len(own) / 8
        groups = {(sample.group_index, sample.from_data) for sample in samples}
        assert len(groups) == 4
        for sample in samples:
            assert (sample.rollout_log_probs is None) == sample.from_data == (sample.reward is None)
        assert line["train/opd_divergence"] > 0
        assert line["train/grad_norm"] > 0
        if own:
            assert line["rollout/tokens"] == sum(sample.response_length for sample in own) == line["opd/tokens"]
            assert line["reward/mean"] == pytest.approx(np.mean([sample.reward for sample in own]))
            assert line["rollout/train_logprob_gap_max"] < 1e-3
    assert 0 < np.mean(shares) < 1
    again = run_training(student, answered, tmp_path / "again", **run)
    assert [line["train/loss"] for line in again] == [line["train/loss"] for line in metrics]


def test_a_resumed_run_makes_the_same_choice(
    student: Path, answered: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    given |= {"num_rollout": 4, "save_interval": 2}
    straight = run_training(student, answered, tmp_path / "straight", **given)
    names = ("opd/student_data_frac", "train/loss", "train/grad_norm")
    check_resumed(student, answered, tmp_path, straight, names, **given)


def test_a_recording_knows_where_its_responses_come_from(
    student: Path, answered: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    pattern = tmp_path / "{rollout_id}.jsonl"
    given |= {"opd_support": "teacher_topk", "opd_top_k": 4, "opd_student_data_fraction": 0, "num_rollout": 1}
    run_training(student, answered, tmp_path / "one", **given, save_debug_rollout_data=pattern)
    assert all(sample.from_data for sample in recorded(pattern, 0))
    replay = {"use_opd": True, "opd_type": "megatron", "prompt_data": None, "load_debug_rollout_data": pattern}
    replayed = run_training(student, answered, tmp_path / "two", **replay, num_rollout=1)
    assert replayed[0]["train/opd_supervised_loss"] > 0
    with pytest.raises(UserError, match="its response is not the student's, and --use-tis needs the student's"):
        run_training(student, answered, tmp_path / "three", **replay, num_rollout=1, use_tis=True)


def test_the_step_is_that_of_the_divergence_at_the_data_s_prefixes(
    student: Path, teacher: Path, answered: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Nothing of the student's samples, and no task advantage, is in the gradient."""
    pattern, folder = tmp_path / "{rollout_id}.jsonl", tmp_path / "hf"
    given |= {**GRADIENT_FLAGS, **TASK, "opd_student_data_fraction": 0, "num_rollout": 1, "lr_decay_style": "constant"}
    line = run_training(student, answered, tmp_path / "run", **given, save_debug_rollout_data=pattern, save_hf=folder)[
        0
    ]
    assert line["opd/student_data_frac"] == 0
    assert line["train/task_advantage_abs_mean"] == 0
    assert not {"reward/mean", "opd/reverse_kl", "rollout/response_length_mean"} & line.keys()
    answers = [json.loads(row) for row in answered.read_text().splitlines()]
    texts = {row["prompt"]: row.get("answer") or row["metadata"]["answer"] for row in answers}
    model, other = load_reference(student, torch.float64), load_reference(teacher, torch.float64)
    samples, total = recorded(pattern, 0), torch.zeros((), dtype=torch.float64)
    for sample in samples:
        assert sample.response == texts[sample.prompt]
        student_TV = reference_logits(model, sample).log_softmax(-1)
        teacher_TV = reference_logits(other, sample).detach().log_softmax(-1)
        total = total + (student_TV.exp() * (student_TV - teacher_TV)).sum(-1).mean() / len(samples)
    assert line["train/loss"] == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    before, after = load_file(student / "model.safetensors"), load_file(folder / "model.safetensors")
    expected = {name: value.grad.float() for name, value in model.named_parameters() if value.grad is not None}
    found = {name: (before[name] - after[name]) / LINEAR_STEP for name in expected}
    assert_same_tensors(found, expected, 2e-5)


def test_task_advantages_are_made_of_the_student_s_samples_alone(
    student: Path, answered: Path, tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whitened over the student's tokens of the whole rollout, whatever its optimizer steps; 0 on all others."""
    seen: list[list[Sample]] = []
    looked = steps.diagnose

    def look(parts: Any, samples: list[Sample], *rest: Any) -> dict[str, float]:
        seen.append(list(samples))
        return looked(parts, samples, *rest)

    monkeypatch.setattr(steps, "diagnose", look)
    steps_of_four = {"advantage_estimator": "grpo", "rollout_batch_size": 8, "global_batch_size": 4}
    run_training(student, answered, tmp_path / "run", **given, **TASK, **steps_of_four)
    assert len(seen) == 3
    for samples in seen:
        own = np.concatenate([sample.advantages for sample in samples if not sample.from_data])
        others = np.concatenate([sample.advantages for sample in samples if sample.from_data])
        assert len(others)
        assert not others.any()
        assert own.mean() == pytest.approx(0, abs=1e-6)
        assert own.std(ddof=1) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"opd_loss": "sampled", "opd_kl_discount": 0.5},
        {"opd_loss": "kl_loss", "global_batch_size": 4, "opd_data_source": "teacher", "opd_data_response_key": None},
        {"opd_loss": "distribution", "opd_data_loss": "supervised"},
    ],
    ids=["sampled", "kl_loss and the teacher's samples", "distribution"],
)
def test_given_responses_teach_by_their_tokens(
    student: Path, answered: Path, tmp_path: Path, given: dict[str, Any], changes: dict[str, Any]
) -> None:
    pattern = tmp_path / "{rollout_id}.jsonl"
    settings = {**given, **TASK, "opd_student_data_fraction": 0.4, **changes, "save_debug_rollout_data": pattern}
    metrics = run_training(student, answered, tmp_path / "run", **settings)
    assert all(line["train/grad_norm"] > 0 for line in metrics)
    for rollout_id, line in enumerate(metrics):
        some = any(sample.from_data for sample in recorded(pattern, rollout_id))
        assert line.get("train/opd_supervised_loss", 0.0) > 0 if some else "train/opd_supervised_loss" not in line


def test_the_step_at_given_responses_is_that_of_their_cross_entropy(
    student: Path, answered: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    pattern, folder = tmp_path / "{rollout_id}.jsonl", tmp_path / "hf"
    given |= {**GRADIENT_FLAGS, "opd_loss": "sampled", "opd_kl_coef": 0.7, "opd_student_data_fraction": 0}
    given |= {"num_rollout": 1, "lr_decay_style": "constant", "save_debug_rollout_data": pattern, "save_hf": folder}
    (line,) = run_training(student, answered, tmp_path / "run", **given)
    model, total = load_reference(student, torch.float64), torch.zeros((), dtype=torch.float64)
    samples = recorded(pattern, 0)
    for sample in samples:
        total = total - 0.7 * reference_log_probs(model, sample).mean() / len(samples)
    assert line["train/loss"] == pytest.approx(total.item(), rel=1e-5)
    assert 0.7 * line["train/opd_supervised_loss"] == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    before, after = load_file(student / "model.safetensors"), load_file(folder / "model.safetensors")
    expected = {name: value.grad.float() for name, value in model.named_parameters() if value.grad is not None}
    found = {name: (before[name] - after[name]) / LINEAR_STEP for name in expected}
    assert_same_tensors(found, expected, 2e-5)
