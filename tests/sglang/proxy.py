"""An HTTP proxy in front of a real SGLang server that can misbehave, and remember what the server said.

What goes wrong is a *plan*, a function from a request to the fault it meets (see :mod:`tests.sglang.faults`); a request
without a fault is passed on unchanged. With a :class:`Recording` every sample's first answer is kept and repeated to
whoever asks for it again, so that two runs that ask the same get bit-equal answers however their requests are batched
and ordered.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

T = TypeVar("T")
GENERATE = "/generate"
_LIMIT = 30.0
"""Seconds that opening or closing may take."""


@dataclass(frozen=True)
class Asked:
    """One request that a plan judges."""

    number: int
    """Counts the requests to ``/generate`` from 0, repetitions included."""
    payload: dict[str, Any]
    elements: list[dict[str, Any]]
    """The payload of each sample, as if it had been asked for alone."""
    is_batch: bool
    """Whether the answer is a list."""

    @classmethod
    def parse(cls, number: int, payload: dict[str, Any]) -> Asked:
        ids = payload["input_ids"]
        is_batch = bool(ids) and isinstance(ids[0], list)
        return cls(number, payload, _split(payload, len(ids)) if is_batch else [payload], is_batch)


def _split(payload: dict[str, Any], count: int) -> list[dict[str, Any]]:
    def part(name: str, value: Any, index: int) -> Any:
        # one flat list of ids is meant for every sample
        shared = name == "token_ids_logprob" and bool(value) and not isinstance(value[0], list)
        return value[index] if isinstance(value, list) and not shared else value

    return [{name: part(name, value, index) for name, value in payload.items()} for index in range(count)]


@dataclass
class Answer:
    """What the server says: status, content type, and the body as it goes to the client."""

    status: int
    content_type: str
    body: bytes

    @classmethod
    def of(cls, body: Any, status: int = 200) -> Answer:
        return cls(status, "application/json", json.dumps(body).encode())


class Recording:
    """Answers by what was asked for one sample; requests that only differ in batching and identity are the same."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.misses = 0
        """Samples for which the server had to be asked."""

    @staticmethod
    def key(element: dict[str, Any]) -> str:
        return json.dumps({name: value for name, value in element.items() if name != "rid"}, sort_keys=True)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with one request, and what it is called in test names and counts."""

    name: str
    run: Callable[[Exchange], Awaitable[web.StreamResponse]]


Plan = Callable[[Asked], Fault | None]


def no_fault(asked: Asked) -> None:
    """The plan of a proxy that only passes on."""


def in_turn(*faults: Fault | None) -> Plan:
    """The n-th request meets the n-th of ``faults``; later ones none."""
    return lambda asked: faults[asked.number] if asked.number < len(faults) else None


def always(fault: Fault) -> Plan:
    return lambda asked: fault


def at_random(faults: Sequence[Fault], probability: float, seed: int) -> Plan:
    """Each request meets one of ``faults`` with ``probability``, in an order that ``seed`` fixes."""
    generator = random.Random(seed)
    return lambda asked: generator.choice(faults) if generator.random() < probability else None


def whenever(matches: Callable[[dict[str, Any]], bool], fault: Fault) -> Plan:
    """``fault`` for each request that has a sample for which ``matches`` its payload."""
    return lambda asked: fault if any(matches(element) for element in asked.elements) else None


@dataclass
class Exchange:
    """One request and the means to answer it, well or badly."""

    asked: Asked
    request: web.Request
    proxy: FaultProxy

    async def answer(self) -> Answer:
        """The server's answer, or the recorded one."""
        return await self.proxy.answer(self.request, self.asked)

    def send(self, answer: Answer, **headers: str) -> web.Response:
        return web.Response(
            status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type, **headers}
        )

    async def send_half(self, answer: Answer) -> None:
        """Promise the whole answer and send its first half."""
        headers = {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body))}
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(self.request)
        await response.write(answer.body[: len(answer.body) // 2])

    async def reset(self) -> web.StreamResponse:
        return await reset(self.request)

    async def hang_up(self) -> web.StreamResponse:
        """Close the connection after what has been sent."""
        assert self.request.transport is not None
        self.request.transport.close()
        return await self.never()

    async def never(self) -> web.StreamResponse:
        return await never()


async def reset(request: web.Request) -> web.StreamResponse:
    """Break the connection as a dying machine does: with a TCP reset, whatever is still on its way."""
    transport = request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return await never()


async def never() -> web.StreamResponse:
    """Wait until the client or the proxy is gone, which cancels this."""
    await asyncio.Event().wait()
    raise AssertionError


@dataclass
class FaultProxy:
    """Runs from ``with`` to its end on a free port, in a thread of its own.

    ``plan`` may be replaced at any time; it judges the requests that come afterwards. An upstream that cannot be
    reached looks to the client like a connection that is reset.
    """

    upstream: str
    plan: Plan = no_fault
    recording: Recording | None = None
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    """What came to ``/generate``; a long test empties it."""
    injected: Counter[str] = field(default_factory=Counter)
    """How often each fault was met."""
    open_requests: int = 0
    most_open_samples: int = 0
    """Samples that the client waited for at a time."""
    _count: int = 0
    _open_samples: int = 0
    _port: int = 0
    _outages: set[asyncio.Task[None]] = field(default_factory=set)

    def __enter__(self) -> FaultProxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._thread.start()
        self._wait_for(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wait_for(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LIMIT)
        self._loop.close()

    def refuse(self) -> None:
        """Break every connection and refuse others until :meth:`listen`."""
        self._wait_for(self._refuse())

    def listen(self) -> None:
        self._wait_for(self._listen())

    def refuse_for(self, seconds: float) -> None:
        """The same for a while; for faults, which run in the proxy's thread."""

        async def outage() -> None:
            await self._refuse()
            await asyncio.sleep(seconds)
            await self._listen()

        # Two outages at a time would listen twice on one port.
        if not self._outages:
            task = asyncio.get_running_loop().create_task(outage())
            self._outages.add(task)
            task.add_done_callback(self._outages.discard)

    async def answer(self, request: web.Request, asked: Asked | None) -> Answer:
        """The server's answer to ``request``, through the recording where there is one."""
        if asked is None or self.recording is None:
            return await self._forward(request.method, request.path_qs, request.headers, await request.read())
        known, keys = self.recording.answers, [Recording.key(element) for element in asked.elements]
        for key, element in zip(keys, asked.elements, strict=True):
            if key in known:
                continue
            self.recording.misses += 1
            answer = await self._forward("POST", GENERATE, request.headers, json.dumps(element).encode())
            if answer.status != 200:
                return answer
            known.setdefault(key, json.loads(answer.body))
        answers = [known[key] for key in keys]
        return Answer.of(answers if asked.is_batch else answers[0])

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_LIMIT)

    async def _open(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        # Without a connection to be found dead, and no limit but the client's own.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await self._site.start()
        self._port = self._runner.addresses[-1][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def _refuse(self) -> None:
        await self._site.stop()
        assert self._runner.server is not None
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def _close(self) -> None:
        for task in list(self._outages):
            task.cancel()
        await asyncio.gather(*self._outages, return_exceptions=True)
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._respond(request)
        except aiohttp.ClientError:
            return await reset(request)

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path != GENERATE:
            answer = await self.answer(request, None)
            return web.Response(status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type})
        asked = Asked.parse(self._count, json.loads(body))
        self._count += 1
        self.asked.append(asked)
        exchange = Exchange(asked, request, self)
        fault = self.plan(asked)
        self.open_requests += 1
        self._open_samples += len(asked.elements)
        self.most_open_samples = max(self.most_open_samples, self._open_samples)
        try:
            if fault is None:
                return exchange.send(await exchange.answer())
            self.injected[fault.name] += 1
            return await fault.run(exchange)
        finally:
            self.open_requests -= 1
            self._open_samples -= len(asked.elements)

    async def _forward(self, method: str, path: str, headers: Any, body: bytes) -> Answer:
        kept = {name: headers[name] for name in ("Content-Type", "Authorization") if name in headers}
        async with self._session.request(method, self.upstream + path, data=body, headers=kept) as response:
            kind = response.headers.get("Content-Type", "application/json")
            return Answer(response.status, kind, await response.read())
