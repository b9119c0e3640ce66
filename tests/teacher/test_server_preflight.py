"""The preflight at a server that does not answer its questions as it should."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.data.column_arithmetic import build_tokenizer
from opd_megatron.teacher.preflight import Student
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_preflight import preflight_sglang
from tests.teacher.scripted_server import Handler, ScriptedServer, reply

SILENT = 0
"""In place of a status: no answer."""


class Teacher:
    """Answers everything but ``path``, which gets ``status``."""

    def __init__(self, path: str, status: int) -> None:
        self.path, self.status = path, status
        self.asked: list[str] = []
        self.end = threading.Event()

    def __call__(self, handler: Handler) -> None:
        self.asked.append(handler.path)
        if handler.path == self.path:
            if self.status == SILENT:
                self.end.wait(20)
            else:
                reply(self.status, {"error": "not now"})(handler)
        elif handler.path == "/model_info":
            reply(200, {"model_path": "/none", "weight_version": "1"})(handler)
        elif handler.path == "/server_info":
            reply(200, {"dtype": "float32", "version": "0.5"})(handler)
        else:
            ids = json.loads(handler.body)["input_ids"]
            several = isinstance(ids[0], list)
            answers = [self._scores(sent) for sent in (ids if several else [ids])]
            reply(200, answers if several else answers[0])(handler)

    @staticmethod
    def _scores(sent: list[int]) -> dict[str, Any]:
        entries = [[None, sent[0], None], *([-1.0 - 0.01 * token, token, None] for token in sent[1:])]
        return {"meta_info": {"input_token_logprobs": entries, "weight_version": "1"}}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return Student(build_tokenizer(tmp_path_factory.mktemp("characters")))


@pytest.fixture
def check(student: Student) -> Iterator[Any]:
    opened: list[tuple[Teacher, ScriptedServer]] = []

    def preflight(teacher: Teacher, **settings: Any) -> list[str]:
        server = ScriptedServer(teacher)
        opened.append((teacher, server))
        settings = {"max_retries": 0, **settings}
        asked = SGLangTeacher(server.url, vocab_size=len(student.tokenizer), backoff=0.01, **settings)
        return [finding.text for finding in preflight_sglang(asked, student)]

    yield preflight
    for teacher, server in opened:
        teacher.end.set()
        server.close()


@pytest.mark.parametrize("status", [400, 404, 405, 500, 501])
def test_a_server_without_a_tokenizer_is_warned_of(check: Any, status: int) -> None:
    assert any("tokenizer could not be compared" in text for text in check(Teacher("/tokenize", status)))


@pytest.mark.parametrize("status", [401, 403, 408, 429, 502, 503, 504])
def test_a_server_that_does_not_answer_about_its_tokenizer_is_refused(check: Any, status: int) -> None:
    """It may have another one."""
    with pytest.raises(UserError, match=rf"POST /tokenize: HTTP {status}: not now.*see the server's log"):
        check(Teacher("/tokenize", status))


@pytest.mark.parametrize("path", ["/model_info", "/server_info", "/tokenize"])
def test_a_server_that_stays_silent_is_waited_for_once(check: Any, path: str) -> None:
    teacher = Teacher(path, SILENT)
    with pytest.raises(UserError, match=r"no answer within 0.3 s"):
        check(teacher, max_retries=4, timeout=0.3)
    assert teacher.asked.count(path) == 1
