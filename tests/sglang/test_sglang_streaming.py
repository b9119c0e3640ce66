"""Many samples at a time: batches, neighbours of a bad sample, most probable tokens, several servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import requests
import torch

from opd_megatron.config.errors import UserError
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.system import free_port
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.sglang.conftest import CONTEXT, Served
from tests.teacher.scripted_server import Handler, ScriptedServer, Step, drop, reply

pytestmark = pytest.mark.sglang
Connect = Callable[..., SGLangTeacher]
Proxy = Callable[..., ScriptedServer]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    servers: list[ScriptedServer] = []

    def start(*script: Step) -> ScriptedServer:
        servers.append(ScriptedServer(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def forward(served: Served, change: Callable[[Any], Any] = lambda answer: answer) -> Step:
    """Pass the request on to the real server and its answer, changed, back."""

    def step(handler: Handler) -> None:
        headers = {"Content-Type": "application/json"}
        url = served.server.url + handler.path
        answer = requests.request(handler.command, url, data=handler.body or None, headers=headers, timeout=60)
        reply(answer.status_code, change(answer.json()))(handler)

    return step


def some_samples(served: Served, count: int, seed: int = 0) -> list[Sample]:
    generator = np.random.default_rng(seed)
    return [
        served.random_sample(generator, int(generator.integers(1, 20)), int(generator.integers(1, 40)), index=i)
        for i in range(count)
    ]


def score_all(teacher: SGLangTeacher, samples: Sequence[Sample]) -> list[Any]:
    """Scores or failure of each sample, asked for at once."""

    async def ask() -> list[Any]:
        try:
            async with asyncio.timeout(60):
                return await asyncio.gather(*map(teacher.score_one, samples), return_exceptions=True)
        finally:
            await teacher.aclose()

    return asyncio.run(ask())


def assert_right(served: Served, samples: Sequence[Sample], found: Sequence[Any]) -> None:
    for sample, scores in zip(samples, found, strict=True):
        assert isinstance(scores, TeacherScores), scores
        expected = served.log_probs(sample.tokens)[-sample.response_length :]
        np.testing.assert_allclose(scores.log_probs_T, expected, atol=1e-4)


def test_samples_asked_for_at_once_share_requests(qwen: Served, connect: Connect) -> None:
    teacher, samples = connect(qwen), some_samples(qwen, 100)
    assert_right(qwen, samples, score_all(teacher, samples))
    counted = teacher.statistics()
    assert counted["samples"] == 100
    assert counted["requests"] <= 25
    assert counted["retries"] == 0
    assert counted["wait_seconds"] > 0
    assert set(teacher.statistics().values()) == {0.0}


def test_a_bad_sample_fails_alone(qwen: Served, connect: Connect) -> None:
    samples = some_samples(qwen, 12)
    too_long = qwen.random_sample(np.random.default_rng(1), 200, CONTEXT - 200, index=77)
    teacher = connect(qwen)
    *found, failure = score_all(teacher, [*samples, too_long])
    assert_right(qwen, samples, found)
    assert isinstance(failure, TeacherFailure)
    assert failure.kind == FailureKind.STATUS
    assert "sample 77 (200 prompt + 56 response tokens): HTTP 400" in str(failure)
    assert teacher.statistics()["failed_status"] == 1


def test_a_sample_that_breaks_its_connections_fails_alone(qwen: Served, connect: Connect, proxy: Proxy) -> None:
    samples, through = some_samples(qwen, 30), forward(qwen)
    poison = samples[11].tokens.tolist()

    def step(handler: Handler) -> None:
        ids = json.loads(handler.body)["input_ids"]
        (drop if poison in (ids if isinstance(ids[0], list) else [ids]) else through)(handler)

    found = score_all(connect(qwen, proxy(step).url, max_retries=1), samples)
    failure = found.pop(11)
    assert_right(qwen, samples[:11] + samples[12:], found)
    assert failure.kind == FailureKind.CONNECTION
    assert "sample 11 " in str(failure)


def test_an_abandoned_sample_leaves_its_neighbours_alone(qwen: Served, connect: Connect) -> None:
    samples, teacher = some_samples(qwen, 40), connect(qwen)

    async def ask() -> list[Any]:
        tasks = [asyncio.ensure_future(teacher.score_one(sample)) for sample in samples]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        try:
            return await asyncio.gather(*tasks[1::2])
        finally:
            await teacher.aclose()
            assert asyncio.all_tasks() - {asyncio.current_task()} <= set(tasks)

    assert_right(qwen, samples[1::2], asyncio.run(ask()))


def test_the_deadline_of_a_step_fails_what_is_not_answered(qwen: Served, connect: Connect, proxy: Proxy) -> None:
    teacher, samples = connect(qwen, proxy(reply(503, b"loading")).url, max_retries=50), some_samples(qwen, 5)
    teacher.begin_step(0.4)
    for failure in score_all(teacher, samples):
        assert failure.kind == FailureKind.DEADLINE
        assert "the time limit of the step passed" in str(failure)


@pytest.mark.parametrize("top_k", [1, 5])
def test_the_most_probable_tokens_are_the_models(qwen: Served, connect: Connect, top_k: int) -> None:
    teacher, samples = connect(qwen, top_k=top_k), some_samples(qwen, 20)
    samples.append(qwen.random_sample(np.random.default_rng(4), 0, 12, index=20))
    samples.append(qwen.random_sample(np.random.default_rng(4), 3, 0, index=21))
    for sample, scores in zip(samples, score_all(teacher, samples), strict=True):
        assert scores.top_ids_TK.shape == scores.top_log_probs_TK.shape == (sample.response_length, top_k)
        unscored = int(not len(sample.prompt_tokens))
        if sample.response_length <= unscored:
            continue
        with torch.no_grad():
            logits = qwen.model(torch.as_tensor(sample.tokens)[None]).logits[0].double()
        expected = logits.log_softmax(-1)[-1 - sample.response_length + unscored : -1]
        values, ids = expected.topk(top_k)
        np.testing.assert_allclose(scores.top_log_probs_TK[unscored:], values, atol=1e-4)
        np.testing.assert_array_equal(scores.top_ids_TK[unscored:], ids)
        tail = 1 - values.exp().sum(-1)
        np.testing.assert_allclose(np.exp(scores.tail_log_mass_T[unscored:]), tail, atol=1e-4)


def test_the_teacher_scores_given_ids(qwen: Served, connect: Connect) -> None:
    teacher, generator = connect(qwen, top_k=3), np.random.default_rng(5)
    samples = some_samples(qwen, 6, seed=5)
    ids = [
        np.array([generator.permutation(qwen.vocab_size)[:4] for _ in range(sample.response_length)]).reshape(-1, 4)
        for sample in samples
    ]

    async def ask() -> list[TeacherScores]:
        try:
            return await asyncio.gather(*map(teacher.score_ids, samples, ids))
        finally:
            await teacher.aclose()

    for sample, asked, scores in zip(samples, ids, asyncio.run(ask()), strict=True):
        assert scores.top_log_probs_TK is not None
        assert scores.tail_log_mass_T is not None
        with torch.no_grad():
            logits = qwen.model(torch.as_tensor(sample.tokens)[None]).logits[0].double()
        expected = logits.log_softmax(-1)[-1 - sample.response_length : -1]
        values = expected.gather(1, torch.as_tensor(asked))
        np.testing.assert_array_equal(scores.top_ids_TK, asked)
        np.testing.assert_allclose(scores.top_log_probs_TK, values, atol=1e-4)
        np.testing.assert_allclose(np.exp(scores.tail_log_mass_T), 1 - values.exp().sum(-1), atol=1e-4)
        own = expected.gather(1, torch.as_tensor(sample.response_tokens)[:, None])[:, 0]
        np.testing.assert_allclose(scores.log_probs_T, own, atol=1e-4)


def test_replicas_share_the_work_and_a_dead_one_is_left_out(qwen: Served, connect: Connect, proxy: Proxy) -> None:
    fronts = [proxy(forward(qwen)), proxy(forward(qwen))]
    urls = [fronts[0].url, f"http://127.0.0.1:{free_port()}", fronts[1].url]
    samples = some_samples(qwen, 60)
    assert_right(qwen, samples, score_all(connect(qwen, urls, max_in_flight=8), samples))
    assert min(len(front.requests) for front in fronts) >= 3


def test_a_dead_replica_is_asked_again_when_it_is_back(qwen: Served, connect: Connect, proxy: Proxy) -> None:
    flaky, steady = proxy(drop, drop, forward(qwen)), proxy(forward(qwen))
    teacher = connect(qwen, [flaky.url, steady.url], max_in_flight=2)
    samples = some_samples(qwen, 150)
    assert_right(qwen, samples, score_all(teacher, samples))
    assert len(flaky.requests) > 10


def test_a_dead_server_fails_all_that_wait_within_the_retries_of_one(qwen: Served, connect: Connect) -> None:
    teacher = connect(qwen, f"http://127.0.0.1:{free_port()}", max_in_flight=2, max_retries=2)
    samples = some_samples(qwen, 100)
    for sample, failure in zip(samples, score_all(teacher, samples), strict=True):
        assert failure.kind == FailureKind.CONNECTION
        assert f"sample {sample.index} " in str(failure)
        assert "refused" in str(failure)
    assert teacher.statistics()["requests"] < 20


def test_replicas_with_other_weights_are_refused_at_the_beginning(qwen: Served, connect: Connect, proxy: Proxy) -> None:
    known = np.arange(10)
    expected = qwen.log_probs(known)
    same = connect(qwen, [qwen.server.url, proxy(forward(qwen)).url])
    np.testing.assert_allclose(same.pin(known), expected, atol=1e-4)

    def other(answer: Any) -> Any:
        for entry in answer.get("meta_info", {}).get("input_token_logprobs", [[None]])[1:]:
            entry[0] -= 0.01
        return answer

    with pytest.raises(UserError, match=r"do not serve the same weights: .* a known text differ by 0.01"):
        connect(qwen, [qwen.server.url, proxy(forward(qwen, other)).url]).pin(known)


def test_a_server_whose_weights_change_is_asked_no_more(qwen: Served, connect: Connect, proxy: Proxy) -> None:
    changed = False

    def swapped(answer: Any) -> Any:
        if changed:
            for one in answer if isinstance(answer, list) else [answer]:
                for entry in one.get("meta_info", {}).get("input_token_logprobs", [[None]])[1:]:
                    entry[0] -= 0.5
        return answer

    front = proxy(forward(qwen, swapped))
    pair, alone = connect(qwen, [front.url, qwen.server.url]), connect(qwen, front.url)
    for teacher in (pair, alone):
        teacher.pin(np.arange(10))
    samples = some_samples(qwen, 20)
    assert_right(qwen, samples, score_all(pair, samples))
    changed = True
    for teacher in (pair, alone):
        teacher.begin_step(None)
    assert_right(qwen, samples, score_all(pair, samples))
    for failure in score_all(alone, samples):
        assert failure.kind == FailureKind.CHANGED_MODEL
        assert "log-probabilities of a known text differ by 0.5" in str(failure)


def test_a_new_weight_version_is_noticed_in_the_answer(qwen: Served, connect: Connect, proxy: Proxy) -> None:
    versions = iter(["default", "7"])

    def change(answer: Any) -> Any:
        answer["meta_info"]["weight_version"] = next(versions)
        return answer

    teacher = connect(qwen, proxy(forward(qwen, change)).url)
    first, second = (score_all(teacher, some_samples(qwen, 1))[0] for _ in range(2))
    assert first.weight_version == "default"
    assert second.kind == FailureKind.CHANGED_MODEL
    assert "its weight version is '7', not 'default'" in str(second)
