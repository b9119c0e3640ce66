"""What is retried, what is not, and what the user is told."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.system import free_port
from opd_megatron.teacher.protocol import TeacherError
from opd_megatron.teacher.sglang_client import HttpStatusError, SGLangClient
from tests.teacher.scripted_server import ScriptedServer, Step, drop, reply

OK = reply(200, {"fine": True})


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    servers: list[ScriptedServer] = []

    def start(*script: Step) -> ScriptedServer:
        servers.append(ScriptedServer(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def client(url: str, **settings: float) -> SGLangClient:
    return SGLangClient(url, **{"timeout": 5.0, "max_retries": 3, "backoff": 0.01, **settings})  # type: ignore[arg-type]


def stall(handler: object) -> None:
    time.sleep(0.6)


@pytest.mark.parametrize(
    "fault",
    [
        drop,
        reply(500, b"Internal Server Error"),
        reply(503, {"error": "starting"}),
        reply(429, {"error": {"message": "queue full"}}),
        reply(200, b'{"meta_info": {"input_tok'),
        reply(200, b'{"fine":', Content_Length="100"),
    ],
    ids=["dropped connection", "500", "503", "429", "broken JSON", "answer breaks off"],
)
def test_passing_faults_are_retried(serve: Callable[..., ScriptedServer], fault: Step) -> None:
    server = serve(fault, fault, OK)
    assert client(server.url).post("/generate", {}) == {"fine": True}
    assert len(server.requests) == 3


def test_retries_are_bounded_and_the_last_reason_is_named(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(reply(500, {"error": {"message": "CUDA out\nof memory"}}))
    with pytest.raises(TeacherError, match=r"POST /generate: HTTP 500: CUDA out of memory \(4 attempts\)") as caught:
        client(server.url).post("/generate", {})
    assert server.url in str(caught.value)
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 422, 307])
def test_other_statuses_fail_at_once(serve: Callable[..., ScriptedServer], status: int) -> None:
    server = serve(reply(status, {"detail": "no"}), OK)
    with pytest.raises(HttpStatusError, match=f"HTTP {status}: no") as caught:
        client(server.url).post("/generate", {})
    assert caught.value.status == status
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "too long"}}, "too long"),
        ({"error": "too long"}, "too long"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"detail": "Not Found"}, "Not Found"),
        (b"plain words\n over lines", "plain words over lines"),
        (b"", "Bad Request"),
        (b"x" * 5000, "x" * 300 + "..."),
        ({"code": 7}, '{"code": 7}'),
    ],
)
def test_every_form_of_error_is_read(serve: Callable[..., ScriptedServer], body: object, message: str) -> None:
    with pytest.raises(TeacherError) as caught:
        client(serve(reply(400, body)).url).post("/generate", {})
    assert str(caught.value).endswith(f"HTTP 400: {message}")


def test_retry_after_is_respected_within_the_cap(
    serve: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(reply(429, {}, Retry_After="1"), OK)
    began = time.monotonic()
    assert client(server.url).get("/model_info") == {"fine": True}
    assert time.monotonic() - began >= 1.0
    monkeypatch.setattr("opd_megatron.teacher.sglang_client.MAX_PAUSE", 0.05)
    server = serve(reply(429, {}, Retry_After="86400"), reply(503, {}, Retry_After="soon"), OK)
    assert client(server.url).get("/model_info") == {"fine": True}


def test_a_server_that_does_not_answer_runs_into_the_time_limit(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(stall, OK)
    assert client(server.url, timeout=0.2).get("/model_info") == {"fine": True}
    with pytest.raises(TeacherError, match=r"no answer within 0.2 s \(1 attempt\)"):
        client(serve(stall).url, timeout=0.2, max_retries=0).get("/model_info")


def test_a_refused_connection_is_one_readable_line(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with caplog.at_level(logging.WARNING), pytest.raises(TeacherError) as caught:
        client(f"http://127.0.0.1:{port}", max_retries=1).get("/model_info")
    message = str(caught.value)
    assert message.startswith(f"teacher server http://127.0.0.1:{port}: GET /model_info: connection failed")
    assert "refused" in message
    assert "\n" not in message
    assert "attempt 2 of 2" in caplog.text


def test_no_attempt_follows_once_the_batch_is_given_up(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(reply(500, {}))
    abandon = threading.Event()
    threading.Timer(0.3, abandon.set).start()
    with pytest.raises(TeacherError, match="given up because another request failed"):
        client(server.url, backoff=60.0).exchange("POST", "/generate", {}, subject="sample 1", abandon=abandon)
    assert len(server.requests) == 1


def test_user_and_password_are_sent_and_shown_nowhere(
    serve: Callable[..., ScriptedServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(reply(500, {}))
    with caplog.at_level(logging.DEBUG), pytest.raises(TeacherError) as caught:
        client(server.url.replace("http://", "http://ann:s3cr%40t@"), max_retries=1).get("/model_info")
    assert server.requests[0][2]["Authorization"] == "Basic " + base64.b64encode(b"ann:s3cr@t").decode()
    for shown in (str(caught.value), caplog.text, repr(caught.value.__cause__)):
        assert "s3cr" not in shown
        assert "ann" not in shown


def test_a_path_in_front_of_the_endpoints_is_kept(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(OK)
    client(server.url + "/teacher-1/").get("/model_info")
    assert server.requests[0][:2] == ("GET", "/teacher-1/model_info")


@pytest.mark.parametrize(
    "url", ["localhost:30000", "ftp://host/", "http://", "http://u:s3cret@host:port", "http://h/?key=s3cret"]
)
def test_no_address_is_refused_without_showing_secrets(url: str) -> None:
    with pytest.raises(UserError, match="must be an address") as caught:
        SGLangClient(url)
    assert "s3cret" not in str(caught.value)
