"""What is retried, what is not, and what the user is told."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import logging
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from opd_megatron.config.errors import UserError
from opd_megatron.http_client import MESSAGE_LENGTH, HttpClient, HttpError, HttpFault, RetryPolicy, blocking, retried
from opd_megatron.system import free_port
from tests.teacher.scripted_server import Handler, ScriptedServer, Step, drop, reply

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


def ask(
    url: str, path: str = "/generate", payload: Any = None, *, retries: int = 3, backoff: float = 0.01, **settings: Any
) -> Any:
    """One exchange from code that is not asynchronous; ``payload`` is posted."""
    client = HttpClient(url, **{"kind": "teacher server", "timeout": 5.0, **settings})

    async def exchange() -> Any:
        try:
            policy = RetryPolicy(retries, backoff)
            return await (client.get(path, policy) if payload is None else client.post(path, payload, policy))
        finally:
            await client.aclose()

    return blocking(exchange)


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
    assert ask(server.url, payload={}) == {"fine": True}
    assert len(server.requests) == 3


def test_retries_are_bounded_and_the_last_reason_is_named(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(reply(500, {"error": {"message": "CUDA out\nof memory"}}))
    with pytest.raises(HttpError, match=r"POST /generate: HTTP 500: CUDA out of memory \(4 attempts\)") as caught:
        ask(server.url, payload={})
    assert server.url in str(caught.value)
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 422, 307])
def test_other_statuses_fail_at_once(serve: Callable[..., ScriptedServer], status: int) -> None:
    server = serve(reply(status, {"detail": "no"}), OK)
    with pytest.raises(HttpError, match=f"HTTP {status}: no") as caught:
        ask(server.url, payload={})
    assert caught.value.status == status
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "too long"}}, "too long"),
        ({"error": "too long"}, "too long"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body"], "msg": "no ids"}, {"msg": "no text"}]}, "no ids; no text"),
        (b"plain words\n over lines", "plain words over lines"),
        (b"", "Bad Request"),
        (b"x" * 5000, "x" * 300 + "..."),
        ({"code": 7}, '{"code": 7}'),
    ],
)
def test_every_form_of_error_is_read(serve: Callable[..., ScriptedServer], body: object, message: str) -> None:
    with pytest.raises(HttpError) as caught:
        ask(serve(reply(400, body)).url, payload={})
    assert str(caught.value).endswith(f"HTTP 400: {message}")


def test_retry_after_is_respected_within_the_cap(
    serve: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(reply(429, {}, Retry_After="1"), OK)
    began = time.monotonic()
    assert ask(server.url, "/model_info") == {"fine": True}
    assert time.monotonic() - began >= 1.0
    date = email.utils.formatdate(time.time() + 1.5, usegmt=True)
    began = time.monotonic()
    assert ask(serve(reply(503, {}, Retry_After=date), OK).url, "/model_info") == {"fine": True}
    assert time.monotonic() - began >= 0.4
    monkeypatch.setattr("opd_megatron.http_client.MAX_PAUSE", 0.05)
    server = serve(reply(429, {}, Retry_After="86400"), reply(503, {}, Retry_After="soon"), OK)
    assert ask(server.url, "/model_info") == {"fine": True}


def test_a_server_that_does_not_answer_runs_into_the_time_limit(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(stall, OK)
    assert ask(server.url, "/model_info", timeout=0.2) == {"fine": True}
    with pytest.raises(HttpError, match=r"no answer within 0.2 s \(1 attempt\)"):
        ask(serve(stall).url, "/model_info", timeout=0.2, retries=0)


def test_a_refused_connection_is_one_readable_line(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with caplog.at_level(logging.WARNING), pytest.raises(HttpError) as caught:
        ask(f"http://127.0.0.1:{port}", "/model_info", retries=1)
    message = str(caught.value)
    assert message.startswith(f"teacher server http://127.0.0.1:{port}: GET /model_info: connection failed")
    assert "refused" in message
    assert "\n" not in message
    assert "attempt 2 of 2" in caplog.text


def test_the_deadline_bounds_attempts_and_pauses(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(reply(500, b"kaput"))
    client = HttpClient(server.url)

    async def exchange() -> None:
        try:
            policy = RetryPolicy(max_retries=100, backoff=60.0)
            await retried(lambda: client.attempt("GET", "/", None, "sample 1"), policy, deadline=time.monotonic() + 0.3)
        finally:
            await client.aclose()

    with pytest.raises(HttpError, match=r"sample 1: the time limit of the step passed \(HTTP 500: kaput\)") as caught:
        blocking(exchange)
    assert caught.value.fault == HttpFault.DEADLINE
    assert len(server.requests) == 1


def test_a_certificate_that_nobody_vouches_for_is_refused_before_anything_is_sent(tmp_path: Path, key: str) -> None:
    """The control: who trusts the certificate gets the answer, so it is nothing else that is wrong with the server."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("makes its certificate with openssl")
    secret, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", secret, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, secret)
    server = ScriptedServer(OK, tls=context)
    try:
        with pytest.raises(HttpError, match=r"connection failed \(.*[Cc]ertificate") as caught:
            ask(server.url, api_key_env="TEACHER_KEY")
        assert caught.value.fault == HttpFault.CONNECTION
        assert not caught.value.transient
        assert server.requests == []
        trusted = requests.get(server.url + "/generate", verify=str(certificate), timeout=20)
        assert trusted.json() == {"fine": True}
    finally:
        server.close()


def test_user_and_password_are_sent_and_shown_nowhere(
    serve: Callable[..., ScriptedServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(reply(500, {}))
    with caplog.at_level(logging.DEBUG), pytest.raises(HttpError) as caught:
        ask(server.url.replace("http://", "http://ann:s3cr%40t@"), "/model_info", retries=1)
    assert server.requests[0][2]["Authorization"] == "Basic " + base64.b64encode(b"ann:s3cr@t").decode()
    for shown in (str(caught.value), caplog.text, repr(caught.value.__cause__)):
        assert "s3cr" not in shown
        assert "ann" not in shown


def test_a_secret_is_taken_out_before_a_message_is_cut(
    serve: Callable[..., ScriptedServer], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A part of it would no longer be recognised."""
    long = "x" * (MESSAGE_LENGTH - len(key) // 2)
    server = serve(reply(400, {"error": f"{long}{key} is no key"}))
    with caplog.at_level(logging.DEBUG), pytest.raises(HttpError) as caught:
        ask(server.url, "/model_info", api_key_env="TEACHER_KEY")
    for shown in (str(caught.value), caplog.text):
        assert key[:5] not in shown


def test_what_a_server_repeats_of_basic_authentication_is_taken_out(serve: Callable[..., ScriptedServer]) -> None:
    token = base64.b64encode(b"ann:s3cr@t").decode()
    server = serve(reply(401, {"error": f"bad Basic {token}, not s3cr@t or s3cr%40t"}))
    with pytest.raises(HttpError, match=r"bad Basic \*\*\*, not \*\*\* or \*\*\*"):
        ask(server.url.replace("http://", "http://ann:s3cr%40t@"), "/model_info")


def test_a_path_in_front_of_the_endpoints_is_kept(serve: Callable[..., ScriptedServer]) -> None:
    server = serve(OK)
    ask(server.url + "/teacher-1/", "/model_info")
    assert server.requests[0][:2] == ("GET", "/teacher-1/model_info")


@pytest.mark.parametrize(
    "url", ["localhost:30000", "ftp://host/", "http://", "http://u:s3cret@host:port", "http://h/?key=s3cret"]
)
def test_no_address_is_refused_without_showing_secrets(url: str) -> None:
    with pytest.raises(UserError, match="must be an address") as caught:
        HttpClient(url)
    assert "s3cret" not in str(caught.value)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TEACHER_KEY", "sk-verysecret")
    return "sk-verysecret"


def test_the_api_key_is_sent_and_shown_nowhere(
    serve: Callable[..., ScriptedServer], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(reply(500, {"error": f"the key {key} has no credit"}), reply(401, {"error": f"bad key {key}"}))
    with caplog.at_level(logging.DEBUG), pytest.raises(HttpError, match=r"HTTP 401: bad key \*\*\*") as caught:
        ask(server.url, "/model_info", api_key_env="TEACHER_KEY")
    assert server.requests[0][2]["Authorization"] == f"Bearer {key}"
    assert "no credit" in caplog.text
    assert "unencrypted" not in caplog.text
    for shown in (str(caught.value), caplog.text, repr(vars(caught.value))):
        assert key not in shown


@pytest.mark.parametrize("key", ["sk-verysecret", 'sk-"very"/\\secret'])
def test_what_a_server_repeats_of_the_key_in_a_good_answer_is_taken_out(
    serve: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    said = f"Bearer {key} twice {key}"
    answer = {"meta_info": [{"finish_reason": {"type": "abort", "message": said}}, 1, None], "text": "fine"}
    found = ask(serve(reply(200, answer)).url, api_key_env="TEACHER_KEY")
    assert key not in repr(found)
    assert found["meta_info"][0]["finish_reason"]["message"] == said.replace(key, "***")
    assert (found["text"], found["meta_info"][1:]) == ("fine", [1, None])


def test_a_key_that_leaves_the_machine_unencrypted_is_a_warning(key: str, caplog: pytest.LogCaptureFixture) -> None:
    for url in ("https://teacher.example:1", "http://127.0.0.9:1", "http://localhost:1", "http://[::1]:1"):
        HttpClient(url, api_key_env="TEACHER_KEY")
    assert caplog.text == ""
    HttpClient("http://teacher.example:1", api_key_env="TEACHER_KEY")
    assert "http://teacher.example:1: the API key or password goes there unencrypted" in caplog.text


@pytest.mark.parametrize(
    ("value", "url", "reason"),
    [
        ("", "http://h:1", "TEACHER_KEY has no API key"),
        ("sk-verysecret\n", "http://h:1", "cannot be sent"),
        ("sk-verysecret", "http://ann:pw@h:1", "not both"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, url: str, reason: str
) -> None:
    monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(UserError, match=reason) as caught:
        HttpClient(url, api_key_env="TEACHER_KEY")
    assert "verysecret" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_neither_proxy_nor_netrc_of_the_environment_is_used(
    serve: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    server = serve(OK)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    assert ask(server.url, "/model_info") == {"fine": True}
    assert "Authorization" not in server.requests[0][2]


def test_arrays_are_sent_as_lists_and_nan_is_read(serve: Callable[..., ScriptedServer]) -> None:
    bodies: list[bytes] = []

    def step(handler: Handler) -> None:
        bodies.append(handler.body)
        reply(200, b"[NaN, -1.5]")(handler)

    answer = ask(serve(step).url, payload={"input_ids": [np.array([1, 2**40])]})
    assert bodies == [b'{"input_ids":[[1,1099511627776]]}']
    np.testing.assert_array_equal(answer, [np.nan, -1.5])


def test_one_client_serves_several_loops_and_callers_inside_a_loop(serve: Callable[..., ScriptedServer]) -> None:
    client = HttpClient(serve(OK).url)

    async def exchange() -> Any:
        try:
            return await client.get("/model_info", RetryPolicy())
        finally:
            await client.aclose()

    async def inside() -> list[Any]:
        return [await client.get("/", RetryPolicy()), blocking(exchange), await exchange()]

    assert blocking(exchange) == {"fine": True}
    assert asyncio.run(inside()) == [{"fine": True}] * 3
