"""Diagnostics through the real loop: their metrics at their interval, and nothing of the training changed by them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config.errors import UserError
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.observe import alarms
from tests.e2e.support import run_training

MIXED: dict[str, Any] = {
    "rm_type": None,
    "custom_rm_path": "tests.e2e.rewards:count_sevens",
    "use_opd": True,
    "opd_type": "megatron",
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "entropy_coef": 0.01,
}
MEASURED = (
    "opd/forward_kl_exact",
    "opd/jsd_exact",
    "opd/teacher_entropy",
    "opd/kl_by_entropy_q4",
)
ALWAYS = ("rollout/repetition", "opd/reverse_kl_correct", "opd/reverse_kl_incorrect_se")
"""What the samples' tokens and log-probabilities say, which every rollout has."""
OF_GRADIENTS = ("train/opd_grad_share", "train/grad_cosine", "train/grad_snr")
INTERVALS = {"opd_diagnostics_interval": 2, "opd_gradient_diagnostics_interval": 2}


def trained(line: dict[str, Any]) -> dict[str, Any]:
    """What training did, without clocks and diagnostics."""
    return {name: value for name, value in line.items() if name in ("train/loss", "train/grad_norm", "opd/reverse_kl")}


PURPOSES: dict[str, tuple[dict[str, Any], int]] = {
    "none but diagnostics": ({}, 2),
    "several steps": ({"ppo_epochs": 2}, 0),
    "chosen tokens": ({"opd_token_select": "sample", "opd_token_score": "soft_or"}, 0),
}
"""What else the student is passed for before a step, and the passes that the diagnostics add in three steps."""


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[HiddenStateModel]:
    """The model of each micro-batch that a trainer was passed without learning from it."""
    found: list[HiddenStateModel] = []
    forward = HiddenStateModel.forward

    def noted(model: HiddenStateModel, *rest: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled() and next(model.parameters()).requires_grad:
            found.append(model)
        return forward(model, *rest, **named)

    monkeypatch.setattr(HiddenStateModel, "forward", noted)
    return found


@pytest.mark.parametrize("purpose", PURPOSES)
def test_three_steps(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, looks: list[HiddenStateModel], purpose: str
) -> None:
    changes, passes = PURPOSES[purpose]
    settings = MIXED | {"opd_teacher_load": teacher} | changes
    plain = run_training(student, prompts, tmp_path / "plain", **settings)
    before = len(looks)
    measured = run_training(student, prompts, tmp_path / "measured", **settings, **INTERVALS)
    assert len(looks) - 2 * before == 2 * passes  # of two micro-batches each
    for number, (line, other) in enumerate(zip(measured, plain, strict=True)):
        assert trained(line) == trained(other)
        assert all((name in line) == (number % 2 == 0) for name in (*MEASURED, *OF_GRADIENTS))
        assert not any(name in other for name in (*MEASURED, *OF_GRADIENTS))
        assert all(line[name] == other[name] for name in ALWAYS)
    first = measured[0]
    assert 0 < first["opd/jsd_exact"] < math.log(2)
    assert 0 < first["opd/topk_overlap"] <= 1
    assert 0 < first["train/opd_grad_share"] < 1
    if not changes:  # the exact KL of the training's own pass, and the gradient that it took
        assert first["opd/reverse_kl_exact"] == pytest.approx(plain[0]["opd/reverse_kl_exact"], rel=1e-5)
        task, opd, cosine = (first[f"train/{name}"] for name in ("task_grad_norm", "opd_grad_norm", "grad_cosine"))
        whole = math.sqrt(task**2 + opd**2 + 2 * cosine * task * opd)
        assert whole == pytest.approx(first["train/grad_norm"], rel=1e-4)


def test_whole_distributions_and_no_task(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher}
    settings |= {"advantage_estimator": "none"}
    settings |= dict.fromkeys(INTERVALS, 1) | {"opd_loss": "distribution", "opd_exact_kl_interval": 0}
    (line,) = run_training(student, prompts, tmp_path, num_rollout=1, **settings)
    assert line["train/opd_divergence"] == pytest.approx(line["opd/reverse_kl_exact"], rel=0.2)
    assert line["train/opd_grad_norm"] == pytest.approx(line["train/grad_norm"], rel=1e-4)
    assert line["train/opd_grad_share"] == 1.0
    assert line["train/grad_cosine"] is None
    assert "opd/reverse_kl_correct" not in line


def test_recorded_scores_are_measured_as_far_as_they_go(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    settings = MIXED | {"num_rollout": 1}
    teach = {"opd_teacher_load": teacher, "save_debug_rollout_data": pattern}
    run_training(student, prompts, tmp_path / "one", **settings, **teach)
    (line,) = run_training(
        student, prompts, tmp_path / "two", **settings, prompt_data=None, load_debug_rollout_data=pattern,
        opd_diagnostics_interval=1,
    )  # fmt: skip
    assert line["opd/student_entropy"] == pytest.approx(line["train/entropy"], rel=0.2)
    assert line["opd/kl_by_position_q1"] is not None
    assert "opd/teacher_entropy" not in line


def test_a_failure_is_named_once(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A coefficient that does nothing, seen after two steps of the real loop and remembered by a resumed one."""
    monkeypatch.setattr(alarms, "WINDOW", 1)
    settings = MIXED | {"opd_teacher_load": teacher, "opd_kl_coef": 1e-6, "save_interval": 2}
    with caplog.at_level(logging.WARNING):
        run_training(student, prompts, tmp_path / "run", **settings, num_rollout=2, lr_decay_iters=4)
        named = [record for record in caplog.records if "--opd-kl-coef has next to no effect" in record.getMessage()]
        assert len(named) == 1
        caplog.clear()
        saved = tmp_path / "run" / "checkpoints"
        run_training(student, prompts, tmp_path / "run", **settings, num_rollout=4, lr_decay_iters=4, load=saved)
    assert not [record for record in caplog.records if "--opd-kl-coef has next to no effect" in record.getMessage()]


def test_settings_without_effect_are_refused(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--opd-diagnostics-top-k has no effect without --opd-diagnostics-interval"):
        run_training(student, prompts, tmp_path, **MIXED, opd_teacher_load=teacher, opd_diagnostics_top_k=4)
