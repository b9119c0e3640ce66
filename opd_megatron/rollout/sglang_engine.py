"""The student speaks through SGLang servers: requests spread over them, weights given to them with proof."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.http_client import HttpError
from opd_megatron.rollout.engine import GenerateRequest, Generation
from opd_megatron.rollout.sglang_answer import UnusableAnswerError, cut_at_stop, generate_body, read_response
from opd_megatron.rollout.sglang_server import Launch, SGLangServer
from opd_megatron.rollout.stop import StopStrings, TokenTexts
from opd_megatron.rollout.weight_check import TOLERANCES, WeightCheck
from opd_megatron.rollout.weight_folders import WeightFolders
from opd_megatron.sample import Status
from opd_megatron.threads import LoopThread

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ATTEMPTS = 5
"""How often a response is asked for before the run ends."""
MAX_RESTARTS = 3
"""Restarts without a response between them that end the run."""
_PAUSE = 0.5
"""Seconds before a response is asked for again, doubled each time."""


@dataclass(frozen=True, eq=False)
class SpokenModel:
    """The model that speaks: its ``folder`` with the config, tokenizer, sizes, and the tokens that end a response.

    ``dtype`` is that of its weights, a key of ``TOLERANCES``.
    """

    folder: Path
    tokenizer: Any
    vocab_size: int
    positions: int
    end_token_ids: tuple[int, ...]
    dtype: str


class SGLangEngine:
    """A :class:`~opd_megatron.rollout.engine.RolloutEngine` over SGLang servers.

    ``servers`` are functions that start one each, or addresses of servers that run already and serve this run alone.
    They start while the caller goes on; the first update of the weights waits for them. ``reference(tokens)`` are the
    trainer's log-probabilities of ``tokens[1:]`` at temperature 1: after each update they are compared with the
    servers' for ``probe`` (see ``weight_check``), and where they differ the engine says nothing any more. ``timeout``
    in seconds limits a response and an update. With ``free_memory`` the servers give their memory back in
    :meth:`rest`.

    Seeds of requests reach the server, which draws by them if it runs with ``--enable-deterministic-inference``.
    """

    def __init__(
        self,
        model: SpokenModel,
        servers: Sequence[Launch | str],
        folders: WeightFolders,
        *,
        probe: np.ndarray,
        reference: Callable[[np.ndarray], np.ndarray],
        timeout: float = 1800.0,
        max_in_flight: int = 256,
        free_memory: bool = False,
    ) -> None:
        self._model = model
        self._positions = model.positions
        self._folders = folders
        self._probe = probe
        self._reference = reference
        self._expected: np.ndarray | None = None
        self._free_memory = free_memory
        self._resting = False
        self._healthy = False
        # Ids have one length: the server aborts every request whose id begins with the one it is given.
        self._name = uuid.uuid4().hex[:12]
        self._numbers = itertools.count()
        self._weight_version = ""
        self._label = ""
        self._texts = TokenTexts(model.tokenizer, model.vocab_size)
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._seconds: dict[str, float] = {}
        self._restarts = 0
        self._restarts_in_a_row = 0
        self._slots = asyncio.Semaphore(max_in_flight * len(servers))
        self._thread: LoopThread | None = LoopThread("rollout engine")
        self._servers: list[SGLangServer] = []
        try:
            for server in servers:
                check = WeightCheck(TOLERANCES[model.dtype])
                where: dict[str, Any] = {"url": server} if isinstance(server, str) else {"launch": server}
                self._servers.append(SGLangServer(check, timeout, **where))
        except BaseException:
            self.close()
            raise

    @property
    def weight_version(self) -> str:
        return self._weight_version

    def addresses(self) -> list[str]:
        """Where the servers listen that have the newest weights."""
        return [server.address for server in self._servers if not server.lost]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Write the weights to disk, let every server load them, and prove that it speaks with them.

        Raises :class:`UserError` where a server does not come up in the first place, and :class:`RunError` where an
        update fails or its proof does; after that the engine refuses to speak until an update succeeds.
        """
        self._weight_version, self._expected = "", None
        began = time.perf_counter()
        self._folders.write(named_tensors)
        self._note("write", began)
        if not self._healthy:  # the time of the start is not that of an update
            self._run(self._on_all(self._wait_for))
            self._healthy = True
        began = time.perf_counter()
        self._label = f"{version}@{self._name}"
        self._run(self._on_all(self._load))
        self._resting = False
        self._note("load", began)
        began = time.perf_counter()
        self._expected = self._reference(self._probe)
        self._run(self._on_all(lambda server: self._prove(server, version)))
        self._note("probe", began)
        self._weight_version = version

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """One generation per request, in order; raises ``ValueError`` on an empty prompt or an unknown token id.

        Responses end early where prompt and response fill the model's positions; a prompt that leaves no room gives
        an empty response with ``PROMPT_TOO_LONG``. A server of ours that dies is started again and the responses that
        it owed are asked for again. Raises :class:`RunError` where that does not help.
        """
        self._check_ready()
        results: dict[int, Generation] = {}
        self._run(self._ask_all(requests, results.__setitem__))
        return [results[place] for place in range(len(requests))]

    async def stream(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[tuple[int, Generation], None]:
        """As :meth:`generate`: place and generation, in the order in which they are complete.

        Leaving the iterator (closing it, or cancelling the task that reads it) aborts what is left.
        """
        self._check_ready()
        assert self._thread is not None
        loop = asyncio.get_running_loop()
        finished: asyncio.Queue[tuple[int, Generation] | None] = asyncio.Queue()
        ended = asyncio.Event()

        def deliver(place: int, generation: Generation) -> None:
            loop.call_soon_threadsafe(finished.put_nowait, (place, generation))

        async def work() -> None:
            try:
                await self._ask_all(requests, deliver)
            finally:
                loop.call_soon_threadsafe(finished.put_nowait, None)
                loop.call_soon_threadsafe(ended.set)

        future = self._thread.submit(work())
        try:
            while (item := await finished.get()) is not None:
                yield item
            await asyncio.wrap_future(future)
        finally:
            future.cancel()
            await ended.wait()

    def metrics(self) -> dict[str, float]:
        """Seconds of the updates since the last call, by part, and the restarts of the whole run."""
        found = {f"perf/weight_{part}_seconds": seconds for part, seconds in self._seconds.items()}
        if found:
            found["perf/weight_update_seconds"] = sum(self._seconds.values())
        self._seconds = {}
        return found | {"rollout/engine_restarts": float(self._restarts)}

    def rest(self) -> None:
        """Give memory back until the next update of the weights, if the engine was made to."""
        if self._free_memory and not self._resting:
            self._weight_version = ""
            self._run(self._on_all(lambda server: server.release_memory()))
            self._resting = True

    def close(self) -> None:
        """Abort what is under way, end the servers that were started here and remove the weights on disk."""
        thread, self._thread, self._weight_version = self._thread, None, ""
        if thread is None:
            return
        try:
            thread.run(self._on_all(lambda server: server.close()))
        finally:
            thread.close()
            self._folders.remove()

    def _check_ready(self) -> None:
        if self._thread is None:
            raise RuntimeError("the engine is closed")
        if not self._weight_version:
            raise RuntimeError("the engine has no weights: update_weights has not succeeded yet")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._thread is None:
            work.close()
            raise RuntimeError("the engine is closed")
        return self._thread.run(work)

    def _note(self, part: str, began: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began

    async def _on_all(self, action: Callable[[SGLangServer], Coroutine[Any, Any, None]]) -> None:
        """Do ``action`` on all servers at once; the first fault is raised when all have ended."""
        results = await asyncio.gather(*(action(server) for server in self._servers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _wait_for(self, server: SGLangServer) -> None:
        try:
            await server.wait_until_healthy()
            usable = await server.usable_positions(self._model.folder)
        except HttpError as error:
            raise UserError(f"--rollout-engine-url: {error}: start the server, or correct the address") from error
        if usable < self._positions:
            logger.warning(
                "%s takes %d tokens of prompt and response, the model has %d positions: responses are cut there",
                server.name,
                usable,
                self._positions,
            )
            self._positions = usable

    async def _load(self, server: SGLangServer) -> None:
        assert self._folders.newest is not None
        if self._resting:
            await server.resume_memory()
        try:
            await server.load(self._folders.newest, self._label)
        except HttpError as error:
            if server.lost:
                return  # still gone; it is tried again with the next weights
            if not server.is_ours:
                server.lost = True
                logger.error("%s does not answer any more and is left out: %s", server.name, error)
                self._least_busy()
                return
            if not server.has_ended:
                raise
            await self._mend(server, server.epoch, error)
        server.lost = False

    async def _prove(self, server: SGLangServer, version: str) -> None:
        assert self._expected is not None
        if server.lost:
            return
        scores = await server.score(self._probe, self._next_id(), self._model.vocab_size)
        server.check.compare(scores, self._expected, version, server.name)

    def _next_id(self) -> str:
        return f"{self._name}-{next(self._numbers):012d}"

    async def _ask_all(self, requests: Sequence[GenerateRequest], report: Callable[[int, Generation], None]) -> None:
        """Report every request's generation when it is there; a failure, or being cancelled, aborts the others."""
        prompts = self._check_prompts(requests)
        tasks = []
        for place, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            room = self._positions - len(prompt)
            if room < 1:
                empty = np.zeros(0, np.int64), np.zeros(0, np.float32)
                report(place, Generation(*empty, "", Status.PROMPT_TOO_LONG, self._weight_version))
                continue
            limit = min(request.sampling.max_new_tokens, room)
            tasks.append(asyncio.create_task(self._ask(place, request, prompt, limit)))
        try:
            for task in asyncio.as_completed(tasks):
                report(*await task)
        finally:
            for left in tasks:
                left.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _check_prompts(self, requests: Sequence[GenerateRequest]) -> list[np.ndarray]:
        """The prompts as int64 arrays. An empty one, or an id that is not in the vocabulary, would end the server."""
        prompts = [np.ascontiguousarray(request.prompt_tokens, dtype=np.int64).reshape(-1) for request in requests]
        for place, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"request {place}: the prompt has no tokens")
            if prompt.min() < 0 or prompt.max() >= self._model.vocab_size:
                raise ValueError(f"request {place}: the prompt has token ids outside 0..{self._model.vocab_size - 1}")
        return prompts

    async def _ask(
        self, place: int, request: GenerateRequest, prompt: np.ndarray, limit: int
    ) -> tuple[int, Generation]:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            async with self._slots:
                server = self._least_busy()
                epoch = server.epoch
                try:
                    body = generate_body(request, prompt, self._next_id(), limit, self._model.end_token_ids)
                    generation = self._read(await server.generate(body), request, limit, server)
                    self._restarts_in_a_row = 0
                    return place, generation
                except (HttpError, UnusableAnswerError) as error:
                    if attempt == MAX_ATTEMPTS or (isinstance(error, HttpError) and not error.transient):
                        raise RunError(f"a response was asked for {attempt} times: {error}") from error
                    fault = error
            await self._mend(server, epoch, fault)
            await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _least_busy(self) -> SGLangServer:
        alive = [server for server in self._servers if not server.lost]
        if not alive:
            raise RunError("no server of the rollout engine is left: " + ", ".join(s.name for s in self._servers))
        return min(alive, key=lambda server: server.in_flight)

    def _read(self, answer: Any, request: GenerateRequest, limit: int, server: SGLangServer) -> Generation:
        tokens, log_probs, finish = read_response(
            answer, limit=limit, vocab_size=self._model.vocab_size, server=server.name
        )
        label = answer["meta_info"].get("weight_version")
        if label != self._label:
            raise RunError(
                f"{server.name}: it speaks with weights {label!r}, this run gave it {self._label!r}: does something "
                "else update it?"
            )
        if request.sampling.stop:
            end = cut_at_stop(tokens, self._stop_strings(request.sampling.stop))
            if end is not None:
                tokens, log_probs, finish = tokens[:end], log_probs[:end], Status.COMPLETED
        text = self._model.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(tokens, log_probs, text, finish, self._weight_version)

    def _stop_strings(self, stop: tuple[str, ...]) -> StopStrings:
        if stop not in self._stops:
            self._stops[stop] = StopStrings(self._texts, stop)
        return self._stops[stop]

    async def _mend(self, server: SGLangServer, epoch: int, fault: Exception) -> None:
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
                info = await server.model_info()
            except HttpError as error:
                server.lost = True
                logger.error("%s does not answer any more and is left out: %s", server.name, error)
                self._least_busy()
                return
            if info["weight_version"] != self._label:
                await self._load_and_prove(server)
                server.epoch += 1

    async def _start_again(self, server: SGLangServer) -> None:
        self._restarts += 1
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > MAX_RESTARTS:
            raise RunError(f"{server.name} died {self._restarts_in_a_row} times in a row; read {server.log}")
        logger.warning("%s died and is started again; its output is in %s", server.name, server.log)
        await server.restart()
        await self._load_and_prove(server)
        server.epoch += 1

    async def _load_and_prove(self, server: SGLangServer) -> None:
        """Give a server that began anew the current weights; where the trainer has scored, it is proved again."""
        assert self._folders.newest is not None
        await server.load(self._folders.newest, self._label)
        if self._expected is not None:
            await self._prove(server, self._label.partition("@")[0])
