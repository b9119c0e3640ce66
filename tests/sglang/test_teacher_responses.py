"""Responses that a teacher behind real servers samples in the student's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.sglang_answer import sampling_params
from opd_megatron.sample import Sample, Status, read_samples
from opd_megatron.teacher.protocol import FailureKind, TeacherError, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_preflight import server_info
from tests.e2e.support import run_training
from tests.sglang.conftest import CONTEXT, Served
from tests.sglang.proxy import Answer, Asked, Exchange, Fault, FaultProxy
from tests.sglang.speakers import Speaker
from tests.sglang.test_sglang_training import opd

pytestmark = pytest.mark.sglang
Connect = Callable[..., SGLangTeacher]

TAUGHT: dict[str, Any] = {
    "opd_loss": "distribution",
    "opd_support": "teacher_topk",
    "opd_top_k": 6,
    "opd_data_source": "teacher",
    "opd_student_data_fraction": 0.5,
}


def answers(teacher: SGLangTeacher, samples: Sequence[Sample], sampling: dict[str, Any]) -> list[Any]:
    """Tokens and end, or failure, of each sample, asked for at once."""

    async def ask() -> list[Any]:
        try:
            async with asyncio.timeout(60):
                asked = [teacher.answer_one(sample, sampling) for sample in samples]
                return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await teacher.aclose()

    return asyncio.run(ask())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_responses_are_samples_of_the_model_at_the_temperature(
    qwen: Served, connect: Connect, temperature: float
) -> None:
    """Their mean log-probability at it is minus the entropy: no other distribution gives that here."""
    generator, end = np.random.default_rng(11), qwen.tokenizer.eos_token_id
    samples = [qwen.random_sample(generator, int(generator.integers(1, 9)), 0, index=place) for place in range(160)]
    wanted = sampling_params(SamplingParams(temperature=temperature), (0,), 12, (end,))
    teacher = connect(qwen)
    excess: list[float] = []
    for sample, (tokens, ended) in zip(samples, answers(teacher, samples, wanted), strict=True):
        assert 1 <= len(tokens) <= 12
        assert ended == (tokens[-1] == end)
        assert ended or len(tokens) == 12
        assert end not in tokens[:-1]
        with torch.no_grad():
            ids = torch.as_tensor(np.concatenate([sample.prompt_tokens, tokens]))
            logits_TV = qwen.model(ids[None]).logits[0, len(sample.prompt_tokens) - 1 : -1].double()
        log_TV = (logits_TV / temperature).log_softmax(-1)
        chosen_T = log_TV.gather(1, torch.as_tensor(tokens)[:, None])[:, 0]
        excess.append(float((chosen_T - (log_TV.exp() * log_TV).sum(-1)).mean()))
    error = np.std(excess, ddof=1) / len(excess) ** 0.5
    assert abs(np.mean(excess)) < 4 * error < 0.3
    counted = teacher.statistics()
    assert (counted["samples"], counted["retries"]) == (160, 0)


def test_what_would_end_the_server_is_not_sent_and_a_response_has_the_room_that_is_left(
    qwen: Served, connect: Connect
) -> None:
    teacher, generator = connect(qwen), np.random.default_rng(3)
    teacher.restrict(max_tokens=server_info(teacher).max_tokens)
    assert teacher.max_tokens is not None
    shapes = [(0, 0), (CONTEXT - 7, 0), (teacher.max_tokens - 3, 0), (4, 0)]
    samples = [qwen.random_sample(generator, *shape, index=place) for place, shape in enumerate(shapes)]
    samples[3].prompt_tokens = np.array([1, 2, qwen.vocab_size])
    wanted = sampling_params(SamplingParams(ignore_eos=True), (0,), 12, ())
    empty, overlong, (tokens, ended), outside = answers(teacher, samples, wanted)
    assert (len(tokens), ended) == (3, False)
    found = [failure.kind for failure in (empty, overlong, outside) if isinstance(failure, TeacherFailure)]
    assert found == [FailureKind.UNSCORABLE, FailureKind.OVERLONG, FailureKind.UNSCORABLE]
    assert "sample 0 (0 prompt + 0 response tokens): the prompt has no tokens" in str(empty)
    assert qwen.is_alive()


def recorded(pattern: Path, rollout_id: int) -> list[Sample]:
    return list(read_samples(str(pattern).replace("{rollout_id}", str(rollout_id))))


def test_the_server_answers_and_scores_in_a_run(qwen: Served, student: Path, prompts: Path, tmp_path: Path) -> None:
    pattern = tmp_path / "{rollout_id}.jsonl"
    run = {**opd(qwen.server.url), **TAUGHT, "rollout_stop": "1", "save_debug_rollout_data": pattern}
    metrics = run_training(student, prompts, tmp_path / "run", **run)
    stopped = 0
    for rollout_id, line in enumerate(metrics):
        samples = recorded(pattern, rollout_id)
        given = [sample for sample in samples if sample.from_data]
        assert line["opd/student_data_frac"] == 1 - len(given) / 8
        assert line["opd/teacher_failed_frac"] == line["perf/teacher_retries"] == 0
        assert line["train/opd_divergence"] > 0
        for sample in given:
            assert sample.rollout_log_probs is None
            assert 1 <= sample.response_length <= 12
            assert "1" not in sample.response[:-1]
            done = "1" in sample.response or sample.response_tokens[-1] == qwen.tokenizer.eos_token_id
            assert (sample.status is Status.COMPLETED) == done
            stopped += "1" in sample.response
            assert sample.teacher_scores is not None
            expected = qwen.log_probs(sample.tokens)[-sample.response_length :]
            np.testing.assert_allclose(sample.teacher_scores.log_probs_T, expected, atol=1e-4)
    assert stopped
    assert 0 < np.mean([line["opd/student_data_frac"] for line in metrics]) < 1


def test_the_route_of_a_prompt_says_who_answers(qwen: Served, student: Path, tmp_path: Path) -> None:
    """Both teachers have one server here; each answers the prompts that it scores."""
    rows = [{"prompt": f"{place}+1=", "metadata": {"teacher": "ab"[place % 2]}} for place in range(8)]
    prompts, pattern = tmp_path / "routed.jsonl", tmp_path / "{rollout_id}.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = tmp_path / "teachers.json"
    teachers.write_text(json.dumps({name: {"urls": [qwen.server.url]} for name in "ab"}))
    run = {**opd(""), **TAUGHT, "opd_teacher_url": None, "opd_teachers": teachers, "opd_student_data_fraction": 0}
    metrics = run_training(student, prompts, tmp_path / "run", **run, num_rollout=1, save_debug_rollout_data=pattern)
    assert metrics[0]["opd/student_data_frac"] == 0
    samples = recorded(pattern, 0)
    assert {sample.metadata["teacher"] for sample in samples} == {"a", "b"}
    for sample in samples:
        assert sample.response_length
        assert sample.teacher_scores is not None
        assert sample.teacher_scores.teacher == sample.metadata["teacher"]


def changed(name: str, change: Callable[[dict[str, Any]], None]) -> Fault:
    """The server's answer with something else in it."""

    async def run(exchange: Exchange) -> Any:
        answer = json.loads((await exchange.answer()).body)
        change(answer)
        return exchange.send(Answer.of(answer))

    return Fault(name, run)


def other_token(answer: dict[str, Any]) -> None:
    answer["output_ids"][0] = (answer["output_ids"][0] + 1) % 10


@pytest.mark.parametrize("policy", ["stop", "mask", "drop"])
def test_a_response_that_is_not_believed_meets_the_policy(
    qwen: Served, student: Path, prompts: Path, tmp_path: Path, policy: str
) -> None:
    """The first prompt that the teacher is asked to answer gets nothing that can be believed."""
    fault, poisoned = changed("other ids", other_token), list[str]()

    def plan(asked: Asked) -> Fault | None:
        if asked.payload["sampling_params"]["max_new_tokens"] == 0:
            return None
        key = str(asked.payload["input_ids"])
        if not poisoned:
            poisoned.append(key)
        return fault if key in poisoned else None

    pattern = tmp_path / "{rollout_id}.jsonl"
    with FaultProxy(qwen.server.url, plan=plan) as proxy:
        run = {
            **opd(proxy.url, opd_on_teacher_failure=policy, opd_teacher_max_retries=1),
            **TAUGHT,
            **({} if policy == "stop" else {"opd_max_failed_frac": 0.5}),
            "opd_student_data_fraction": 0,
            "num_rollout": 1,
            "save_debug_rollout_data": pattern,
        }
        if policy == "stop":
            with pytest.raises(TeacherError, match="the tokens of a response are not those of its log-probabilities"):
                run_training(student, prompts, tmp_path / "run", **run)
            return
        line = run_training(student, prompts, tmp_path / "run", **run)[0]
    samples = recorded(pattern, 0)
    without = [sample for sample in samples if str(sample.prompt_tokens.tolist()) in poisoned]
    assert line["opd/teacher_failed/wrong_ids"] in ([2] if policy == "mask" else [1, 2])
    assert line["perf/teacher_retries"] > 0
    assert [(sample.response_length, sample.teacher_failure) for sample in without] == (
        [(0, "wrong_ids")] * 2 if policy == "mask" else []
    )
    assert sum(sample.response_length > 0 for sample in samples) == 8 - len(without)
    assert line["train/grad_norm"] > 0


def test_a_megatron_teacher_answers_beside_a_student_that_samples_by_servers(
    speaker: Speaker, spoken: str, qwen: Served, prompts: Path, tmp_path: Path
) -> None:
    """The local engine has the teacher's weights, the servers the student's."""
    pattern = tmp_path / "{rollout_id}.jsonl"
    teacher = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": qwen.folder}
    engine = {"rollout_engine": "sglang", "rollout_engine_url": spoken}
    run = {**teacher, **engine, **TAUGHT, "opd_support": "full", "opd_top_k": None, "save_debug_rollout_data": pattern}
    metrics = run_training(speaker.folder, prompts, tmp_path / "run", **run)
    assert 0 < np.mean([line["opd/student_data_frac"] for line in metrics]) < 1
    for rollout_id in range(3):
        for sample in recorded(pattern, rollout_id):
            assert sample.response_length
            assert (sample.rollout_log_probs is None) == sample.from_data
