"""Whole runs through train.py: what must move moves, what must be visible is visible."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from opd_megatron.data.tokenizer import train_bpe_tokenizer
from opd_megatron.sample import read_samples
from opd_megatron.teacher.protocol import TeacherError
from tests.e2e.support import make_model, run_training, write_prompts
from tools import prepare_gsm8k


def opd(teacher: Path, **more: Any) -> dict[str, Any]:
    return {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": teacher, **more}


def test_distillation_brings_the_student_to_the_teacher(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        **opd(teacher),
        advantage_estimator="none",
        num_rollout=60,
        rollout_batch_size=64,
        n_samples_per_prompt=1,
        micro_batch_size=64,
        lr=3e-3,
        lr_decay_style="constant",
        adam_beta2=0.95,
        calculate_per_token_loss=True,
    )
    exact = [line["opd/reverse_kl_exact"] for line in metrics]
    sampled = [line["opd/reverse_kl"] for line in metrics]
    assert np.mean(exact[-5:]) < 0.5 * exact[0]
    assert np.mean(sampled[-5:]) < 0.5 * sampled[0]
    # The sampled term is an unbiased estimate of the exact one.
    error = np.sqrt(np.mean([line["opd/reverse_kl_se"] ** 2 for line in metrics]) / len(metrics))
    assert abs(np.mean(sampled) - np.mean(exact)) < 4 * error


def test_task_reward_and_distillation_work_together(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        **opd(teacher),
        advantage_estimator="grpo",
        rm_type=None,
        custom_rm_path="tests.e2e.rewards:count_sevens",
        global_batch_size=4,
    )
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["reward/std"] > 0
        assert line["train/task_advantage_abs_mean"] > 0
        assert line["train/opd_advantage_abs_mean"] > 0
        assert line["opd/scored_frac"] == 1.0


def test_rollout_zero_speaks_with_the_students_voice(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    metrics = run_training(student, prompts, tmp_path / "run", **opd(teacher), lr=0.0, save_hf=tmp_path / "hf")
    for line in metrics:
        assert line["rollout/train_logprob_gap_max"] < 1e-4
    after = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in load_file(student / "model.safetensors").items():
        assert torch.equal(after[name], tensor), name


def test_weights_reach_the_engine_after_every_update(student: Path, prompts: Path, tmp_path: Path) -> None:
    metrics = run_training(
        student, prompts, tmp_path / "run", rm_type="column_arithmetic", lr=1e-2, entropy_coef=1.0, num_rollout=4
    )
    for line in metrics:
        assert line["rollout/train_logprob_gap_max"] < 1e-4


def test_evaluation_knows_no_teacher(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        **opd(teacher),
        save_debug_rollout_data=tmp_path / "recorded_{rollout_id}.jsonl",
        eval_prompt_data=["held", prompts],
        eval_rm_type="column_arithmetic",
        n_samples_per_eval_prompt=2,
        eval_temperature=0.7,
        eval_interval=1,
        num_rollout=2,
    )
    assert [line["step"] for line in metrics] == [0, 1, 2]
    for line in metrics:
        assert {"eval/held/pass@1", "eval/held/pass@1_se", "eval/held/pass@2"} <= set(line)
    scored = [sample for number in (0, 1) for sample in read_samples(tmp_path / f"recorded_{number}.jsonl")]
    assert len(scored) == 2 * 8  # the 40 evaluation prompts are not among them


def test_recorded_rollouts_train_alike_without_engine_and_teacher(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    pattern = tmp_path / "recorded_{rollout_id}.jsonl"
    sampled = run_training(student, prompts, tmp_path / "one", **opd(teacher), save_debug_rollout_data=pattern)
    replayed = run_training(
        student,
        prompts,
        tmp_path / "two",
        use_opd=True,
        opd_type="megatron",
        prompt_data=None,
        load_debug_rollout_data=pattern,
    )
    for one, two in zip(sampled, replayed, strict=True):
        for name in ("train/loss", "train/grad_norm", "opd/reverse_kl", "reward/mean"):
            assert one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-7), name


def test_reference_terms_are_trained_and_reported(student: Path, prompts: Path, tmp_path: Path) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        advantage_estimator="reinforce_plus_plus",
        kl_coef=0.1,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type="k2",
        rm_type=None,
        custom_rm_path="tests.e2e.rewards:count_sevens",  # moves the student away from the reference
        lr=1e-2,
    )
    assert metrics[0]["train/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1]["train/kl_loss"] > 1e-6


def test_sft_lowers_the_loss_from_random_weights(prompts: Path, tmp_path: Path) -> None:
    fresh = make_model(tmp_path / "fresh", seed=0, weights=False)
    metrics = run_training(
        fresh,
        prompts,
        tmp_path / "run",
        loss_type="sft_loss",
        rm_type=None,
        n_samples_per_prompt=1,
        rollout_batch_size=8,
        num_rollout=12,
        lr=1e-2,
    )
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 0.3


def test_rows_of_gsm8k_with_a_llama_and_its_own_tokenizer(tmp_path: Path) -> None:
    """From rows of GSM8K's form through the tool that prepares them; the rows are made here."""
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        has, buys = rng.randrange(900, 2000), rng.randrange(50)
        question = f"Anna has {has} apples and buys {buys} more. How many apples has she now?"
        answer = f"She has {has}+{buys}=<<{has}+{buys}={has + buys}>>{has + buys} apples.\n#### {has + buys:,}"
        rows.append({"question": question, "answer": answer})
    texts = [row["question"] for row in rows]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = tmp_path / "gsm8k.jsonl"
    prepare_gsm8k.main(["--input", str(tmp_path / "raw.jsonl"), "--output", str(data)])
    assert json.loads(data.read_text().splitlines()[0])["label"].isdecimal()
    folders = []
    for number, name in enumerate(("student", "teacher")):
        folder = tmp_path / name
        tokenizer = train_bpe_tokenizer(texts, 320, folder)
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        folders.append(folder)
    metrics = run_training(
        folders[0],
        data,
        tmp_path / "run",
        **opd(folders[1]),
        advantage_estimator="none",
        apply_chat_template=True,
        rm_type="gsm8k",
        rollout_max_response_len=16,
    )
    assert len(metrics) == 3
    assert all(line["opd/reverse_kl_exact"] > 0 for line in metrics)


def test_teacher_with_another_tokenizer_is_refused(student: Path, prompts: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=4)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another tokenizer"):
        run_training(student, prompts, tmp_path / "run", **opd(other))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("form", [{"opd_baseline": "kl"}, {"opd_loss": "distribution", "opd_reward_scale": 1.25}])
def test_an_embedding_of_another_size_behind_one_tokenizer(
    student: Path, prompts: Path, tmp_path: Path, form: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As the larger models of a family have; without the tokenizer nobody knows which rows are tokens."""
    larger = make_model(tmp_path / "larger", seed=4, vocabulary=25)
    metrics = run_training(student, prompts, tmp_path / "run", **opd(larger), **form)
    assert all(line["opd/reverse_kl_exact"] > 0 for line in metrics)
    assert "ids, the student's model" not in caplog.text
    with contextlib.suppress(TeacherError):  # where such an id is sampled
        run_training(larger, prompts, tmp_path / "other way", **opd(student), **form, num_rollout=1)
    assert "knows 18 ids, the student's model 25: the other 7" in caplog.text
    for file in larger.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="a vocabulary of 25 tokens, the student of 18, and no tokenizer to compare"):
        run_training(student, prompts, tmp_path / "again", **opd(larger), **form)


def test_a_run_is_never_written_over(student: Path, prompts: Path, tmp_path: Path) -> None:
    run_training(student, prompts, tmp_path / "run", num_rollout=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        run_training(student, prompts, tmp_path / "run", num_rollout=1)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_run_folder_holds_what_it_promises(
    student: Path,
    teacher: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    run = tmp_path / "run"
    first, _, second = run_training(
        student,
        prompts,
        run,
        **opd(teacher),
        no_tensorboard=None,
        eval_prompt_data=["held", prompts],
        eval_rm_type="column_arithmetic",
        num_rollout=2,
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["rollouts"] == 2
    for name in ("config.yaml", "plots/pass_at_1.png", "plots/reverse_kl.png", "checkpoints/iter_0000002/.metadata"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    assert list((run / "samples").iterdir())
    again = parse_options(["--config", str(run / "config.yaml")])
    assert (again.opd.opd_type, again.opd.opd_teacher_load) == ("megatron", str(teacher))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(f"before training: held pass@1 {first['eval/held/pass@1']:.4g}") for line in lines)
    (step,) = [line for line in lines if line.startswith("train 2/2 | ")]
    assert f"held pass@1 {second['eval/held/pass@1']:.4g} | " in step
    files = "metrics.jsonl, summary.json, plots/"
    assert lines[-1] == f"finished: {run} ({files}), last checkpoint: {run}/checkpoints/iter_0000002"
    assert "being deprecated" not in caplog.text


def test_empty_and_long_prompts_are_counted(student: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", 7, seed=9)
    with data.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "1+" * 20, "label": "0"}) + "\n")
    metrics = run_training(
        student, data, tmp_path / "run", rollout_batch_size=8, rollout_max_prompt_len=12, num_rollout=2
    )
    assert all(line["rollout/prompt_too_long_frac"] == 1 / 8 for line in metrics)
    assert all(np.isfinite(line["train/loss"]) for line in metrics)


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_plus_plus", "none"])
def test_a_rollout_without_a_token_changes_nothing(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, estimator: str
) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        **opd(teacher),
        advantage_estimator=estimator,
        normalize_advantages=True,
        rollout_max_prompt_len=1,
        weight_decay=0.0,
        save_hf=tmp_path / "hf",
    )
    assert [line["rollout/empty_frac"] for line in metrics] == [1.0] * 3
    assert "has no token to train on" in caplog.text
    after = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in load_file(student / "model.safetensors").items():
        assert torch.equal(after[name], tensor), name


def test_one_prompt_serves_a_larger_batch_and_an_evaluation(student: Path, tmp_path: Path) -> None:
    one = write_prompts(tmp_path / "one.jsonl", 1, seed=4)
    sets = {"eval_prompt_data": ["one", one], "eval_rm_type": "column_arithmetic"}
    metrics = run_training(student, one, tmp_path / "run", **sets, num_rollout=2)
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert metrics[2]["eval/one/pass@1"] in (0.0, 1.0)
    assert "eval/one/pass@1_se" not in metrics[2]


def test_hugging_face_export_replaces_no_foreign_folder(student: Path, prompts: Path, tmp_path: Path) -> None:
    precious = tmp_path / "models"
    precious.mkdir()
    (precious / "notes.txt").write_text("mine")
    for target in (precious, tmp_path):
        with pytest.raises(UserError, match="--save-hf"):
            run_training(student, prompts, tmp_path / "run", save_hf=target)
    assert (precious / "notes.txt").read_text() == "mine"
