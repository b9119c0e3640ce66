"""Three steps of a student that is its own teacher through the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.data.column_arithmetic import sample_problems
from opd_megatron.sample import read_samples
from opd_megatron.teacher.protocol import TeacherError
from tests.e2e.support import run_training

OWN: dict[str, Any] = {
    "use_opd": True,
    "opd_type": "megatron",
    "opd_teacher": "self",
    "advantage_estimator": "none",
    "opd_self_context_key": "solution",
    "opd_self_template": "{context};{prompt}",
    "rollout_max_response_len": 10,
    "save_interval": 100,
}
WHOLE: dict[str, Any] = {"opd_loss": "distribution"}
FORMS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "quiet": {"opd_baseline": "optimal"},
    "whole": WHOLE,
    "teacher's top": {**WHOLE, "opd_divergence": "jsd", "opd_support": "teacher_topk", "opd_top_k": 4},
}


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with the written-out solution that the teacher alone sees."""
    path = tmp_path_factory.mktemp("solved") / "prompts.jsonl"
    problems = sample_problems(40, 3, held_out=False)
    rows = [{"prompt": p.prompt(), "label": p.answer(), "metadata": {"solution": p.response()}} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("weights", "form"),
    [("frozen", "sampled"), ("frozen", "teacher's top"), ("current", "quiet"), ("current", "whole"), ("ema", "whole")],
)
def test_three_steps(student: Path, solved: Path, tmp_path: Path, weights: str, form: str) -> None:
    metrics = run_training(student, solved, tmp_path / "run", **OWN, **FORMS[form], opd_self_weights=weights)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["train/grad_norm"] > 0
        assert line["opd/reverse_kl_exact"] > 0.01
        assert line["opd/teacher_failed_frac"] == 0


def test_the_teacher_s_prompt_is_recorded_and_a_recording_needs_no_teacher(
    student: Path, solved: Path, tmp_path: Path
) -> None:
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    first = run_training(student, solved, tmp_path / "one", **OWN, num_rollout=1, save_debug_rollout_data=pattern)
    for sample in read_samples(tmp_path / "recorded_0.jsonl"):
        assert sample.teacher_prompt_tokens is not None
        own = len(sample.prompt_tokens)
        np.testing.assert_array_equal(sample.teacher_prompt_tokens[-own:], sample.prompt_tokens)
        assert len(sample.teacher_prompt_tokens) > own + 30
    replayed = run_training(
        student,
        solved,
        tmp_path / "two",
        **{name: OWN[name] for name in ("use_opd", "opd_type", "opd_teacher", "advantage_estimator")},
        num_rollout=1,
        prompt_data=None,
        load_debug_rollout_data=pattern,
    )
    assert replayed[0]["opd/reverse_kl"] == pytest.approx(first[0]["opd/reverse_kl"], abs=1e-7)


@pytest.mark.parametrize(
    ("weights", "form", "changes"),
    [
        ("ema", "whole", {"dynamic_filter": "unequal_rewards", "dynamic_filter_max_refills": 9}),
        ("current", "sampled", {"advantage_estimator": "grpo"}),
        ("frozen", "teacher's top", {"opd_token_select": "top"}),
    ],
)
def test_three_steps_of_feedback(
    student: Path, prompts: Path, tmp_path: Path, weights: str, form: str, changes: dict[str, Any]
) -> None:
    """Who is told the answer is taught, who solved it is left out; a recording has both and needs no teacher."""
    told: dict[str, Any] = {
        **OWN,
        **FORMS[form],
        **changes,
        "n_samples_per_prompt": 4,
        "rm_type": None,
        "custom_rm_path": "tests.e2e.rewards:tell_the_answer",
        "opd_self_weights": weights,
        "opd_self_context_key": "told",
        "opd_self_feedback": True,
        "save_debug_rollout_data": tmp_path / "recorded_{rollout_id}.jsonl",
    }
    metrics = run_training(student, prompts, tmp_path / "run", **told)
    for line in metrics:
        assert 0 < line["opd/feedback_frac"] == 1 - line["reward/mean"] < 1
        assert line["train/grad_norm"] > 0
        assert line["opd/reverse_kl_exact"] > 0.01
        assert line["opd/teacher_failed_frac"] == 0
        assert 0 < line["opd/scored_frac"] < 1
    for sample in read_samples(tmp_path / "recorded_1.jsonl"):
        assert sample.teacher_scores is not None
        assert sample.teacher_scores.valid_T.all() == (sample.reward == 0)
        assert sample.metadata["told"] == ("" if sample.reward else f"={sample.label}")
        assert (sample.teacher_prompt_tokens is None) == (sample.reward == 1)
        if sample.teacher_prompt_tokens is not None:
            answer = len(sample.teacher_prompt_tokens) - len(sample.prompt_tokens)
            assert answer == len(f"={sample.label};")
    if form != "sampled":
        return
    replayed = run_training(
        student,
        prompts,
        tmp_path / "replayed",
        **{**OWN, "opd_self_context_key": None, "opd_self_template": None, "advantage_estimator": "grpo"},
        n_samples_per_prompt=4,
        num_rollout=1,
        prompt_data=None,
        load_debug_rollout_data=tmp_path / "recorded_{rollout_id}.jsonl",
    )
    for name in ("opd/reverse_kl", "opd/tokens", "reward/mean", "train/loss"):
        assert replayed[0][name] == pytest.approx(metrics[0][name], abs=1e-6), name


@pytest.mark.parametrize("weights", ["frozen", "current", "ema"])
def test_a_resumed_run_goes_on_bit_for_bit(student: Path, solved: Path, tmp_path: Path, weights: str) -> None:
    settings = {**OWN, **WHOLE, "opd_self_weights": weights, "lr": 1e-2, "lr_decay_iters": 20}
    whole = run_training(student, solved, tmp_path / "whole", **settings, num_rollout=4)
    run_training(student, solved, tmp_path / "parts", **settings, num_rollout=2)
    saved = tmp_path / "parts" / "checkpoints"
    resumed = run_training(student, solved, tmp_path / "parts", **settings, num_rollout=4, load=saved)
    if weights == "ema":  # an average that began anew at the checkpoint's weights would be another teacher
        began = tmp_path / "began"
        other = run_training(student, solved, began, **settings, num_rollout=1, load=saved, finetune=True)
        assert other[-1]["opd/reverse_kl_exact"] != whole[2]["opd/reverse_kl_exact"]
    for name in ("train/loss", "train/grad_norm", "opd/reverse_kl", "opd/reverse_kl_exact"):
        assert [line[name] for line in resumed[2:]] == [line[name] for line in whole[2:]], name


def test_contexts_that_do_not_fit_follow_the_policy(student: Path, solved: Path, tmp_path: Path) -> None:
    """64 positions: the longest context, prompt and response have 66. Nobody is scored beyond its positions."""
    longer = {**OWN, "rollout_max_response_len": 14, "rollout_ignore_eos": True}
    with pytest.raises(UserError, match="the model has 64 positions: shorten the contexts"):
        run_training(student, solved, tmp_path / "stopped", **longer)
    masked = {**longer, "opd_overlong": "mask"}
    with pytest.raises(TeacherError, match="more than --opd-max-failed-frac"):
        run_training(student, solved, tmp_path / "too_many", **masked)
    metrics = run_training(student, solved, tmp_path / "masked", **masked, **WHOLE, opd_max_failed_frac=1.0)
    assert any(0 < line["opd/teacher_failed_frac"] < 1 for line in metrics)
    assert all(np.isfinite(line["train/loss"]) for line in metrics)


def test_a_checkpoint_without_an_average_cannot_go_on_with_one(student: Path, solved: Path, tmp_path: Path) -> None:
    run_training(student, solved, tmp_path / "run", **OWN, num_rollout=1)
    saved = tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError, match="holds no moving average of the weights"):
        run_training(student, solved, tmp_path / "run", **OWN, opd_self_weights="ema", num_rollout=2, load=saved)
