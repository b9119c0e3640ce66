"""The student speaks through SGLang servers: requests spread over them, weights given to them with proof."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.http_client import HttpError
from opd_megatron.rollout.engine import GenerateRequest, Generation
from opd_megatron.rollout.sglang_answer import UnusableAnswerError, cut_at_stop, generate_body, read_response
from opd_megatron.rollout.sglang_fleet import Fleet, SpokenModel, Weights
from opd_megatron.rollout.sglang_server import Launch, SGLangServer
from opd_megatron.rollout.stop import StopStrings, TokenTexts
from opd_megatron.rollout.weight_check import TOLERANCES, WeightCheck
from opd_megatron.sample import Status
from opd_megatron.threads import LoopThread

T = TypeVar("T")

MAX_ATTEMPTS = 5
"""How often a response is asked for before the run ends."""
UNNAMED = "default"
"""What SGLang calls the weights that a server begins with."""
_PAUSE = 0.5
"""Seconds before a response is asked for again, doubled each time."""


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
        weights: Weights,
        *,
        probe: np.ndarray,
        reference: Callable[[np.ndarray], np.ndarray],
        timeout: float = 1800.0,
        max_in_flight: int = 256,
        free_memory: bool = False,
        api_key_env: str | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._probe = probe
        self._reference = reference
        self._free_memory = free_memory
        self._resting = False
        self._healthy = False
        self._weight_version = ""
        self._texts = TokenTexts(model.tokenizer, model.vocab_size)
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._seconds: dict[str, float] = {}
        self._slots = asyncio.Semaphore(max_in_flight * len(servers))
        self._thread: LoopThread | None = LoopThread("rollout engine")
        started: list[SGLangServer] = []
        self._fleet = Fleet(started, model, weights, probe)
        try:
            for server in servers:
                check = WeightCheck(TOLERANCES[model.dtype])
                where: dict[str, Any] = {"launch": server}
                if isinstance(server, str):
                    where = {"url": server, "api_key_env": api_key_env}
                started.append(SGLangServer(check, timeout, **where))
        except BaseException:
            self.close()
            raise

    @property
    def weight_version(self) -> str:
        return self._weight_version

    def addresses(self) -> list[str]:
        """Where the servers listen that have the newest weights."""
        return [server.address for server in self._fleet.servers if not server.lost]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Take the weights, let every server load them, and prove that it speaks with them.

        Raises :class:`UserError` where a server does not come up in the first place, and :class:`RunError` where an
        update fails or its proof does; after that the engine refuses to speak until an update succeeds.
        """
        self._weight_version = ""
        began = time.perf_counter()
        self._weights.take(named_tensors)
        self._note("write", began)
        if not self._healthy:  # the time of the start is not that of an update
            self._run(self._fleet.wait_until_healthy())
            self._healthy = True
        began = time.perf_counter()
        self._run(self._fleet.load(version))
        self._resting = False
        self._note("load", began)
        began = time.perf_counter()
        self._run(self._fleet.prove(self._reference(self._probe)))
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
        return found | {"rollout/engine_restarts": float(self._fleet.restarts)}

    def rest(self) -> None:
        """Give memory back until the next update of the weights, if the engine was made to."""
        if self._free_memory and not self._resting:
            self._weight_version = ""
            self._run(self._fleet.rest())
            self._resting = True

    def close(self) -> None:
        """Abort what is under way, end the servers that were started here and forget the weights."""
        thread, self._thread, self._weight_version = self._thread, None, ""
        if thread is None:
            return
        try:
            thread.run(self._fleet.close())
        finally:
            thread.close()
            self._weights.remove()

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

    async def _ask_all(self, requests: Sequence[GenerateRequest], report: Callable[[int, Generation], None]) -> None:
        """Report every request's generation when it is there; a failure, or being cancelled, aborts the others."""
        prompts = self._check_prompts(requests)
        tasks = []
        for place, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            room = self._fleet.positions - len(prompt)
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
                server = self._fleet.least_busy()
                epoch = server.epoch
                try:
                    body = generate_body(request, prompt, self._fleet.next_id(), limit, self._model.end_token_ids)
                    generation = self._read(await server.generate(body), request, limit, server)
                    self._fleet.note_answer()
                    return place, generation
                except (HttpError, UnusableAnswerError) as error:
                    if attempt == MAX_ATTEMPTS or (isinstance(error, HttpError) and not error.transient):
                        raise RunError(f"a response was asked for {attempt} times: {error}") from error
                    fault = error
            await self._fleet.mend(server, epoch, fault)
            await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _read(self, answer: Any, request: GenerateRequest, limit: int, server: SGLangServer) -> Generation:
        tokens, log_probs, finish = read_response(
            answer, limit=limit, vocab_size=self._model.vocab_size, server=server.name
        )
        versions = self._versions(answer["meta_info"], server.name)
        if request.sampling.stop:
            end = cut_at_stop(tokens, self._stop_strings(request.sampling.stop))
            if end is not None:
                tokens, log_probs, finish = tokens[:end], log_probs[:end], Status.COMPLETED
        text = self._model.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(tokens, log_probs, text, finish, self._weight_version, versions if len(versions) > 1 else ())

    def _versions(self, meta: dict[str, Any], server: str) -> tuple[str, ...]:
        """Those that made a response, in order.

        Raises :class:`UnusableAnswerError` where the server has not been given any, :class:`RunError` where those that
        it was given are not this run's.
        """
        spans = meta.get("weight_versions")
        labels = [span.get("version") for span in spans] if spans else []
        own = "@" + self._fleet.label.partition("@")[2]
        for label in [*labels, meta.get("weight_version")]:
            if label == UNNAMED:
                raise UnusableAnswerError(f"{server} began anew: it speaks with the weights that it was started with")
            if not str(label).endswith(own):
                raise RunError(
                    f"{server}: it speaks with weights {label!r}, this run gave it {self._fleet.label!r}: "
                    "does something else update it?"
                )
        if meta.get("weight_version") != self._fleet.label:
            raise RunError(
                f"{server}: it speaks with weights {meta.get('weight_version')!r}, "
                f"this run gave it {self._fleet.label!r}: it has lost an update"
            )
        return tuple(str(label).removesuffix(own) for label in labels)

    def _stop_strings(self, stop: tuple[str, ...]) -> StopStrings:
        if stop not in self._stops:
            self._stops[stop] = StopStrings(self._texts, stop)
        return self._stops[stop]
