"""Questions and servers of one teacher, where something happens that nobody foresaw."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from opd_megatron.http_client import HttpClient, HttpError, HttpFault, RetryPolicy
from opd_megatron.teacher.gathering import Gatherer, Question
from opd_megatron.teacher.in_flight import AdaptiveLimit
from opd_megatron.teacher.replicas import Replica, Replicas
from tests.teacher.scripted_server import ScriptedServer, reply

POLICY = RetryPolicy(2, 0.001)


async def believed(replica: Replica) -> None:
    """A proof that holds."""


def replicas_of(url: str, prove: Callable[[Replica], Any] = believed, *, proven: bool = True) -> Replicas:
    return Replicas([Replica(HttpClient(url, timeout=5.0), AdaptiveLimit(4), proven=proven)], POLICY, prove)


@pytest.mark.parametrize("count", [1, 3])
def test_whoever_waits_hears_of_a_fault_that_nobody_foresaw(count: int) -> None:
    """Else a call would never return, and the run with it."""
    server = ScriptedServer(reply(200, {} if count == 1 else [{}] * 3))

    def read(question: Question, answer: Any, replica: Replica) -> Any:
        raise ZeroDivisionError("a bug")

    async def ask() -> list[Any]:
        gatherer = Gatherer(replicas_of(server.url), read, 0, Counter())
        questions = [Question(f"sample {place}", np.arange(4), 1) for place in range(count)]
        try:
            async with asyncio.timeout(20):
                return await asyncio.gather(*map(gatherer.ask, questions), return_exceptions=True)
        finally:
            await gatherer.aclose()

    try:
        outcomes = asyncio.run(ask())
    finally:
        server.close()
    assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError] * count


def test_a_server_that_never_proves_itself_is_dead_after_the_retries_of_one() -> None:
    """The known text before a sample is not that sample's fault, however often it is the same one that waits."""

    async def prove(replica: Replica) -> None:
        raise HttpError("server", "known text", "no answer", HttpFault.TIMEOUT, transient=True, delivered=True)

    async def wait() -> None:
        replicas = replicas_of("http://127.0.0.1:9", prove, proven=False)
        async with asyncio.timeout(20):
            for _ in range(POLICY.max_retries + 1):
                replica = await replicas.acquire_again(1)
                with pytest.raises(HttpError):
                    await replicas.ask(replica, 1, 4, {}, "sample 0")
            with pytest.raises(HttpError, match=r"no answer \(3 attempts\)"):
                await replicas.acquire(1)

    asyncio.run(wait())
