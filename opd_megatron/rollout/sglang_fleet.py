"""The servers of an engine: which is asked next, what weights each of them has, and what is done where one is gone."""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.http_client import HttpError
from opd_megatron.rollout.sglang_server import SGLangServer

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Restarts without a response between them that end the run."""


@dataclass(frozen=True, eq=False)
class SpokenModel:
    """The model that speaks: its ``folder`` with the config, tokenizer, sizes, and the tokens that end a response.

    ``dtype`` is that of its weights, a key of ``weight_check.TOLERANCES``.
    """

    folder: Path
    tokenizer: Any
    vocab_size: int
    positions: int
    end_token_ids: tuple[int, ...]
    dtype: str


class Weights(Protocol):
    """The newest weights, on their way to servers; those are given again to a server that began anew."""

    def take(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Keep these in place of those before."""

    async def load(self, server: SGLangServer, label: str) -> None:
        """Give them to ``server`` as version ``label``; nothing is generated meanwhile.

        Raises :class:`HttpError` where it cannot be reached, :class:`RunError` where it says that it has failed.
        """

    def remove(self) -> None:
        """Keep none."""


class Fleet:
    """``servers`` with the same weights, of which ``probe`` proves that they have arrived.

    A server that was started here and dies is started again; another one is left out and tried again with the next
    weights. All coroutines run in one event loop.
    """

    def __init__(
        self, servers: Sequence[SGLangServer], model: SpokenModel, weights: Weights, probe: np.ndarray
    ) -> None:
        self.servers = servers
        self.positions = model.positions
        """Tokens of prompt and response that all servers take, at most those of the model."""
        self.label = ""
        """What the servers call the weights that they have to have; another run's differ in any case."""
        self.restarts = 0
        self._model = model
        self._weights = weights
        self._probe = probe
        self._expected: np.ndarray | None = None
        self._version = ""
        self._restarts_in_a_row = 0
        # Ids have one length: the server aborts every request whose id begins with the one it is given.
        self._name = uuid.uuid4().hex[:12]
        self._numbers = itertools.count()

    def next_id(self) -> str:
        """The id of a request, which no other has."""
        return f"{self._name}-{next(self._numbers):012d}"

    def least_busy(self) -> SGLangServer:
        """The server to ask next; raises :class:`RunError` where none is left."""
        alive = [server for server in self.servers if not server.lost]
        if not alive:
            lost = "; ".join(f"{server.name}: {server.fault}" for server in self.servers)
            raise RunError(f"no server of the rollout engine is left: {lost}")
        return min(alive, key=lambda server: server.in_flight)

    def note_answer(self) -> None:
        """A server has given a response: what was started again works."""
        self._restarts_in_a_row = 0

    async def on_all(self, action: Callable[[SGLangServer], Coroutine[Any, Any, None]]) -> None:
        """Do ``action`` on all servers at once; the first fault is raised when all have ended."""
        results = await asyncio.gather(*(action(server) for server in self.servers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def wait_until_healthy(self) -> None:
        """Return when all servers can generate; raises :class:`UserError` where one is not there or does not fit."""
        await self.on_all(self._wait_for)

    async def load(self, version: str) -> None:
        """Give the newest weights to all servers; raises :class:`RunError` where that fails, or none is left."""
        self._expected, self._version = None, version
        self.label = f"{version}@{self._name}"
        await self.on_all(self._load)
        self.least_busy()

    async def prove(self, expected: np.ndarray) -> None:
        """Compare every server's log-probabilities of the probe with ``expected``, the trainer's.

        Raises :class:`RunError` with the numbers where they are those of other weights.
        """
        self._expected = expected
        await self.on_all(self._prove)

    async def rest(self) -> None:
        """Let the servers that are there give their memory back."""

        async def release(server: SGLangServer) -> None:
            if not server.lost:
                await server.release_memory()

        await self.on_all(release)

    async def close(self) -> None:
        await self.on_all(lambda server: server.close())

    async def mend(self, server: SGLangServer, epoch: int, fault: Exception) -> None:
        """Bring a server that gave no answer back, unless somebody did since ``epoch``; one that is not ours may go.

        Raises :class:`RunError` where nobody is left to ask.
        """
        async with server.lock:
            if server.epoch != epoch or server.lost:
                return
            logger.warning("%s", fault)
            if server.is_ours:
                if not await server.is_well():
                    await self._start_again(server)
                return
            try:
                await server.wait_until_healthy()
                if not await server.is_well():
                    self._leave_out(server, "it answers, but does not generate")
                elif (await server.model_info())["weight_version"] != self.label:
                    await self._load_and_prove(server)
                    server.epoch += 1
            except HttpError as error:
                self._leave_out(server, error)

    async def _wait_for(self, server: SGLangServer) -> None:
        try:
            await server.wait_until_healthy()
            usable = await server.usable_positions(self._model.folder)
        except HttpError as error:
            raise UserError(f"--rollout-engine-url: {error}: start the server, or correct the address") from error
        if usable < self.positions:
            logger.warning(
                "%s takes %d tokens of prompt and response, the model has %d positions: responses are cut there",
                server.name,
                usable,
                self.positions,
            )
            self.positions = usable

    async def _load(self, server: SGLangServer) -> None:
        try:
            await server.resume_memory()
            await self._weights.load(server, self.label)
        except HttpError as error:
            if server.lost:
                return  # still gone; it is tried again with the next weights
            if not error.transient:
                raise
            if not server.is_ours:
                self._leave_out(server, error)
                return
            if not server.has_ended:
                raise
            await self.mend(server, server.epoch, error)
        if server.lost:
            logger.info("%s answers again", server.name)
        server.lost = False

    async def _prove(self, server: SGLangServer) -> None:
        if server.lost:
            return
        epoch = server.epoch
        try:
            await self._compare(server)
        except HttpError as error:
            await self.mend(server, epoch, error)
            if server.epoch == epoch and not server.lost:  # it was well all the time
                await self._compare(server)

    async def _compare(self, server: SGLangServer) -> None:
        assert self._expected is not None
        scores = await server.score(self._probe, self.next_id(), self._model.vocab_size)
        server.check.compare(scores, self._expected, self._version, server.name)

    def _leave_out(self, server: SGLangServer, reason: HttpError | str) -> None:
        """Ask ``server`` no more before the next weights; raises :class:`RunError` where it was the last one."""
        server.lost = True
        server.fault = f"{reason.subject}: {reason.reason}" if isinstance(reason, HttpError) else reason
        logger.error("%s does not answer any more and is left out: %s", server.name, server.fault)
        self.least_busy()

    async def _start_again(self, server: SGLangServer) -> None:
        while True:
            self.restarts += 1
            self._restarts_in_a_row += 1
            if self._restarts_in_a_row > MAX_RESTARTS:
                raise RunError(f"{server.name} died {self._restarts_in_a_row} times in a row; read {server.log}")
            logger.warning("%s died and is started again; its output is in %s", server.name, server.log)
            await server.restart()
            try:
                await self._load_and_prove(server)
            except HttpError as error:  # it died over the weights
                logger.warning("%s", error)
                continue
            server.epoch += 1
            return

    async def _load_and_prove(self, server: SGLangServer) -> None:
        """Give a server that began anew the current weights; where the trainer has scored, it is proved again."""
        await self._weights.load(server, self.label)
        if self._expected is not None:
            await self._compare(server)
