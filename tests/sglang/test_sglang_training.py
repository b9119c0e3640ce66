"""Training against the real server: the same scores as the Megatron teacher, and a student that learns from it."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from opd_megatron.config.errors import UserError
from opd_megatron.sample import read_samples
from opd_megatron.teacher.protocol import TeacherError
from tests.docs.test_run_folder import OF_SGLANG_TEACHER
from tests.e2e.support import run_training
from tests.sglang import faults
from tests.sglang.conftest import Served
from tests.sglang.proxy import Answer, Exchange, Fault, FaultProxy, Plan, always


def opd(url: str, **more: Any) -> dict[str, Any]:
    return {"use_opd": True, "opd_type": "sglang", "opd_teacher_url": url, "opd_teacher_max_in_flight": 16, **more}


def test_distillation_from_the_server_brings_the_reverse_kl_down(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path
) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        **opd(qwen.server.url),
        advantage_estimator="none",
        num_rollout=40,
        rollout_batch_size=64,
        n_samples_per_prompt=1,
        micro_batch_size=64,
        lr=3e-3,
        lr_decay_style="constant",
        adam_beta2=0.95,
        calculate_per_token_loss=True,
    )
    sampled = [line["opd/reverse_kl"] for line in metrics]
    assert np.mean(sampled[-5:]) < 0.65 * np.mean(sampled[:2])


def test_task_reward_and_server_teacher_work_together(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path
) -> None:
    metrics = run_training(
        student,
        prompts,
        tmp_path / "run",
        **opd(qwen.server.url),
        advantage_estimator="grpo",
        rm_type=None,
        custom_rm_path="tests.e2e.rewards:count_sevens",
        eval_prompt_data=["held", prompts],
        eval_rm_type="column_arithmetic",
    )
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    for line in metrics[1:]:
        assert set(line) >= OF_SGLANG_TEACHER
        assert line["reward/std"] > 0
        assert line["train/task_advantage_abs_mean"] > 0
        assert line["train/opd_advantage_abs_mean"] > 0


def test_both_teachers_give_the_same_scores(qwen: Served, student: Path, prompts: Path, tmp_path: Path) -> None:
    recorded = {}
    for kind, teacher in (
        ("sglang", opd(qwen.server.url)),
        ("megatron", {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": qwen.folder}),
    ):
        pattern = tmp_path / f"{kind}_{{rollout_id}}.jsonl"
        run_training(student, prompts, tmp_path / kind, **teacher, num_rollout=1, save_debug_rollout_data=pattern)
        recorded[kind] = list(read_samples(tmp_path / f"{kind}_0.jsonl"))
    for one, two in zip(recorded["sglang"], recorded["megatron"], strict=True):
        assert one.teacher_scores is not None
        assert two.teacher_scores is not None
        np.testing.assert_array_equal(one.response_tokens, two.response_tokens)
        np.testing.assert_allclose(one.teacher_scores.log_probs_T, two.teacher_scores.log_probs_T, atol=1e-4)


def test_a_server_that_is_not_there_is_one_line_and_nothing_is_written(
    student: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        run_training(student, prompts, tmp_path / "run", **opd("http://127.0.0.1:9", opd_teacher_max_retries=0))
    assert not os.path.lexists(tmp_path / "run")


def test_the_students_top_tokens_are_compared_as_with_the_megatron_teacher(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path
) -> None:
    term = {
        "opd_loss": "distribution",
        "opd_support": "student_topk",
        "opd_top_k": 3,
        "advantage_estimator": "none",
        "opd_divergence": "jsd",
        "opd_jsd_beta": 0.3,
    }
    found = {}
    for kind, teacher in (
        ("sglang", opd(qwen.server.url)),
        ("megatron", {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": qwen.folder}),
    ):
        recorded = tmp_path / f"{kind}_{{rollout_id}}.jsonl"
        metrics = run_training(
            student, prompts, tmp_path / kind, **teacher, **term, num_rollout=2, save_debug_rollout_data=recorded
        )
        found[kind] = metrics
        if kind == "sglang":
            for sample in read_samples(tmp_path / "sglang_1.jsonl"):
                scores = sample.teacher_scores
                assert scores is not None
                assert scores.top_ids_TK is not None
                assert scores.top_ids_TK.shape == (sample.response_length, 3)
    for one, two in zip(found["sglang"], found["megatron"], strict=True):
        for name in ("train/loss", "train/opd_divergence", "train/grad_norm", "opd/reverse_kl"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
        assert one["train/opd_divergence"] > 0
        assert one["perf/teacher_requests"] >= 8
        assert one["perf/teacher_retries"] == one["opd/teacher_failed_frac"] == 0


@pytest.mark.parametrize("policy", ["stop", "mask"])
def test_more_ids_than_a_server_is_asked_for_meet_the_policy(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path, policy: str
) -> None:
    run: dict[str, Any] = {
        **opd(qwen.server.url, opd_on_teacher_failure=policy),
        "opd_loss": "distribution",
        "opd_support": "student_topk",
        "opd_top_k": 3,
        "opd_max_union_ids": 8,
        "num_rollout": 1,
        "rollout_ignore_eos": True,
    }
    if policy == "stop":
        with pytest.raises(TeacherError, match=r"different ids at 12 positions.*\(--opd-max-union-ids\)"):
            run_training(student, prompts, tmp_path / "run", **run)
        return
    (line,) = run_training(
        student, prompts, tmp_path / "run", **run, opd_max_failed_frac=1.0, advantage_estimator="grpo", rm_type=None,
        custom_rm_path="tests.e2e.rewards:count_sevens",
    )  # fmt: skip
    assert 0 < line["opd/teacher_failed_frac"] == line["opd/teacher_failed/unscorable"] / 8
    assert np.isfinite(line["train/loss"])


def named_teachers(file: Path, **urls: str) -> dict[str, Any]:
    """Options of teachers by name."""
    file.write_text(json.dumps({name: {"urls": url} for name, url in urls.items()}), encoding="utf-8")
    return {"use_opd": True, "opd_type": "sglang", "opd_teachers": file, "opd_teacher_max_in_flight": 16}


def route(prompts: Path, *names: str) -> None:
    """Let the prompts name the teachers in turn."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["metadata"] = {"teacher": names[place % len(names)]}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_named_teachers_that_are_one_server_are_the_single_teacher(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path
) -> None:
    """Prompts that choose between them, and a mixture of both, with all diagnostics: three steps with equal numbers."""
    route(prompts, "math", "code")
    both = named_teachers(tmp_path / "teachers.json", math=qwen.server.url, code=qwen.server.url)
    mixed = {"opd_teacher_mixture": "arithmetic", "opd_teacher_weights": [1, 3]}
    common: dict[str, Any] = {
        "advantage_estimator": "grpo", "rm_type": None, "custom_rm_path": "tests.e2e.rewards:count_sevens",
        "metadata_key": "metadata", "opd_diagnostics_interval": 1, "opd_gradient_diagnostics_interval": 1,
    }  # fmt: skip
    single, *others = (
        run_training(student, prompts, tmp_path / f"run_{place}", **teacher, **common)
        for place, teacher in enumerate((opd(qwen.server.url), both, {**both, **mixed}))
    )
    for other in others:
        assert [line["step"] for line in other] == [1, 2, 3]
        for one, two in zip(map(measured, single), map(measured, other), strict=True):
            of_each = {name: two.pop(name) for name in list(two) if name.startswith("opd/teacher/")}
            assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
            if of_each:  # where a step has samples of both
                parts = [of_each[f"opd/teacher/{name}/tokens_frac"] for name in ("math", "code")]
                kls = [of_each[f"opd/teacher/{name}/reverse_kl"] for name in ("math", "code")]
                assert np.dot(parts, kls) == pytest.approx(one["opd/reverse_kl"], rel=1e-3)
            assert {"opd/kl_by_position_q1", "opd/student_entropy", "train/opd_grad_share"} <= one.keys()
            assert one["opd/reverse_kl"] > 0
        assert bool(of_each) == (other is others[0])


def measured(line: dict[str, Any]) -> dict[str, float]:
    """What a step saw and did, without clocks and what it had no number for."""
    kinds = ("train/", "opd/", "rollout/", "reward/")
    return {name: value for name, value in line.items() if name.startswith(kinds) and value is not None}


def quieter(nats: float) -> Plan:
    """The server of a teacher that gives every token less log-probability by ``nats``."""

    def change(meta: dict[str, Any]) -> None:
        for entry in meta["input_token_logprobs"][1:]:
            entry[0] -= nats

    return always(faults.only_for(faults.altered("quieter", change), lambda element: True))


@pytest.mark.parametrize(
    ("kind", "shift"),
    [("geometric", -0.75 * 0.5), ("arithmetic", math.log(0.25 + 0.75 * math.exp(-0.5)))],
)
def test_a_mixture_of_servers_is_that_of_what_they_say(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path, kind: str, shift: float
) -> None:
    """Of two that differ by half a nat, with weights 1 and 3, in every sample of three steps."""
    with FaultProxy(qwen.server.url, quieter(0.5)) as proxy:
        metrics = run_training(
            student,
            prompts,
            tmp_path / "run",
            **named_teachers(tmp_path / "teachers.json", plain=qwen.server.url, quiet=proxy.url),
            opd_teacher_mixture=kind,
            opd_teacher_weights=[1, 3],
            advantage_estimator="none",
            save_debug_rollout_data=tmp_path / "rollout_{rollout_id}.jsonl",
        )
        assert proxy.asked
    assert all(line["train/grad_norm"] > 0 for line in metrics)
    for rollout in range(len(metrics)):
        for sample in read_samples(tmp_path / f"rollout_{rollout}.jsonl"):
            assert sample.teacher_scores is not None
            assert sample.teacher_scores.teacher == "plain + quiet"
            expected = qwen.log_probs(sample.tokens)[len(sample.prompt_tokens) - 1 :] + shift
            np.testing.assert_allclose(sample.teacher_scores.log_probs_T, expected, atol=1e-4)


async def says_what_it_was_sent(exchange: Exchange) -> web.StreamResponse:
    return exchange.send(Answer.of({"error": f"bad {exchange.request.headers['Authorization']}"}, 401))


def test_the_keys_of_several_teachers_are_nowhere_to_be_found(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any
) -> None:
    """Neither that of a variable nor that of an address, in no file, line or message; also where the run fails."""
    monkeypatch.setenv("OPD_TEST_MATH_KEY", "sk-l34ked")
    route(prompts, "math", "code")
    host = qwen.server.url.removeprefix("http://")
    file = tmp_path / "teachers.yaml"
    file.write_text(
        f"math: {{urls: {qwen.server.url}, api_key_env: OPD_TEST_MATH_KEY}}\ncode: {{urls: 'http://ann:l34ked@{host}'}}\n"
    )
    run: dict[str, Any] = {
        "use_opd": True, "opd_type": "sglang", "opd_teachers": file, "num_rollout": 2, "save_interval": 1,
        "metadata_key": "metadata", "save_debug_rollout_data": tmp_path / "run" / "rollout_{rollout_id}.jsonl",
    }  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        run_training(student, prompts, tmp_path / "run", **run)
        with FaultProxy(qwen.server.url, always(Fault("echo", says_what_it_was_sent))) as proxy:
            file.write_text(file.read_text().replace(qwen.server.url, proxy.url).replace(host, proxy.url[7:]))
            with pytest.raises(UserError, match=r"HTTP 401: bad Bearer \*\*\*") as caught:
                run_training(student, prompts, tmp_path / "other", **run)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.json", "metrics.jsonl"} <= {path.name for path in written}
    texts = [path.read_bytes() for path in written]
    shown = capfd.readouterr()
    texts += [text.encode() for text in (shown.out, shown.err, caplog.text, str(caught.value))]
    for secret in (b"l34ked", b"YW5uOmwzNGtlZA"):
        assert not any(secret in text for text in texts)
