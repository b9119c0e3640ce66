"""Prompts for the rollout's tests, and custom generate functions that they name by import path."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd_megatron.rollout.engine import GenerateRequest, RolloutEngine, SamplingParams
from opd_megatron.sample import Sample
from tests.rollout.models import CHARACTERS


@dataclass(frozen=True)
class Record:
    """A row of a prompt set, as far as the rollout looks at it."""

    prompt: str
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    teacher_prompt_tokens: np.ndarray | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> np.ndarray:
        return np.array([3 + CHARACTERS.index(character) for character in self.prompt], dtype=np.int64)


def two_turns(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    """Two turns with an inserted token between them that is not trained on."""
    first = engine.generate([GenerateRequest(sample.prompt_tokens, sampling)])[0]
    inserted = np.array([2])
    so_far = np.concatenate([sample.prompt_tokens, first.tokens, inserted])
    second = engine.generate([GenerateRequest(so_far, sampling)])[0]
    sample.response_tokens = np.concatenate([first.tokens, inserted, second.tokens])
    sample.loss_mask = np.concatenate([np.ones(len(first.tokens)), [0], np.ones(len(second.tokens))]).astype(bool)
    sample.rollout_log_probs = np.concatenate([first.log_probs, [np.nan], second.log_probs])
    sample.status = second.finish
    return sample


async def two_turns_async(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    await asyncio.sleep(0.001 * (7 - sample.index % 8))
    return two_turns(sample, engine, sampling)


def four_answers(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    """Asks the same four times, in two calls; the answers go to the metadata."""
    request = GenerateRequest(sample.prompt_tokens, sampling)
    answers = [*engine.generate([request, request]), *engine.generate([request, request])]
    sample.metadata["answers"] = [answer.tokens.tolist() for answer in answers]
    return sample


async def cancels_itself(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    inner = asyncio.ensure_future(asyncio.sleep(60))
    inner.cancel()
    await inner
    return sample


def forgets_the_mask(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    sample.response_tokens = np.array([4, 5])
    return sample


def returns_tokens(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> list[int]:
    return [4, 5]


def renumbers(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    sample.index = 0
    return sample


def lacks_log_probs(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    sample.response_tokens = np.array([4, 5])
    sample.loss_mask = np.ones(2, dtype=bool)
    sample.rollout_log_probs = np.array([0.0, np.nan])
    return sample


def meddles(sample: Sample, engine: RolloutEngine, sampling: SamplingParams) -> Sample:
    engine.update_weights([], "mine")
    return sample


not_a_function = 3
