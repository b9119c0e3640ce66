"""What can go wrong with a request to the server: of the connection, of the status, and within the answer.

A fault within an answer changes one sample's part of it, the rest stays as the server said it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiohttp import web

from tests.sglang.proxy import Answer, Asked, Exchange, Fault

Change = Callable[[dict[str, Any]], None]
"""Changes the ``meta_info`` of one sample's answer."""


def refused(seconds: float = 0.2) -> Fault:
    """The server is gone for a while: connections break and others are refused."""

    async def run(exchange: Exchange) -> web.StreamResponse:
        exchange.proxy.refuse_for(seconds)
        return await exchange.never()

    return Fault("refused", run)


async def _reset(exchange: Exchange) -> web.StreamResponse:
    return await exchange.reset()


async def _reset_midway(exchange: Exchange) -> web.StreamResponse:
    await exchange.send_half(await exchange.answer())
    return await exchange.reset()


async def _closed_midway(exchange: Exchange) -> web.StreamResponse:
    await exchange.send_half(await exchange.answer())
    return await exchange.hang_up()


async def _silent(exchange: Exchange) -> web.StreamResponse:
    return await exchange.never()


async def _silent_midway(exchange: Exchange) -> web.StreamResponse:
    await exchange.send_half(await exchange.answer())
    return await exchange.never()


async def _cut(exchange: Exchange) -> web.StreamResponse:
    answer = await exchange.answer()
    return exchange.send(Answer(answer.status, answer.content_type, answer.body[: 2 * len(answer.body) // 3]))


RESET = Fault("reset", _reset)
RESET_MIDWAY = Fault("reset midway", _reset_midway)
CLOSED_MIDWAY = Fault("closed midway", _closed_midway)
CUT = Fault("truncated JSON", _cut)
SILENT = Fault("slower than the time limit", _silent)
SILENT_MIDWAY = Fault("silent midway", _silent_midway)


def status(code: int, body: Any, name: str = "", **headers: str) -> Fault:
    """An answer without the server: bytes as plain text, anything else as JSON."""
    answer = Answer(code, "text/plain", body) if isinstance(body, bytes) else Answer.of(body, code)

    async def run(exchange: Exchange) -> web.StreamResponse:
        return exchange.send(answer, **headers)

    return Fault(name or f"HTTP {code}", run)


ERROR_FORMS = [
    status(500, {"error": {"message": "kaput"}}, "500, nested error"),
    status(500, {"error": "kaput"}, "500, error"),
    status(500, {"object": "error", "message": "kaput", "code": 500}, "500, object"),
    status(500, b"kaput", "500, text"),
]
UNAVAILABLE = status(503, b"try later", **{"Retry-After": "0.1"})
BUSY = status(429, {"error": "too many"}, "429")
BUSY_FOR_A_WHILE = status(429, {"error": "too many"}, "429 with Retry-After", **{"Retry-After": "0.2"})


@dataclass(frozen=True)
class Altered(Fault):
    """A fault within the answer, which :func:`only_for` can aim at certain samples."""

    change: Change


def altered(name: str, change: Change) -> Altered:
    """The server's answer with ``change`` made in one sample of it, another one in each request."""

    def choose(asked: Asked) -> list[int]:
        return [asked.number % len(asked.elements)]

    return Altered(name, _altering(change, choose), change)


def only_for(fault: Altered, matches: Callable[[dict[str, Any]], bool]) -> Altered:
    """``fault`` in the samples for which ``matches`` their payload, and nothing else."""

    def choose(asked: Asked) -> list[int]:
        return [index for index, element in enumerate(asked.elements) if matches(element)]

    return Altered(fault.name, _altering(fault.change, choose), fault.change)


def _altering(change: Change, choose: Callable[[Asked], list[int]]) -> Callable[[Exchange], Any]:
    async def run(exchange: Exchange) -> web.StreamResponse:
        asked, answer = exchange.asked, await exchange.answer()
        if answer.status != 200:
            return exchange.send(answer)
        body = json.loads(answer.body)
        parts = body if asked.is_batch else [body]
        for index in choose(asked):
            change(parts[index]["meta_info"])
        return exchange.send(Answer.of(body))

    return run


def rearranged(name: str, change: Callable[[list[Any]], Any]) -> Fault:
    """The answer to a batch with its list changed; an answer that is no list becomes what ``change`` makes of [it]."""

    async def run(exchange: Exchange) -> web.StreamResponse:
        answer = await exchange.answer()
        body = json.loads(answer.body)
        return exchange.send(Answer.of(change(body if isinstance(body, list) else [body])))

    return Fault(name, run)


def entry(column: int, value: Any) -> Change:
    """Another log-probability (column 0) or id (column 1) in the middle of a sample."""

    def change(meta: dict[str, Any]) -> None:
        entries = meta["input_token_logprobs"]
        entries[max(1, len(entries) // 2)][column] = value

    return change


def _other_id(meta: dict[str, Any]) -> None:
    entries = meta["input_token_logprobs"]
    entries[-1][1] += -1 if entries[-1][1] > 1 else 1


def _other_first_id(meta: dict[str, Any]) -> None:
    entries = meta["input_token_logprobs"]
    entries[0][1] += -1 if entries[0][1] > 1 else 1


def _shorter(meta: dict[str, Any]) -> None:
    meta["input_token_logprobs"].pop()


def _longer(meta: dict[str, Any]) -> None:
    meta["input_token_logprobs"].append(meta["input_token_logprobs"][-1])


def _aborted(meta: dict[str, Any]) -> None:
    meta["finish_reason"] = {"type": "abort", "message": "out of memory"}


def _other_version(meta: dict[str, Any]) -> None:
    meta["weight_version"] = "another"


OTHER_ID = altered("other id", _other_id)
OTHER_FIRST_ID = altered("other id of the prompt", _other_first_id)
SHORTER = altered("token missing", _shorter)
LONGER = altered("token too many", _longer)
NAN = altered("NaN", entry(0, float("nan")))
INFINITE = altered("-Infinity", entry(0, float("-inf")))
POSITIVE = altered("positive", entry(0, 0.5))
NULL = altered("null", entry(0, None))
TEXT = altered("text", entry(0, "-1.0"))
ABORTED = altered("aborted", _aborted)
OTHER_VERSION = altered("weight version", _other_version)
SWAPPED = rearranged("samples in another order", lambda parts: parts[::-1] if len(parts) > 1 else parts * 2)
LOST = rearranged("sample missing", lambda parts: parts[:-1])


class TopK:
    """The top-k lists of one sample's answer in whichever form the client asked for, as arrays ``[T, K]``."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self._meta = meta
        self._nested = meta.get("input_top_logprobs")
        if self._nested is not None:
            rows = [row for row in self._nested if row is not None]
            self.log_probs_TK = np.array([[item[0] for item in row] for row in rows])
            self.ids_TK = np.array([[item[1] for item in row] for row in rows])
            return
        shape = meta["input_top_logprobs_shape"]
        self.log_probs_TK = self._flat("val", np.float32).reshape(shape)
        self.ids_TK = self._flat("idx", np.int32).reshape(shape)

    def _flat(self, name: str, dtype: type) -> np.ndarray:
        key = f"input_top_logprobs_{name}_flat"
        if key in self._meta:
            return np.array(self._meta[key])
        return np.frombuffer(base64.b64decode(self._meta[key + "_b64"]), dtype).copy()

    def write(self) -> None:
        """Put the arrays back into the answer."""
        if self._nested is not None:
            rows = iter(zip(self.log_probs_TK.tolist(), self.ids_TK.tolist(), strict=True))
            for place, row in enumerate(self._nested):
                if row is not None:
                    values, ids = next(rows)
                    self._nested[place] = [[value, token, None] for value, token in zip(values, ids, strict=True)]
            return
        self._meta["input_top_logprobs_shape"] = list(self.ids_TK.shape)
        for name, array, dtype in (("val", self.log_probs_TK, np.float32), ("idx", self.ids_TK, np.int32)):
            key = f"input_top_logprobs_{name}_flat"
            if key in self._meta:
                self._meta[key] = array.reshape(-1).tolist()
            else:
                self._meta[key + "_b64"] = base64.b64encode(array.astype(dtype).tobytes()).decode()


def _top_k(name: str, change: Callable[[TopK], None]) -> Altered:
    def change_meta(meta: dict[str, Any]) -> None:
        top = TopK(meta)
        change(top)
        top.write()

    return altered(name, change_meta)


def _disorder(top: TopK) -> None:
    for array in (top.log_probs_TK, top.ids_TK):
        array[-1, [0, 1]] = array[-1, [1, 0]]


def _overfill(top: TopK) -> None:
    top.log_probs_TK[-1] = -0.1


def _repeat_an_id(top: TopK) -> None:
    top.ids_TK[-1, 1] = top.ids_TK[-1, 0]


def _make_nan(top: TopK) -> None:
    top.log_probs_TK[-1, 1] = float("nan")


def _leave_the_vocabulary(top: TopK) -> None:
    top.ids_TK[-1, 1] = 1 << 24


def _lose_a_row(top: TopK) -> None:
    top.log_probs_TK, top.ids_TK = top.log_probs_TK[:-1], top.ids_TK[:-1]
    if top._nested is not None:
        top._nested.pop()


TOP_K_FAULTS = [
    _top_k("top-k out of order", _disorder),
    _top_k("top-k mass above 1", _overfill),
    _top_k("top-k id twice", _repeat_an_id),
    _top_k("top-k NaN", _make_nan),
    _top_k("top-k id outside the vocabulary", _leave_the_vocabulary),
    _top_k("top-k row missing", _lose_a_row),
]
