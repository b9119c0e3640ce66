"""Responses that a teacher's servers sample beside the scores: what they cost, and what their end says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import FailureKind
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.teacher.scripted_server import Handler, Step, reply
from tests.teacher.test_replicas import answering, serving

LIMIT = 4
SAMPLING = {"temperature": 1.0, "max_new_tokens": LIMIT}


def speaking(ids: list[int], **finish: Any) -> Step:
    """A response to a prompt of two tokens."""
    meta = {
        "prompt_tokens": 2,
        "finish_reason": {"type": "length", **finish},
        "output_token_logprobs": [[-1.0, token, None] for token in ids],
        "weight_version": "v1",
    }
    return reply(200, {"output_ids": ids, "meta_info": meta})


def beside_scores(speak: Step) -> Step:
    """``speak`` where a response is wanted, scores elsewhere."""

    def step(handler: Handler) -> None:
        wanted = json.loads(handler.body)["sampling_params"]["max_new_tokens"]
        (speak if wanted else answering())(handler)

    return step


def sample(index: int) -> Sample:
    return Sample(index, index, "", prompt_tokens=np.array([1, 2]), response_tokens=np.full(1 + index % 3, 4))


async def ask(teacher: SGLangTeacher, answers: int, scores: int) -> tuple[list[Any], list[Any]]:
    """What comes of as many responses, and then of as many scores."""
    try:
        async with asyncio.timeout(60):
            spoken = [teacher.answer_one(sample(index), SAMPLING) for index in range(answers)]
            found = await asyncio.gather(*spoken, return_exceptions=True)
            scored = [teacher.score_one(sample(index)) for index in range(scores)]
            return found, await asyncio.gather(*scored, return_exceptions=True)
    finally:
        await teacher.aclose()


def test_a_response_has_more_time_than_a_score() -> None:
    def slowly(handler: Handler) -> None:
        time.sleep(1.0)
        speaking([3, 5])(handler)

    with serving(beside_scores(slowly)) as (server,):
        teacher = SGLangTeacher(server.url, vocab_size=10, timeout=0.2, answer_timeout=30.0, max_retries=0)
        ((tokens, ended),), _ = asyncio.run(ask(teacher, 1, 0))
    assert (tokens.tolist(), ended) == ([3, 5], False)


@pytest.mark.parametrize("servers", [1, 2])
def test_responses_that_take_too_long_leave_the_scores_alone(servers: int, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the only server nor one of two is left out for them."""
    done = threading.Event()

    def never(handler: Handler) -> None:
        done.wait(60)

    with serving(*[beside_scores(never)] * servers) as listening:
        urls = [server.url for server in listening]
        teacher = SGLangTeacher(urls, vocab_size=10, timeout=30.0, answer_timeout=0.3, max_retries=0)
        answers, scores = asyncio.run(ask(teacher, 4, 20))
        done.set()
    assert [found.kind for found in answers] == [FailureKind.TIMEOUT] * 4
    assert [type(found) for found in scores] == [TeacherScores] * 20
    assert "left out" not in caplog.text


def test_a_token_that_the_student_lacks_costs_no_further_attempt() -> None:
    with serving(*[beside_scores(speaking([3, 12, 5]))] * 2) as servers:
        teacher = SGLangTeacher([server.url for server in servers], vocab_size=10)
        teacher.restrict(server_vocab_size=16)
        found, _ = asyncio.run(ask(teacher, 3, 0))
        assert sum(len(server.requests) for server in servers) == 3
    assert [(tokens.tolist(), ended) for tokens, ended in found] == [([3], False)] * 3
