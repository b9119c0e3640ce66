"""What the rollout asks of an engine, whichever engine it is."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.sample import Status


class BrokenWeightsError(RunError):
    """The weights that an engine samples with give no probabilities; a checkpoint of them would be of no use."""


@dataclass(frozen=True)
class SamplingParams:
    """How a response is sampled.

    ``temperature`` 0 is greedy decoding; ``top_p`` 1 and ``top_k`` -1 switch those filters off. ``stop`` strings and,
    unless ``ignore_eos``, the model's end tokens end a response. Raises ``ValueError`` on a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be -1 (off) or positive, not {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError("stop must be a tuple of strings that are not empty")


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """One prompt to continue. ``seed`` names the random stream of this sample, e.g. (run, rollout, sample)."""

    prompt_tokens: np.ndarray
    sampling: SamplingParams
    seed: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Generation:
    """A response of ``T`` tokens: ``tokens`` int64 ``[T]`` and ``log_probs`` float32 ``[T]``.

    ``tokens`` include the end token, or everything up to and including the token that completed a stop string.
    ``log_probs`` are those of the tokens at the sampling temperature before top-k and top-p (at temperature 0: at
    temperature 1). ``text`` is the decoded response without special tokens. ``T`` is 0 where ``finish`` says that the
    prompt is too long. ``weight_version`` is that of the weights that spoke, and ``weight_versions`` are all of them in
    their order where an update came in between.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    text: str
    finish: Status
    weight_version: str = ""
    weight_versions: tuple[str, ...] = ()


class RolloutEngine(Protocol):
    """A model that speaks and whose weights can be replaced."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """One generation per request, in the order of the requests."""
        ...

    def stream(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[tuple[int, Generation], None]:
        """The same generations as soon as each is finished, with the places of their requests.

        Runs in the running event loop without blocking it. Closing the iterator gives up what is not finished.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Replace all weights by full tensors under their Hugging Face names."""
        ...

    @property
    def weight_version(self) -> str:
        """The version of the weights that speak; empty before the first update."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the engine did since the last call, under the names of ``metrics.jsonl``."""
        ...

    def rest(self) -> None:
        """Nothing will be generated before the next update of the weights."""
        ...

    def close(self) -> None:
        """Release what the engine holds; it cannot be used afterwards."""
        ...
