"""Responses that a Megatron teacher samples in place of some of the student's, through the real loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.rollout.engine import GenerateRequest, SamplingParams
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.sample import Sample, Status, read_samples
from tests.e2e import rewards
from tests.e2e.support import check_resumed, make_model, run_training
from tests.megatron.support import load_reference, reference_logits


@pytest.fixture
def taught(teacher: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": teacher,
        "opd_loss": "distribution",
        "opd_data_source": "teacher",
        "opd_student_data_fraction": 0.5,
        "save_interval": 100,
        "save_debug_rollout_data": tmp_path / "{rollout_id}.jsonl",
    }


def recorded(run: dict[str, Any], rollout_id: int) -> list[Sample]:
    return list(read_samples(str(run["save_debug_rollout_data"]).replace("{rollout_id}", str(rollout_id))))


def engine_of(folder: Path) -> LocalEngine:
    engine = LocalEngine(folder, load_tokenizer(folder))
    engine.update_weights(load_file(folder / "model.safetensors").items(), "hf")
    return engine


def test_the_teacher_answers_whole_groups_as_it_does_alone(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, taught: dict[str, Any]
) -> None:
    """Its samples are those of its weights from the same random stream, and the task does not see them."""
    task = {"rm_type": None, "custom_rm_path": f"{rewards.__name__}:count_sevens", "rollout_temperature": 0.7}
    metrics = run_training(student, prompts, tmp_path / "run", **taught, **task, opd_diagnostics_interval=1)
    engine, sampling = engine_of(teacher), SamplingParams(temperature=0.7, max_new_tokens=12)
    for rollout_id, line in enumerate(metrics):
        samples = recorded(taught, rollout_id)
        given = [sample for sample in samples if sample.from_data]
        assert len({(sample.group_index, sample.from_data) for sample in samples}) == 4
        assert line["opd/student_data_frac"] == 1 - len(given) / 8
        for sample in given:
            request = GenerateRequest(sample.prompt_tokens, sampling, (5, rollout_id, sample.index))
            (alone,) = engine.generate([request])
            assert sample.response_tokens.tolist() == alone.tokens.tolist()
            assert (sample.response, sample.status) == (alone.text, alone.finish)
            assert sample.rollout_log_probs is None
            assert sample.reward is None
            assert sample.teacher_scores is not None
            np.testing.assert_allclose(sample.teacher_scores.log_probs_T, alone.log_probs, atol=1e-4)
        if given:
            assert line["opd/given_length_mean"] == np.mean([sample.response_length for sample in given])
            cut = [sample.status is Status.TRUNCATED for sample in given]
            assert line["opd/given_truncated_frac"] == np.mean(cut)
        assert line["train/opd_divergence"] > 0
        assert line["train/grad_norm"] > 0
    assert 0 < np.mean([line["opd/student_data_frac"] for line in metrics]) < 1
    first, second, *_ = (sample.response for sample in recorded(taught, 0) if sample.from_data)
    assert first != second, "two samples of a prompt are two samples"


def test_the_loss_is_the_divergence_at_the_teacher_s_prefixes(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, taught: dict[str, Any]
) -> None:
    """Also where a response was cut: nothing is said of an end that it does not have."""
    taught |= {"opd_student_data_fraction": 0, "num_rollout": 1, "rollout_max_response_len": 5}
    line = run_training(student, prompts, tmp_path / "run", **taught)[0]
    assert line["opd/student_data_frac"] == 0
    assert line["opd/given_truncated_frac"] > 0
    model, other, total = load_reference(student, torch.float64), load_reference(teacher, torch.float64), 0.0
    samples = recorded(taught, 0)
    for sample in samples:
        assert sample.loss_mask.all()
        assert sample.response_length == 5 or sample.status is Status.COMPLETED
        student_TV = reference_logits(model, sample).log_softmax(-1)
        teacher_TV = reference_logits(other, sample).log_softmax(-1)
        total += (student_TV.exp() * (student_TV - teacher_TV)).sum(-1).mean().item() / len(samples)
    assert line["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_resumed_run_goes_on_with_the_same_bits(
    student: Path, prompts: Path, tmp_path: Path, taught: dict[str, Any], source: str
) -> None:
    """With only the first tokens of each response: the teacher's samples end there, those of the data are cut."""
    taught |= {"num_rollout": 4, "save_interval": 2, "opd_prefix_len": 3, "opd_data_source": source}
    if source == "data":
        taught["opd_data_response_key"] = "label"
    straight = run_training(student, prompts, tmp_path / "straight", **taught)
    for rollout_id, line in enumerate(straight):
        samples = recorded(taught, rollout_id)
        trained = [int(sample.loss_mask.sum()) for sample in samples]
        assert max(trained) <= 3
        given = [sample for sample in samples if sample.from_data]
        if source == "teacher":
            assert all(sample.response_length <= 3 for sample in given)
        assert 0 < line["opd/student_data_frac"] + len(given) / 8 == 1
    names = ("opd/student_data_frac", "train/loss", "train/grad_norm")
    check_resumed(student, prompts, tmp_path, straight, names, **taught)


def test_what_the_student_cannot_take_ends_the_response(
    student: Path, prompts: Path, tmp_path: Path, taught: dict[str, Any]
) -> None:
    """A teacher in a torch_dist folder with rows of the embedding that the student does not have, and bfloat16."""
    larger = make_model(tmp_path / "larger", seed=7, vocabulary=40)
    run_training(larger, prompts, tmp_path / "made", num_rollout=1)
    taught |= {"opd_teacher_load": tmp_path / "made" / "checkpoints", "opd_teacher_dtype": "bfloat16"}
    taught["opd_student_data_fraction"] = 0
    metrics = run_training(student, prompts, tmp_path / "run", **taught)
    samples = [sample for rollout_id in range(3) for sample in recorded(taught, rollout_id)]
    assert all(sample.response_tokens.max(initial=0) < 18 for sample in samples)
    cut = [sample for sample in samples if sample.status is Status.TRUNCATED and sample.response_length < 12]
    assert len(cut) > 5
    assert all(np.isfinite(line["train/loss"]) for line in metrics)
