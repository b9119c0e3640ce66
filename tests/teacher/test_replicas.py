"""Several servers of one teacher, of which one answers badly: the other does the work, and no sample is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.teacher.scripted_server import Handler, ScriptedServer, Step, drop, reply

NAN = float("nan")


def answering(log_prob: float = -1.0) -> Step:
    """Every token of every sample has one log-probability."""

    def step(handler: Handler) -> None:
        asked = json.loads(handler.body)
        ids, starts = asked["input_ids"], asked["logprob_start_len"]
        several = isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)
        pairs = zip(ids, starts, strict=True) if several else [(ids, starts)]
        answers = [
            {
                "meta_info": {
                    "input_token_logprobs": [
                        [None, sent[start], None],
                        *([log_prob, token, None] for token in sent[start + 1 :]),
                    ],
                    "weight_version": "v1",
                }
            }
            for sent, start in pairs
        ]
        reply(200, answers if several else answers[0])(handler)

    return step


@contextmanager
def serving(*steps: Step) -> Iterator[list[ScriptedServer]]:
    servers = [ScriptedServer(step) for step in steps]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def score(servers: list[ScriptedServer], count: int = 60, **settings: Any) -> list[Any]:
    teacher = SGLangTeacher([server.url for server in servers], vocab_size=10, backoff=0.02, **settings)
    samples = [
        Sample(index, index, "", prompt_tokens=np.array([1, 2]), response_tokens=np.full(1 + index % 5, 4))
        for index in range(count)
    ]

    async def ask() -> list[Any]:
        async def one(sample: Sample) -> TeacherScores:
            await asyncio.sleep(0.005 * sample.index)  # as they are finished, not all at once
            return await teacher.score_one(sample)

        try:
            async with asyncio.timeout(60):
                return await asyncio.gather(*map(one, samples), return_exceptions=True)
        finally:
            await teacher.aclose()

    return asyncio.run(ask())


BAD = {
    "500": reply(500, {"error": "kaput"}),
    "401": reply(401, {"error": "Unauthorized"}),
    "403": reply(403, {"error": "Forbidden"}),
    "404": reply(404, {"detail": "Not Found"}),
    "429": reply(429, {"error": "too many"}),
    "503": reply(503, b"loading"),
    "no JSON": reply(200, b"<html>"),
    "no list": reply(200, {}),
    "NaN": answering(NAN),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_server_that_answers_badly_loses_no_sample_and_is_hardly_asked(bad: str) -> None:
    """It is the first of the two, which is asked where both have nothing to do."""
    with serving(BAD[bad], answering()) as servers:
        outcomes = score(servers)
        asked, answered = (len(server.requests) for server in servers)
    assert [outcome for outcome in outcomes if not isinstance(outcome, TeacherScores)] == []
    assert 1 <= asked <= 15
    assert asked < answered / 2


def test_a_server_that_is_well_again_is_asked_again() -> None:
    with serving(answering(), answering()) as servers:
        servers[0].close()
        servers[0] = ScriptedServer(*[BAD["500"]] * 3, answering())
        outcomes = score(servers)
        assert len(servers[0].requests) > 10
    assert all(isinstance(outcome, TeacherScores) for outcome in outcomes)


@pytest.mark.parametrize(("status", "requests"), [(400, 1), (422, 1), (401, 2), (404, 2)])
def test_what_every_server_refuses_fails_without_further_attempts(status: int, requests: int) -> None:
    """A status that speaks of the sample is not asked about again, another once at each server."""
    with serving(*[reply(status, {"error": "no"})] * 2) as servers:
        (failure,) = score(servers, count=1)
        assert sum(len(server.requests) for server in servers) == requests
    assert isinstance(failure, TeacherFailure)
    assert failure.kind == FailureKind.STATUS


def test_a_sample_that_no_server_can_score_fails_alone_and_holds_up_nobody() -> None:
    def spoilt(handler: Handler) -> None:
        sent = json.loads(handler.body)["input_ids"]
        several = sent if isinstance(sent[0], list) else [sent]
        (BAD["500"] if any(len(ids) == 7 for ids in several) else answering())(handler)

    with serving(spoilt, spoilt) as servers:
        outcomes = score(servers)
    for index, outcome in enumerate(outcomes):
        assert isinstance(outcome, TeacherFailure if index % 5 == 4 else TeacherScores), outcome


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "Bearer sk-verysecret is no key"},
        {"meta_info": {"finish_reason": {"type": "abort", "message": "no credit for sk-verysecret"}}},
        {"meta_info": {"input_token_logprobs": [[None, 2, None], ["sk-verysecret", 4, None]]}},
    ],
)
def test_a_key_that_a_good_answer_repeats_reaches_neither_message_nor_log(
    answer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-verysecret")
    with serving(reply(200, answer)) as servers:
        (failure,) = score(servers, count=1, api_key_env="TEACHER_KEY", max_retries=1)
    assert isinstance(failure, TeacherFailure)
    assert "attempt 2 of 2" in caplog.text
    assert "verysecret" not in str(failure) + caplog.text


class Swapped:
    """A server whose model, weights and label can be changed at any time."""

    def __init__(self) -> None:
        self.log_prob, self.model, self.gone = -1.0, "/models/a", False

    def __call__(self, handler: Handler) -> None:
        if self.gone:
            drop(handler)
        elif handler.path == "/model_info":
            reply(200, {"model_path": self.model, "weight_version": "v1"})(handler)
        elif handler.path == "/server_info":
            reply(200, {"dtype": "float32"})(handler)
        else:
            answering(self.log_prob)(handler)


def step_of(teacher: SGLangTeacher, *events: Callable[[], None]) -> None:
    """Samples scored between the beginning and the end of a step, an event after each of them but the last."""

    async def steps() -> None:
        try:
            teacher.begin_step(None)
            for index in range(len(events) + 1):
                tokens = np.array([1, 2])
                await teacher.score_one(Sample(index, 0, "", prompt_tokens=tokens, response_tokens=tokens))
                for event in events[index : index + 1]:
                    event()
            async with asyncio.timeout(20):
                await teacher.end_step(5.0)
        finally:
            await teacher.aclose()

    asyncio.run(steps())


def test_weights_that_are_swapped_within_a_step_are_noticed_as_it_ends() -> None:
    """The label stays; the answers between are log-probabilities like any other."""
    first, second = Swapped(), Swapped()

    def swap() -> None:
        first.log_prob = second.log_prob = -2.0

    with serving(first, second) as servers:
        teacher = SGLangTeacher([server.url for server in servers], vocab_size=10, backoff=0.02)
        teacher.pin(np.arange(5))
        step_of(teacher, lambda: None)
        with pytest.raises(TeacherFailure, match=r"a known text differ by .*changed since the step began") as caught:
            step_of(teacher, swap)
        assert caught.value.kind == FailureKind.CHANGED_MODEL


def test_a_server_that_is_gone_as_the_step_ends_is_not_taken_for_another_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Swapped()

    def leave() -> None:
        server.gone = True

    with serving(server) as (listening,):
        teacher = SGLangTeacher(listening.url, vocab_size=10, backoff=0.02, max_retries=1)
        teacher.pin(np.arange(5))
        with pytest.raises(TeacherFailure) as caught:
            step_of(teacher, leave)
        assert caught.value.kind == FailureKind.CONNECTION, "of the sample after it"
        server.gone = False

        async def steps() -> None:
            teacher.begin_step(None)
            await teacher.score_one(Sample(0, 0, "", prompt_tokens=np.ones(2, int), response_tokens=np.ones(2, int)))
            server.gone = True
            await teacher.end_step(5.0)
            await teacher.aclose()

        asyncio.run(steps())
    assert "weights could not be looked at again as the step ended" in caplog.text


def test_a_known_text_that_is_not_believed_ends_the_step_only_where_it_is_so_everywhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """NaN says nothing of what was scored before; other weights would."""
    first, second = Swapped(), Swapped()

    def damage(*servers: Swapped) -> None:
        for server in servers:
            server.log_prob = NAN

    async def step(teacher: SGLangTeacher, *damaged: Swapped) -> None:
        try:
            teacher.begin_step(None)
            both = [
                Sample(index, 0, "", prompt_tokens=np.ones(2, int), response_tokens=np.ones(2, int))
                for index in range(40)
            ]
            await asyncio.gather(*map(teacher.score_one, both))
            damage(*damaged)
            async with asyncio.timeout(20):
                await teacher.end_step(5.0)
        finally:
            await teacher.aclose()

    with serving(first, second) as servers:
        teacher = SGLangTeacher([server.url for server in servers], vocab_size=10, backoff=0.02, max_retries=1)
        teacher.pin(np.arange(5))
        asyncio.run(step(teacher, first))
        assert "weights could not be looked at again as the step ended" in caplog.text
        first.log_prob = -1.0
        with pytest.raises(TeacherFailure, match=r"nan is not a log-probability .*; no other server is left") as caught:
            asyncio.run(step(teacher, first, second))
        assert caught.value.kind == FailureKind.NOT_FINITE


def test_another_model_behind_one_address_is_another_teacher_and_replicas_may_name_theirs_differently() -> None:
    first, second = Swapped(), Swapped()
    second.model = "/mnt/b"

    def rename() -> None:
        second.model = "/mnt/c"

    with serving(first, second) as servers:
        teacher = SGLangTeacher([server.url for server in servers], vocab_size=10, backoff=0.02)
        teacher.pin(np.arange(5))
        rename()
        step_of(teacher, lambda: None)
        alone = SGLangTeacher(servers[0].url, vocab_size=10, backoff=0.02)
        alone.pin(np.arange(5))
        first.model = "/models/z"
        with pytest.raises(TeacherFailure, match="its model is '/models/z', not '/models/a'") as caught:
            step_of(alone)
        assert caught.value.kind == FailureKind.CHANGED_MODEL
