"""Samples that a function of the user's makes: agent loops, tools, several turns."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.rollout.engine import GenerateRequest, Generation, RolloutEngine, SamplingParams
from opd_megatron.sample import Sample
from opd_megatron.threads import Feed, stream_from_thread

CustomGenerate = Callable[[Sample, RolloutEngine, SamplingParams], "Sample | Awaitable[Sample]"]
"""What ``--custom-generate-function-path`` names."""


async def stream_custom(
    function: CustomGenerate,
    path: str,
    samples: Sequence[Sample],
    engine: RolloutEngine,
    sampling: SamplingParams,
    stream: tuple[int, ...],
) -> AsyncGenerator[Sample, None]:
    """Each sample as soon as ``function`` has made it; sample ``i`` draws from the random stream ``(*stream, i)``.

    Plain functions are called one after the other, ``async`` ones run concurrently, both in one thread beside the
    running event loop, with a loop of its own. Errors of the function propagate, and a sample that it leaves
    inconsistent is a ``RunError`` that names ``path``. Closing the iterator cancels what runs; a plain function is
    left to return.
    """

    def produce(feed: Feed[Sample]) -> None:
        async def make(sample: Sample) -> None:
            index, group_index = sample.index, sample.group_index
            if feed.closed:
                return
            answer: Any = function(sample, SampleEngine(engine, (*stream, index)), sampling)
            try:
                made = await answer if inspect.isawaitable(answer) else answer
            except asyncio.CancelledError:
                if feed.closed:
                    raise
                raise RunError(f"{path}, sample {index}: the generate function was cancelled from within") from None
            feed.put(_checked(made, index, group_index, path))

        async def make_all() -> None:
            task = asyncio.current_task()
            assert task is not None
            loop = asyncio.get_running_loop()
            feed.on_close(lambda: _if_open(loop, task.cancel))
            await asyncio.gather(*map(make, samples))

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(make_all())

    async with contextlib.aclosing(stream_from_thread(produce, name="custom generate", join=False)) as found:
        async for sample in found:
            yield sample


def _if_open(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


class SampleEngine:
    """The engine as a custom generate function sees it: every call draws from random streams of this sample.

    The stream of a request is (the sample's stream, number of the call, place in the call, the request's own seed),
    so that each turn of an agent loop is new and a resumed run repeats it. The weights cannot be changed through it.
    """

    def __init__(self, engine: RolloutEngine, stream: tuple[int, ...]) -> None:
        self._engine = engine
        self._stream = stream
        self._calls = 0

    @property
    def weight_version(self) -> str:
        return self._engine.weight_version

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As :meth:`RolloutEngine.generate`; it blocks the calling thread, and so all other ``async`` functions."""
        return self._engine.generate(self._own(requests))

    async def generate_async(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As :meth:`generate`, for ``async`` functions: others go on meanwhile."""
        by_place = dict([finished async for finished in self.stream(requests)])
        return [by_place[place] for place in range(len(requests))]

    def stream(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[tuple[int, Generation], None]:
        """As :meth:`RolloutEngine.stream`."""
        return self._engine.stream(self._own(requests))

    def _own(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        call, self._calls = self._calls, self._calls + 1
        return [
            GenerateRequest(request.prompt_tokens, request.sampling, (*self._stream, call, place, *request.seed))
            for place, request in enumerate(requests)
        ]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Refused: ``RuntimeError``."""
        raise RuntimeError("a generate function cannot change the engine's weights")

    def metrics(self) -> dict[str, float]:
        """None: they belong to the run."""
        return {}

    def rest(self) -> None:
        """Refused: ``RuntimeError``."""
        raise RuntimeError("a generate function cannot put the engine to rest")

    def close(self) -> None:
        """Refused: ``RuntimeError``."""
        raise RuntimeError("a generate function cannot close the engine")


def _checked(made: Any, index: int, group_index: int, path: str) -> Sample:
    """What a custom function returned, if it is this sample with a response that can be trained on.

    Raises ``RunError`` if not.
    """
    where = f"{path}, sample {index}"
    if not isinstance(made, Sample):
        raise RunError(f"{where}: returned a {type(made).__name__}, not a Sample")
    if (made.index, made.group_index) != (index, group_index):
        raise RunError(f"{where}: index or group_index was changed")
    try:
        made.validate()
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error
    if len(made.tokens) and made.tokens.min() < 0:
        raise RunError(f"{where}: negative token ids")
    if made.rollout_log_probs is not None and not np.isfinite(made.rollout_log_probs[made.loss_mask]).all():
        raise RunError(f"{where}: rollout_log_probs are not finite where loss_mask is 1")
    return made
