"""Models that cannot sample, or cannot judge, what the run would make of them: one line before harm is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from opd_megatron import steps
from opd_megatron.assembly import Parts
from opd_megatron.config.errors import UserError
from opd_megatron.rollout.engine import BrokenWeightsError
from opd_megatron.sample import Sample
from tests.e2e.support import make_model, run_training


def test_weights_that_give_no_probabilities_end_the_run(student: Path, prompts: Path, tmp_path: Path) -> None:
    """Finite ones, whose products are not."""
    broken = shutil.copytree(student, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e38
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenWeightsError, match="log-probabilities are NaN"):
        run_training(broken, prompts, tmp_path / "run")


def test_weights_that_came_to_give_no_probabilities_are_not_saved(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = steps.make_samples

    def overflowing(parts: Parts, rollout_id: int, metrics: dict[str, float]) -> list[Sample]:
        if rollout_id == 1:
            raise BrokenWeightsError("NaN")
        return make(parts, rollout_id, metrics)

    monkeypatch.setattr(steps, "make_samples", overflowing)
    with pytest.raises(BrokenWeightsError):
        run_training(student, prompts, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tokenizer_of_more_ids_than_the_student_has_is_refused(prompts: Path, tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", seed=1, vocabulary=15)
    with pytest.raises(UserError, match="the model of --hf-checkpoint has a vocabulary of 15 tokens: is the tokenizer"):
        run_training(small, prompts, tmp_path / "run", custom_rm_path="tests.e2e.rewards:count_sevens", rm_type=None)


@pytest.mark.parametrize("flag", ["opd_teacher_load", "opd_more_teachers", "opd_ref_load"])
def test_a_frozen_model_made_for_less_than_the_samples_is_refused(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, flag: str
) -> None:
    short = make_model(tmp_path / "short", seed=2, positions=16)
    flags: dict[str, Any] = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, flag: short}
    beside = {"opd_more_teachers": {"opd_teacher_mixture": "geometric"}, "opd_ref_load": {"opd_reward_scale": 1.5}}
    flags |= beside.get(flag, {})
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} .* is made for 16 positions"):
        run_training(student, prompts, tmp_path / "run", **flags)
    fits = run_training(student, prompts, tmp_path / "fits", **flags, rollout_max_response_len=6, num_rollout=1)
    assert fits[0]["opd/tokens"] > 0


def test_a_reference_of_fewer_tokens_is_refused_for_a_student_that_teaches_itself(
    student: Path, prompts: Path, tmp_path: Path
) -> None:
    small = make_model(tmp_path / "small", seed=2, vocabulary=15)
    flags = {"use_opd": True, "opd_type": "megatron", "opd_teacher": "self", "opd_self_template": "1{prompt}"}
    with pytest.raises(UserError, match=r"--opd-ref-load .* has a vocabulary of 15 tokens"):
        run_training(student, prompts, tmp_path / "run", **flags, opd_reward_scale=1.5, opd_ref_load=small)
