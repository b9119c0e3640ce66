"""HTTP exchanges with a SGLang server: one connection pool, time limits, and retries of what may be retried."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util.retry import Retry

from opd_megatron.config.checks import http_url, mask_url
from opd_megatron.config.errors import UserError
from opd_megatron.teacher.protocol import TeacherError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection (less if the time limit of a request is less)."""
MAX_PAUSE = 30.0
"""Longest pause before a retry in seconds, also where the server's Retry-After asks for more."""
MESSAGE_LENGTH = 300
"""Characters of a server's error message that are shown."""


class HttpStatusError(TeacherError):
    """The server answered with an error status that is not worth another attempt."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Transient(Exception):
    """An attempt failed in a way that another may not; ``pause`` is what the server asked for in seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class SGLangClient:
    """A pool of connections to one server; may be used by many threads at a time.

    ``url`` is the server's address, with a path in front of the endpoints if it has one; a user name and password in
    it are sent as basic authentication and appear nowhere else. Proxies of the environment are not used. ``timeout``
    limits the wait for an answer in seconds, ``max_retries`` counts repetitions after the first attempt, and the pause
    before repetition n is drawn from the upper half of ``backoff * 2**(n - 1)`` seconds. Raises :class:`UserError` on
    an address that is none.
    """

    def __init__(
        self, url: str, *, pool_size: int = 8, timeout: float = 120.0, max_retries: int = 4, backoff: float = 0.5
    ) -> None:
        parts = urlsplit(url) if http_url(url) is None else None
        if parts is None or parts.query or parts.fragment:
            problem = http_url(url) or "must be an address without query and fragment"
            raise UserError(f"teacher server {mask_url(url)} {problem}")
        host = parts.netloc.rpartition("@")[2]
        self.url = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        """The address without user name and password."""
        self.max_retries = max_retries
        self._timeout = timeout
        self._backoff = backoff
        # Not the module's generator, whose state belongs to the run's seed.
        self._jitter = random.Random()
        self._session = requests.Session()
        # Neither proxies nor .netrc entries are meant for this server, and looking for them costs time per request.
        self._session.trust_env = False
        adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=pool_size)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        if parts.username is not None:
            self._session.auth = (unquote(parts.username), unquote(parts.password or ""))

    def get(self, path: str) -> Any:
        """The JSON answer to ``GET path``; raises like :meth:`exchange`."""
        return self.exchange("GET", path, None, subject=f"GET {path}")

    def post(self, path: str, payload: Any) -> Any:
        """The JSON answer to ``POST path``; raises like :meth:`exchange`."""
        return self.exchange("POST", path, payload, subject=f"POST {path}")

    def exchange(
        self, method: str, path: str, payload: Any, *, subject: str, abandon: threading.Event | None = None
    ) -> Any:
        """Send ``payload`` as JSON and return the answer's JSON.

        Repeated are refused and broken connections, time-outs, answers that break off, and the statuses 429 and 5xx.
        When ``abandon`` is set, no further attempt is made. Raises :class:`TeacherError` that names the server,
        ``subject`` and the last reason; :class:`HttpStatusError` for any other status.
        """
        # urllib3's own retries end at the headers of an answer and cannot be interrupted in a pause.
        abandon = abandon or threading.Event()
        for attempt in range(self.max_retries + 1):
            if abandon.is_set():
                raise TeacherError(f"teacher server {self.url}: {subject}: given up because another request failed")
            try:
                return self._attempt(method, path, payload, subject)
            except _Transient as error:
                reason = error
            if attempt < self.max_retries:
                pause = min(max(self._backoff * 2**attempt * self._jitter.uniform(0.5, 1.0), reason.pause), MAX_PAUSE)
                logger.warning(
                    "teacher server %s: %s: %s; attempt %d of %d in %.1f s",
                    self.url, subject, reason, attempt + 2, self.max_retries + 1, pause,
                )  # fmt: skip
                abandon.wait(pause)
        attempts = f"{self.max_retries + 1} attempts" if self.max_retries else "1 attempt"
        raise TeacherError(f"teacher server {self.url}: {subject}: {reason} ({attempts})")

    def _attempt(self, method: str, path: str, payload: Any, subject: str) -> Any:
        timeouts = (min(CONNECT_TIMEOUT, self._timeout), self._timeout)
        try:
            response = self._session.request(
                method, self.url + path, json=payload, timeout=timeouts, allow_redirects=False
            )
        except requests.ConnectTimeout:
            raise _Transient(f"no connection within {timeouts[0]:g} s") from None
        except requests.Timeout:
            raise _Transient(f"no answer within {timeouts[1]:g} s") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise _Transient(f"connection failed ({_root_cause(error)})") from None
        except requests.RequestException as error:
            raise TeacherError(f"teacher server {self.url}: {subject}: {_root_cause(error)}") from None
        status = response.status_code
        if status == 429 or status >= 500:
            raise _Transient(f"HTTP {status}: {error_message(response)}", _retry_after(response))
        if status != 200:
            message = f"teacher server {self.url}: {subject}: HTTP {status}: {error_message(response)}"
            raise HttpStatusError(message, status)
        try:
            return response.json()
        except requests.JSONDecodeError as error:
            raise _Transient(f"the answer is not JSON ({error})") from None

    def close(self) -> None:
        self._session.close()


def error_message(response: requests.Response) -> str:
    """What the server says is wrong, on one line, from any of the forms it uses; see docs of SGLang's endpoints.

    Known forms: ``{"error": {"message": text}}``, ``{"error": text}``, ``{"object": "error", "message": text}``,
    ``{"detail": text}``, and plain text.
    """
    try:
        text = next(_messages(response.json()), response.text)
    except requests.JSONDecodeError:
        text = response.text
    line = " ".join(text.split()) or response.reason or "no message"
    return line if len(line) <= MESSAGE_LENGTH else line[:MESSAGE_LENGTH] + "..."


def _messages(body: Any) -> Iterator[str]:
    if isinstance(body, str):
        yield body
    elif isinstance(body, dict):
        for key in ("error", "message", "detail"):
            yield from _messages(body.get(key))


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server asks to wait (it may give a number or a date), 0 if it does not."""
    value = response.headers.get("Retry-After")
    try:
        return 0.0 if value is None else Retry().parse_retry_after(value)
    except InvalidHeader:
        return 0.0


def _root_cause(error: BaseException) -> str:
    """The innermost reason, e.g. ``[Errno 111] Connection refused``, without the layers of libraries around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(error).split()) or type(error).__name__
