"""Three steps of every form of the distillation term through the real loop, each with what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_megatron.objectives.distribution import DIVERGENCES
from tests.e2e.support import run_training

MOVING = {"global_batch_size": 4, "lr": 3e-3}
"""Two optimizer steps per rollout, the second off policy."""
WHOLE: dict[str, Any] = {"opd_loss": "distribution"}
OTHER = "OTHER"
"""Stands for a model of another size than student and teacher."""
MIXED: dict[str, Any] = {"opd_more_teachers": OTHER}

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "clipped": ({"opd_log_ratio_clip": 0.1}, "train/opd_clipfrac"),
    "discounted": ({"opd_kl_discount": 0.9, "opd_baseline": "kl"}, "train/opd_advantage_abs_mean"),
    "importance": ({"opd_importance": True, **MOVING}, "train/opd_loss"),
    "importance of the engine's tokens": ({"opd_importance": True, "use_tis": True}, "train/tis_weight"),
    "k3 loss of the engine's tokens": (
        {"opd_loss": "kl_loss", "opd_kl_loss_type": "k3", "use_tis": True, **MOVING},
        "train/tis_weight",
    ),
    "k1 loss": ({"opd_loss": "kl_loss", "opd_kl_loss_type": "k1"}, "train/opd_loss"),
    "k2 loss": ({"opd_loss": "kl_loss"}, "train/opd_loss"),
    "k3 loss": ({"opd_loss": "kl_loss", "opd_kl_loss_type": "k3"}, "train/opd_loss"),
    "uneven jsd, scaled, and another at another temperature": (
        {
            **WHOLE,
            "opd_divergence": "jsd",
            "opd_jsd_scaled": True,
            "opd_jsd_beta": 0.3,
            "opd_divergence_to": "forward_kl",
            "opd_divergence_mix": 0.25,
            "opd_temperature": 0.7,
        },
        "train/opd_divergence",
    ),
    "student's top and a tail": ({**WHOLE, "opd_support": "student_topk", "opd_top_k": 4}, "train/opd_divergence"),
    "teacher's top, rescaled": (
        {**WHOLE, "opd_support": "teacher_topk", "opd_top_k": 4, "opd_tail": "renormalized"},
        "train/opd_divergence",
    ),
    "teacher's top": ({**WHOLE, "opd_support": "teacher_topk", "opd_top_k": 4}, "train/opd_divergence"),
    "student's top, rescaled": (
        {**WHOLE, "opd_support": "student_topk", "opd_top_k": 4, "opd_tail": "renormalized"},
        "train/opd_divergence",
    ),
    "schedule": (
        {
            **WHOLE,
            "opd_divergence": "forward_kl",
            "opd_divergence_to": "reverse_kl",
            "opd_divergence_schedule": "0:2",
        },
        "train/opd_divergence",
    ),
    "entropy-aware": ({**WHOLE, "opd_entropy_aware": 0.5}, "train/opd_divergence"),
    "nucleus sampling": ({**WHOLE, "rollout_top_p": 0.9}, "train/opd_divergence"),
    "extrapolated": ({"opd_reward_scale": 1.25, "opd_kl_discount": 0.5}, "opd/implicit_reward"),
    "extrapolated from another": ({"opd_reward_scale": 1.25, "opd_ref_load": OTHER}, "opd/implicit_reward"),
    "extrapolated as a loss": (
        {"opd_reward_scale": 0.5, "opd_loss": "kl_loss", "use_kl_loss": True, "kl_loss_coef": 0.1},
        "train/kl_loss",
    ),
    "extrapolated, whole": ({**WHOLE, "opd_reward_scale": 1.25, "offload_teacher": True}, "opd/implicit_reward"),
    "extrapolated from another, whole": (
        {**WHOLE, "opd_reward_scale": 1.25, "opd_ref_load": OTHER, "offload_teacher": True},
        "opd/implicit_reward",
    ),
    "with prompts": ({**WHOLE, "opd_include_prompt": True, **MOVING}, "train/opd_prompt_divergence"),
    "with prompts, chosen tokens": (
        {**WHOLE, "opd_include_prompt": True, "opd_token_select": "top", "opd_token_score": "soft_or"},
        "train/opd_prompt_divergence",
    ),
    "arithmetic mixture": (
        {**MIXED, "opd_teacher_mixture": "arithmetic", "opd_teacher_weights": [1, 3], "opd_baseline": "kl"},
        "opd/reverse_kl_exact",
    ),
    "geometric mixture": ({**MIXED, "opd_teacher_mixture": "geometric", "opd_kl_discount": 1}, "opd/reverse_kl_exact"),
    "geometric mixture, whole": (
        {**MIXED, **WHOLE, "opd_teacher_mixture": "geometric", "offload_teacher": True},
        "train/opd_divergence",
    ),
    "arithmetic mixture, whole, extrapolated": (
        {**MIXED, **WHOLE, "opd_teacher_mixture": "arithmetic", "opd_reward_scale": 1.25, "opd_divergence": "jsd"},
        "opd/implicit_reward",
    ),
    "arithmetic mixture, chosen tokens, measured": (
        {
            **MIXED,
            "opd_teacher_mixture": "arithmetic",
            "opd_token_select": "top",
            "opd_token_score": "soft_or",
            "opd_diagnostics_interval": 1,
            "opd_gradient_diagnostics_interval": 1,
        },
        "opd/effective_sample_frac",
    ),
    "geometric mixture, whole, sampled tokens, measured": (
        {
            **MIXED,
            **WHOLE,
            "opd_teacher_mixture": "geometric",
            "opd_token_select": "sample",
            "opd_token_score": "divergence",
            "opd_diagnostics_interval": 1,
            "opd_gradient_diagnostics_interval": 1,
            "offload_teacher": True,
        },
        "train/opd_grad_snr",
    ),
    **{name: ({**WHOLE, "opd_divergence": name}, "train/opd_divergence") for name in DIVERGENCES},
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps(student: Path, teacher: Path, other: Path, prompts: Path, tmp_path: Path, case: str) -> None:
    changes, metric = CASES[case]
    changes = {name: other if value == OTHER else value for name, value in changes.items()}
    opd = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "advantage_estimator": "none"}
    metrics = run_training(
        student, prompts, tmp_path / "run", rollout_batch_size=4, save_interval=100, **{**opd, **changes}
    )
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["train/grad_norm"] > 0 for line in metrics)
    assert metrics[-1][metric] != 0
    if "opd_diagnostics_interval" in changes:  # what needs one teacher alone is left out
        measured = {name.removeprefix("opd/") for name in metrics[-1]}
        assert {"reverse_kl_exact", "student_entropy", "kl_by_position_q1", "kl_by_entropy_q4"} <= measured
        assert not measured & {"forward_kl_exact", "jsd_exact", "teacher_entropy", "topk_overlap"}
        assert all(0 < line["opd/token_kept_frac"] < 1 for line in metrics)


def test_the_coefficient_follows_its_schedule_through_the_loop(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    opd = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "advantage_estimator": "none"}
    metrics = run_training(
        student, prompts, tmp_path / "run", **opd, **WHOLE, opd_kl_coef=1.0, opd_kl_coef_end=0.0, opd_kl_coef_rollouts=2
    )
    for line, coefficient in zip(metrics, (1.0, 0.5, 0.0), strict=True):
        assert line["train/loss"] == pytest.approx(coefficient * line["train/opd_loss"], abs=1e-7)


def test_beta_follows_its_schedule_and_a_resumed_run_goes_on_with_it(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    opd = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, "advantage_estimator": "none", **WHOLE}
    opd |= {"opd_divergence": "jsd", "opd_jsd_scaled": True, "opd_jsd_beta": 0, "opd_jsd_beta_end": 1}
    opd |= {"opd_divergence_schedule": "0:2", "rollout_batch_size": 2, "lr_decay_iters": 3}
    whole = run_training(student, prompts, tmp_path / "run", **opd, save_interval=1)
    assert [line["opd/jsd_beta"] for line in whole] == [0.0, 0.5, 1.0]
    exact = whole[-1]["opd/reverse_kl_exact"]  # what beta 1 is, up to the average over sequences
    assert whole[-1]["train/opd_divergence"] == pytest.approx(exact, rel=0.3)
    saved = tmp_path / "run" / "checkpoints"
    resumed = run_training(student, prompts, tmp_path / "resumed", **opd, load=saved, ckpt_step=1)
    for line, other in zip(resumed, whole[1:], strict=True):
        for name in ("opd/jsd_beta", "train/opd_divergence", "train/grad_norm"):
            assert line[name] == other[name]
