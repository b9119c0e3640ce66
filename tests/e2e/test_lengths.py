"""Sequences that are longer than the model has positions (64 here)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.sample import read_samples, write_samples
from tests.e2e.support import run_training


def test_limits_beyond_the_model_are_announced_and_responses_cut(
    student: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"num_rollout": 1, "rollout_ignore_eos": True, "eval_rm_type": "zero", "skip_eval_before_train": True}
    sets = {"eval_prompt_data": ["dev", prompts], "eval_max_response_len": 54}
    run_training(student, prompts, tmp_path / "fits", **common, **sets, rollout_max_response_len=54)
    assert "do not fit" not in caplog.text
    lines = run_training(student, prompts, tmp_path / "cut", **common, **sets, rollout_max_response_len=55)
    assert (
        "--prompt-data: prompts of up to 10 tokens and responses of up to 55 do not fit the 64 positions" in caplog.text
    )
    assert "--eval-prompt-data" not in caplog.text
    assert lines[0]["rollout/response_length_max"] == 54
    sets["eval_max_response_len"] = 1000
    run_training(student, prompts, tmp_path / "dev", **common, **sets, rollout_max_response_len=8)
    assert "--eval-prompt-data dev: prompts of up to 10 tokens and responses of up to 1000" in caplog.text


def test_rows_to_learn_from_that_are_too_long_are_refused_at_the_start(student: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "label": "2"}, {"prompt": "1+1=", "label": "2" * 60}]
    data = tmp_path / "sft.jsonl"
    sft = {"loss_type": "sft_loss", "rm_type": None, "n_samples_per_prompt": 1, "rollout_batch_size": 1}
    for label, message in (("2" * 59, ""), ("2" * 60, r"row 1 of --prompt-data .* has 65 tokens .* 64 positions")):
        rows[1]["label"] = label
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = tmp_path / f"run{len(label)}"
        settings = {**sft, "num_rollout": 2, "micro_batch_size": 1}
        if message:
            with pytest.raises(UserError, match=message):
                run_training(student, data, run, **settings)
            assert not run.exists()
        else:
            run_training(student, data, run, **settings)


def test_recorded_samples_that_are_too_long_are_refused(student: Path, prompts: Path, tmp_path: Path) -> None:
    pattern = str(tmp_path / "{rollout_id}.jsonl")
    run_training(student, prompts, tmp_path / "recorded", num_rollout=1, save_debug_rollout_data=pattern)
    samples = list(read_samples(tmp_path / "0.jsonl"))
    samples[3].prompt_tokens = samples[3].prompt_tokens.repeat(7)
    write_samples(tmp_path / "0.jsonl", samples)
    with pytest.raises(UserError, match=r"0\.jsonl, sample 3: it has \d+ tokens, the student 64 positions"):
        run_training(
            student, prompts, tmp_path / "run", num_rollout=1, prompt_data=None, load_debug_rollout_data=pattern
        )
