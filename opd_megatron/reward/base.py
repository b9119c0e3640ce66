"""What a reward is, and what happens when one raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.sample import LARGEST_REWARD, Sample

PROMPT_HEAD = 60
"""Characters of a prompt that an error message quotes."""


class RewardError(RunError):
    """A reward could not be computed; the message names the sample."""


class RewardFunction(Protocol):
    """Gives samples their task reward."""

    @property
    def takes_groups(self) -> bool:
        """Whether all samples of a prompt are to be scored together; else each can be as soon as it is finished."""

    def score(self, samples: Sequence[Sample]) -> None:
        """Fill ``reward`` of every sample, and ``reward_error`` of those whose reward could not be computed."""

    async def score_async(self, samples: Sequence[Sample]) -> None:
        """As :meth:`score`, without blocking the running event loop; several calls may run at the same time."""

    def close(self) -> None:
        """End worker processes; safe to repeat."""


class Rater(Protocol):
    """Computes raw rewards: one outcome per sample, in order, an exception standing for the sample it belongs to."""

    takes_groups: bool

    def rate(self, samples: Sequence[Sample]) -> Iterable[float | Exception]: ...

    async def rate_async(self, samples: Sequence[Sample]) -> Iterable[float | Exception]: ...

    def close(self) -> None: ...


class Unjudged(Exception):
    """A response that its verifier could not judge within its limits. It counts as wrong and is no reason to stop."""


class PerSample:
    """A rater made of a plain function of one sample that is quick enough to be called inside an event loop."""

    takes_groups = False

    def __init__(self, function: Callable[[Sample], float]) -> None:
        self._function = function

    def rate(self, samples: Sequence[Sample]) -> Iterator[float | Exception]:
        for sample in samples:
            try:
                outcome: float | Exception = self._function(sample)
            except UserError:
                raise
            except Exception as error:
                outcome = error
            yield outcome

    async def rate_async(self, samples: Sequence[Sample]) -> Iterator[float | Exception]:
        return self.rate(samples)

    def close(self) -> None:
        """Nothing to end."""


class CheckedReward:
    """The :class:`RewardFunction` around a rater: checks its values and applies the policy on errors.

    ``on_error`` is ``"stop"`` (raise :class:`RewardError` for the first sample that failed) or ``"value"`` (record the
    error in ``reward_error`` and give ``error_value``). A value that is not a finite number is an error as well.
    :class:`UserError` always passes through. A response that is :class:`Unjudged` gets 0 under either policy, with
    ``reward_error`` set: what a model writes must not be able to stop a run.
    """

    def __init__(self, rater: Rater, on_error: str, error_value: float) -> None:
        if on_error not in ("stop", "value"):
            raise ValueError(f"on_error is {on_error!r}, not stop or value")
        self._rater = rater
        self._on_error = on_error
        self._error_value = error_value

    @property
    def takes_groups(self) -> bool:
        return self._rater.takes_groups

    def score(self, samples: Sequence[Sample]) -> None:
        self._apply(samples, self._rater.rate(samples))

    async def score_async(self, samples: Sequence[Sample]) -> None:
        self._apply(samples, await self._rater.rate_async(samples))

    def close(self) -> None:
        self._rater.close()

    def _apply(self, samples: Sequence[Sample], outcomes: Iterable[float | Exception]) -> None:
        for sample, outcome in zip(samples, outcomes, strict=True):
            error = outcome if isinstance(outcome, Exception) else _value_error(outcome)
            sample.reward_error = None if error is None else describe(error)
            if error is None:
                sample.reward = float(outcome)  # type: ignore[arg-type]
            elif isinstance(error, Unjudged):
                sample.reward = 0.0
            elif self._on_error == "stop":
                raise RewardError(f"the reward of {name_sample(sample)} failed: {sample.reward_error}") from error
            else:
                sample.reward = self._error_value


def require_label(sample: Sample, reward_name: str) -> str:
    """The sample's label as text; raises :class:`UserError` if it has none."""
    if sample.label is None:
        raise UserError(f"{name_sample(sample)} has no label, which --rm-type {reward_name} needs: give --label-key")
    return str(sample.label)


def name_sample(sample: Sample) -> str:
    """``sample 3 (prompt '4827+1936=')``, the prompt shortened and on one line."""
    text = " ".join(str(sample.prompt).split())
    head = text if len(text) <= PROMPT_HEAD else text[:PROMPT_HEAD] + "..."
    return f"sample {sample.index} (prompt {head!r})"


def describe(error: Exception) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _value_error(value: object) -> Exception | None:
    if isinstance(value, (str, bytes)) or value is None:
        return TypeError(f"the reward is {value!r}, not a number")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return TypeError(f"the reward is a {type(value).__name__}, not a number")
    if not math.isfinite(number):
        return ValueError(f"the reward is {number}, not a finite number")
    if abs(number) > LARGEST_REWARD:
        return ValueError(f"the reward is {number:g}, more than a float32 holds ({LARGEST_REWARD:.3g}): scale it")
    return None
