"""A proxy that misbehaves in front of the real server, and a server that dies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import TeacherError
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.sglang.conftest import Served, sglang_server
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


def forward(served: Served, change: Callable[[dict[str, Any]], Any] = lambda answer: answer) -> Step:
    """Pass the request on to the real server and its answer, changed, back."""

    def step(handler: Handler) -> None:
        headers = {"Content-Type": "application/json"}
        answer = requests.post(served.server.url + handler.path, data=handler.body, headers=headers, timeout=60)
        reply(answer.status_code, change(answer.json()))(handler)

    return step


def entries(change: Callable[[list[Any]], None]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer["meta_info"]["input_token_logprobs"])
        return answer

    return changed


def one_sample(served: Served) -> Sample:
    return served.random_sample(np.random.default_rng(7), 5, 8, index=21)


def test_passing_faults_change_nothing(qwen: Served, proxy: Proxy, connect: Connect) -> None:
    def cut(answer: Any) -> bytes:
        return json.dumps(answer).encode()[:200]

    unavailable = reply(503, b"try later", Retry_After="0.1")
    busy = reply(429, {"error": "too many"}, Retry_After="0")
    front = proxy(drop, reply(500, b"Internal Server Error"), busy, unavailable, forward(qwen, cut), forward(qwen))
    sample = one_sample(qwen)
    (scores,) = connect(qwen, front.url, max_retries=5).score([sample])
    np.testing.assert_allclose(scores.log_probs_T, qwen.log_probs(sample.tokens)[-8:], atol=1e-4)
    assert len(front.requests) == 6


@pytest.mark.parametrize(
    ("fault", "reason", "attempts"),
    [
        (lambda served: drop, "connection failed", 3),
        (lambda served: reply(500, {"error": {"message": "kaput"}}), "HTTP 500: kaput", 3),
        (lambda served: reply(400, {"error": "not so"}), "HTTP 400: not so", 1),
        (lambda served: forward(served, lambda answer: [answer]), "is this a SGLang server", 1),
        (lambda served: forward(served, entries(lambda e: e.pop())), "8 tokens in the answer, 9 expected", 1),
        (lambda served: forward(served, entries(lambda e: e[3].__setitem__(1, 99))), "id 99 where", 1),
        (lambda served: forward(served, entries(lambda e: e[3].__setitem__(0, None))), "not a log-probability", 1),
        (
            lambda served: forward(served, entries(lambda e: e[3].__setitem__(0, float("nan")))),
            "nan is not a log-probability",
            1,
        ),
    ],
    ids=["dropped", "500", "400", "other JSON", "token missing", "other ids", "null", "NaN"],
)
def test_lasting_faults_fail_and_name_server_and_sample(
    qwen: Served, proxy: Proxy, connect: Connect, fault: Callable[[Served], Step], reason: str, attempts: int
) -> None:
    front = proxy(fault(qwen))
    sample = one_sample(qwen)
    with pytest.raises(TeacherError, match=reason) as caught:
        connect(qwen, front.url).score([sample])
    assert f"teacher server {front.url}: sample 21 (5 prompt + 8 response tokens)" in str(caught.value)
    assert len(front.requests) == attempts
    assert sample.teacher_scores is None


def test_the_first_failure_stops_the_other_requests(qwen: Served, proxy: Proxy, connect: Connect) -> None:
    through = forward(qwen)
    poison = 3

    def step(handler: Handler) -> None:
        ids = json.loads(handler.body)["input_ids"]
        firsts = [own[0] for own in ids] if isinstance(ids[0], list) else ids[:1]
        poisoned = poison in firsts
        (reply(400, {"error": "poison"}) if poisoned else through)(handler)

    front = proxy(step)
    samples = [
        Sample(i, 0, "", prompt_tokens=np.array([poison if i == 5 else 4]), response_tokens=np.array([6, 7, 8]))
        for i in range(200)
    ]
    teacher = connect(qwen, front.url, max_in_flight=4)
    with pytest.raises(TeacherError, match=r"sample 5 .*poison"):
        teacher.score(samples)
    time.sleep(0.5)
    sent = len(front.requests)
    assert sent < 100
    assert len(teacher.score([samples[0]])) == 1
    assert len(front.requests) == sent + 1


def test_a_server_killed_in_the_middle_fails_within_the_retries(qwen: Served, connect: Connect, tmp_path: Path) -> None:
    generator = np.random.default_rng(8)
    samples = [qwen.random_sample(generator, 5, 200, index=i) for i in range(4000)]
    outcome: list[list[TeacherScores] | Exception] = []

    def score(teacher: SGLangTeacher) -> None:
        try:
            outcome.append(teacher.score(samples))
        except Exception as error:
            outcome.append(error)

    with sglang_server(qwen.folder, tmp_path / "server.log") as server:
        thread = threading.Thread(target=score, args=[connect(qwen, server.url)], daemon=True)
        thread.start()
        time.sleep(1.0)
        assert not outcome
        server.kill()
        thread.join(30)
    assert len(outcome) == 1
    assert isinstance(outcome[0], TeacherError)
    assert f"teacher server {server.url}: sample" in str(outcome[0])
    assert "connection failed" in str(outcome[0])
