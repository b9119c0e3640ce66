"""HTTP exchanges with a model server: pooled connections, time limits, retries of what may be retried, no secrets.

An :class:`HttpClient` belongs to one server and makes single attempts or whole exchanges; :func:`retried` repeats
attempts that may go to several servers. Everything is asynchronous; :func:`blocking` serves callers that are not.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import email.utils
import enum
import ipaddress
import json
import logging
import os
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import orjson
import tenacity

from opd_megatron.config.checks import http_url, mask_url
from opd_megatron.config.errors import RunError, UserError
from opd_megatron.config.masking import Secrets

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection (less if the time limit of a request is less)."""
MAX_PAUSE = 30.0
"""Longest pause before a retry in seconds, also where the server's Retry-After asks for more."""
MESSAGE_LENGTH = 300
"""Characters of a server's error message that are shown."""
_KEEP_ALIVE = 4.0
"""Seconds that an idle connection is kept: less than the 5 s after which SGLang's web server closes it."""


class HttpFault(enum.StrEnum):
    """What went wrong with an exchange."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    STATUS = "status"
    MALFORMED = "malformed"
    DEADLINE = "deadline"


class HttpError(RunError):
    """An exchange failed; the message names server, subject and reason on one line.

    ``status`` is that of the answer, if there was one. ``transient`` says that another attempt may succeed, ``pause``
    how many seconds the server asks to wait before it, ``delivered`` that the server may have seen the request's
    content, which can then be the reason.
    """

    def __init__(
        self,
        server: str,
        subject: str,
        reason: str,
        fault: HttpFault,
        *,
        status: int | None = None,
        transient: bool = False,
        pause: float = 0.0,
        delivered: bool = True,
    ) -> None:
        super().__init__(f"{server}: {subject}: {reason}")
        self.server = server
        self.subject = subject
        self.reason = reason
        self.fault = fault
        self.status = status
        self.transient = transient
        self.pause = pause
        self.delivered = delivered

    @property
    def busy(self) -> bool:
        """Whether the server says that it has too much to do."""
        return self.status in (429, 503)

    def about(self, subject: str, reason: str | None = None) -> HttpError:
        """The same failure of another subject."""
        return HttpError(
            self.server,
            subject,
            reason or self.reason,
            self.fault,
            status=self.status,
            transient=self.transient,
            pause=self.pause,
            delivered=self.delivered,
        )


@dataclass(frozen=True)
class RetryPolicy:
    """How often what may be retried is retried, and after what pauses.

    ``max_retries`` counts repetitions after the first attempt; the pause before repetition n is drawn from the upper
    half of ``backoff * 2**(n - 1)`` seconds, or is what the server asks for, if that is longer. Without
    ``repeat_time_outs`` what was not answered in time is not repeated.
    """

    max_retries: int = 4
    backoff: float = 0.5
    repeat_time_outs: bool = True


# Not the module's generator, whose state belongs to the run's seed.
_jitter = random.Random()


async def retried(
    attempt: Callable[[], Awaitable[T]],
    policy: RetryPolicy,
    *,
    deadline: float | None = None,
    on_retry: Callable[[], None] | None = None,
) -> T:
    """Await ``attempt()`` until it gives a result, at most ``policy.max_retries`` times after the first.

    ``deadline`` (of :func:`time.monotonic`) bounds attempts and pauses together. ``on_retry`` is called before each
    repetition. Raises the :class:`HttpError` of the last attempt, with the number of attempts where that is
    interesting; after the deadline one of :attr:`HttpFault.DEADLINE`.
    """
    last: HttpError | None = None

    def pause(state: tenacity.RetryCallState) -> float:
        assert last is not None
        drawn = policy.backoff * 2.0 ** min(state.attempt_number - 1, 30) * _jitter.uniform(0.5, 1.0)
        return min(max(drawn, last.pause), MAX_PAUSE)

    def announce(state: tenacity.RetryCallState) -> None:
        logger.warning(
            "%s; attempt %d of %d in %.1f s",
            last, state.attempt_number + 1, policy.max_retries + 1, state.upcoming_sleep,
        )  # fmt: skip
        if on_retry is not None:
            on_retry()

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, HttpError) and error.transient),
        stop=tenacity.stop_after_attempt(policy.max_retries + 1),
        wait=pause,
        before_sleep=announce,
        reraise=True,
    )
    try:
        async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0.0)):
            async for state in retrying:
                with state:
                    try:
                        return await attempt()
                    except HttpError as error:
                        last = error
                        if error.fault is HttpFault.TIMEOUT and not policy.repeat_time_outs:
                            error.transient = False
                        raise
    except TimeoutError:
        server, subject = ("server", "request") if last is None else (last.server, last.subject)
        reason = "" if last is None else f" ({last.reason})"
        raise HttpError(server, subject, f"the time limit of the step passed{reason}", HttpFault.DEADLINE) from None
    except HttpError as error:
        if not error.transient:
            raise
        attempts = f"{policy.max_retries + 1} attempts" if policy.max_retries else "1 attempt"
        raise error.about(error.subject, f"{error.reason} ({attempts})") from None
    raise AssertionError("unreachable")


def blocking(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``start()`` to its end from code that is not asynchronous, also where a loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(start())
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="http") as thread:
        return thread.submit(lambda: asyncio.run(start())).result()


class HttpClient:
    """The connections to one server; one client may serve several event loops, each with connections of its own.

    ``url`` is the server's address, with a path in front of the endpoints if it has one; a user name and password in
    it are sent as basic authentication and appear nowhere else. ``kind`` says in messages what the server is.
    ``api_key_env`` names an environment variable whose value is sent as a bearer token and shown nowhere. Neither
    proxies of the environment nor ``.netrc`` are used, certificates are verified, redirects are not followed.
    ``timeout`` limits one attempt in seconds. Raises :class:`UserError` on an address that is none and on a key that
    is missing or cannot be sent.
    """

    def __init__(
        self, url: str, *, kind: str = "server", timeout: float = 120.0, api_key_env: str | None = None
    ) -> None:
        parts = urlsplit(url) if http_url(url) is None else None
        if parts is None or parts.query or parts.fragment:
            problem = http_url(url) or "must be an address without query and fragment"
            raise UserError(f"{kind} {mask_url(url)} {problem}")
        host = parts.netloc.rpartition("@")[2]
        self.url = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        """The address without user name and password."""
        self.server = f"{kind} {self.url}"
        """The server in messages."""
        self._timeout = timeout
        self._secrets = Secrets()
        self._headers = {}
        if parts.username is not None:
            user, password = unquote(parts.username), unquote(parts.password or "")
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._secrets.add(token, password, parts.password or "")
            self._headers["Authorization"] = f"Basic {token}"
        if api_key_env is not None:
            if parts.username is not None:
                raise UserError(f"{self.server}: give a user name in the address or an API key, not both")
            key = _read_key(api_key_env, self.server)
            self._secrets.add(key)
            self._headers["Authorization"] = f"Bearer {key}"
        if self._headers and parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            logger.warning("%s: the API key or password goes there unencrypted: use https://", self.server)
        self._sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession]
        self._sessions = weakref.WeakKeyDictionary()

    async def get(self, path: str, policy: RetryPolicy, *, timeout: float | None = None) -> Any:
        """The JSON answer to ``GET path``; raises like :func:`retried`."""
        return await retried(lambda: self.attempt("GET", path, None, f"GET {path}", timeout=timeout), policy)

    async def post(self, path: str, payload: Any, policy: RetryPolicy, *, timeout: float | None = None) -> Any:
        """The JSON answer to ``POST path``; raises like :func:`retried`."""
        return await retried(lambda: self.attempt("POST", path, payload, f"POST {path}", timeout=timeout), policy)

    async def attempt(self, method: str, path: str, payload: Any, subject: str, *, timeout: float | None = None) -> Any:
        """Send ``payload`` as JSON (NumPy arrays are lists there) once; the answer's JSON, secrets in it masked.

        ``timeout`` replaces the client's. Raises :class:`HttpError` about ``subject``: transient are refused and broken
        connections, time-outs, answers that break off or are not JSON, and the statuses 429 and 5xx.
        """
        seconds = self._timeout if timeout is None else timeout
        connect = min(CONNECT_TIMEOUT, seconds)

        def failure(reason: str, fault: HttpFault, **about: Any) -> HttpError:
            return HttpError(self.server, subject, reason, fault, **about)

        body = None if payload is None else orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)
        limits = aiohttp.ClientTimeout(total=seconds, sock_connect=connect)
        try:
            async with self._session().request(
                method, self.url + path, data=body, timeout=limits, allow_redirects=False
            ) as response:
                content = await response.read()
        except aiohttp.ConnectionTimeoutError:
            reason = f"no connection within {connect:g} s"
            raise failure(reason, HttpFault.TIMEOUT, transient=True, delivered=False) from None
        except TimeoutError:
            raise failure(f"no answer within {seconds:g} s", HttpFault.TIMEOUT, transient=True) from None
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL) as error:
            raise failure(f"connection failed ({_root_cause(error)})", HttpFault.CONNECTION, delivered=False) from None
        except aiohttp.ClientConnectorError as error:
            reason = f"connection failed ({_root_cause(error)})"
            raise failure(reason, HttpFault.CONNECTION, transient=True, delivered=False) from None
        except (aiohttp.ClientError, OSError) as error:
            raise failure(f"connection failed ({_root_cause(error)})", HttpFault.CONNECTION, transient=True) from None
        status = response.status
        if status != 200:
            transient = status == 429 or status >= 500
            reason = f"HTTP {status}: {error_message(content, response.reason, self._secrets.masked)}"
            pause = _retry_after(response.headers.get("Retry-After")) if transient else 0.0
            raise failure(reason, HttpFault.STATUS, status=status, transient=transient, pause=pause)
        try:
            answer = _loads(content)
            return self._secrets.masked_values(answer) if self._secrets.occur_in(content) else answer
        except (ValueError, RecursionError) as error:
            raise failure(f"the answer is not JSON ({error})", HttpFault.MALFORMED, transient=True) from None

    async def aclose(self) -> None:
        """Close the connections of the running loop; the next request opens new ones."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            headers = {"Content-Type": "application/json", **self._headers}
            # How much is in flight is bounded by who asks; a second bound here could only make requests wait unseen.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE)
            self._sessions[loop] = aiohttp.ClientSession(connector=connector, headers=headers, trust_env=False)
        return self._sessions[loop]


def error_message(content: bytes, reason: str | None, mask: Callable[[str], str] = str) -> str:
    """What a server says is wrong, on one line, from any of the forms that it uses.

    Known forms: ``{"error": {"message": text}}``, ``{"error": text}``, ``{"object": "error", "message": text}``,
    ``{"detail": text}``, ``{"detail": [{"loc": [...], "msg": text}]}``, and plain text. ``reason`` stands in for an
    empty body. ``mask`` takes the secrets out before the line is cut, which could leave a part of one.
    """
    text = content.decode("utf-8", errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        text = "; ".join(_messages(json.loads(content))) or text
    line = mask(" ".join(text.split()) or reason or "no message")
    return line if len(line) <= MESSAGE_LENGTH else line[:MESSAGE_LENGTH] + "..."


def _messages(body: Any) -> Iterator[str]:
    """The messages under the first key of ``body`` that has one."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, list):
        for item in body:
            yield from _messages(item)
    elif isinstance(body, dict):
        for key in ("error", "message", "detail", "msg"):
            found = list(_messages(body.get(key)))
            if found:
                yield from found
                return


def _loads(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except ValueError:
        # It also takes NaN and Infinity, which are no JSON but deserve a better message than that.
        return json.loads(content)


def _read_key(name: str, server: str) -> str:
    key = os.environ.get(name, "")
    if not key:
        raise UserError(f"{server}: the environment variable {name} has no API key: set it, or leave out the option")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise UserError(f"{server}: the API key in {name} has characters that cannot be sent (a line's end?)")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after(value: str | None) -> float:
    """Seconds that the server asks to wait (it may give a number or a date), 0 if it does not."""
    if value is None:
        return 0.0
    if value.strip().isdecimal() or value.replace(".", "", 1).strip().isdecimal():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _root_cause(error: BaseException) -> str:
    """The innermost reason, e.g. ``[Errno 111] Connection refused``, without the layers of libraries around it."""
    while isinstance(inner := error.__cause__ or error.__context__, OSError | aiohttp.ClientError):
        error = inner
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, ConnectionError) and error.errno:
        # asyncio words it as "Connect call failed" and leaves out why.
        return f"[Errno {error.errno}] {os.strerror(error.errno)}"
    return " ".join(str(error).split()) or type(error).__name__
