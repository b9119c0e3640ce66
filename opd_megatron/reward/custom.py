"""Rewards by import path: ``package.module:function``."""

from __future__ import annotations

import asyncio
import collections.abc
import inspect
import typing
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, cast

from opd_megatron.config.errors import UserError
from opd_megatron.reward.base import PerSample, RewardError, name_sample
from opd_megatron.sample import Sample
from opd_megatron.threads import CallingThreads, LoopThread


def takes_batch(function: Callable[..., Any]) -> bool:
    """Whether a reward function wants all samples at once.

    It does if its first parameter is called ``samples`` or is annotated as a collection (``list[Sample]``,
    ``Sequence``, ...); otherwise it gets one sample. Raises :class:`UserError` if it has no such parameter.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise UserError(f"the reward function {function!r} takes no sample: its first argument is a sample or samples")
    first = parameters[0]
    if first.name == "samples" or first.kind is inspect.Parameter.VAR_POSITIONAL:
        return first.name == "samples"
    annotation = first.annotation
    if isinstance(annotation, str):
        head = annotation.split("[")[0].rsplit(".", 1)[-1].strip()
        return head in {"list", "List", "tuple", "Tuple", "Sequence", "Iterable", "Collection"}
    origin = typing.get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, collections.abc.Iterable)


class CustomRater:
    """A user's function as a rater: plain or ``async``, of one sample or of a batch (see :func:`takes_batch`).

    An ``async`` function of one sample runs for all samples concurrently; how many requests it keeps in flight is its
    own business. One event loop serves all calls, so that a client made in one lives on in the next. In a training run
    a batch is the samples of one prompt, and a plain function is called in a thread, one call at a time. A batch
    function that raises fails every sample of the batch; one that returns another number of rewards than it got samples
    stops the run under any policy.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.takes_groups = takes_batch(function)
        call = getattr(function, "__call__", None)  # noqa: B004 - an object may have an async __call__
        self._concurrent = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        self._threads = CallingThreads(1, "reward")

    @cached_property
    def _loop(self) -> LoopThread:
        return LoopThread("reward loop")

    def rate(self, samples: Sequence[Sample]) -> Iterable[float | Exception]:
        if not samples:
            return []
        if self.takes_groups:
            return self._rate_batch(samples)
        if self._concurrent:
            return self._loop.run(_gather(self._function, samples))
        return PerSample(self._rate_one).rate(samples)

    async def rate_async(self, samples: Sequence[Sample]) -> Iterable[float | Exception]:
        if not self._concurrent:
            return cast("list[float | Exception]", await self._threads.call(lambda: list(self.rate(samples))))
        if not self.takes_groups:
            return await self._loop.call(_gather(self._function, samples))
        try:
            rewards = await self._loop.call(_await(self._function(list(samples))))
        except UserError:
            raise
        except Exception as error:
            return [error] * len(samples)
        return _one_each(rewards, samples)

    def close(self) -> None:
        self._threads.close()
        if "_loop" in self.__dict__:
            self._loop.close()

    def _rate_one(self, sample: Sample) -> float:
        return cast(float, self._finish(self._function(sample)))

    def _rate_batch(self, samples: Sequence[Sample]) -> list[float | Exception]:
        try:
            rewards = self._finish(self._function(list(samples)))
        except UserError:
            raise
        except Exception as error:
            return [error] * len(samples)
        return _one_each(rewards, samples)

    def _finish(self, result: Any) -> Any:
        return self._loop.run(_await(result)) if inspect.isawaitable(result) else result


def _one_each(rewards: Any, samples: Sequence[Sample]) -> list[float | Exception]:
    """What a batch function returned, as a list; raises :class:`RewardError` unless it is one reward per sample."""
    try:
        values = list(rewards)
    except TypeError:
        raise RewardError(f"the batch reward function returned {rewards!r}, not one reward per sample") from None
    if len(values) != len(samples):
        raise RewardError(
            f"the batch reward function returned {len(values)} rewards for {len(samples)} samples "
            f"(the first is {name_sample(samples[0])})"
        )
    return values


async def _await(value: Awaitable[Any]) -> Any:
    """What it gives; that something in it was cancelled, and not this task, is an error like any other."""
    try:
        return await value
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("the reward function was cancelled from within") from None


async def _gather(function: Callable[..., Any], samples: Sequence[Sample]) -> list[float | Exception]:
    async def rate(sample: Sample) -> float | Exception:
        try:
            return cast(float, await _await(function(sample)))
        except UserError:
            raise
        except Exception as error:
            return error

    return await asyncio.gather(*(rate(sample) for sample in samples))
