"""Responses that a teacher samples in the student's place (GKD, arXiv 2306.13649)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from opd_megatron.config.errors import RunError
from opd_megatron.rollout.engine import BrokenWeightsError, GenerateRequest, RolloutEngine, SamplingParams
from opd_megatron.sample import Sample, Status


def student_room(sample: Sample, sampling: SamplingParams, positions: int) -> SamplingParams | None:
    """``sampling`` of a response that fits the student's ``positions`` behind the prompt, None where none does."""
    room = positions - len(sample.prompt_tokens)
    if room < 1:
        return None
    return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def give_answer(sample: Sample, tokens: np.ndarray, finish: Status, tokenizer: Any) -> None:
    """Make the teacher's ``tokens`` the response; all of them are trained on.

    A response that was cut (``finish`` is not ``COMPLETED``) stays one without an end: where distributions are compared
    its tokens are prefixes, and nothing says that the last of them ends it.
    """
    sample.from_data = True
    sample.response_tokens = tokens
    sample.loss_mask = np.ones(len(tokens), dtype=np.bool_)
    sample.response = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    sample.status = finish
    sample.validate()


class TeacherVoice:
    """An engine with a teacher's weights that answers in the student's place.

    Responses fit the student's ``positions`` and end before the first token that is not among its ``vocab_size``: such
    a one is cut as at the length limit.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: Any, *, positions: int, vocab_size: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._positions = positions
        self._vocab_size = vocab_size

    async def stream(
        self, samples: Sequence[Sample], sampling: SamplingParams, stream: tuple[int, ...]
    ) -> AsyncGenerator[Sample, None]:
        """Each sample with its response as soon as that is finished; sample ``i`` draws from ``(*stream, i)``.

        A prompt that leaves no room gives an empty response with ``PROMPT_TOO_LONG``. Raises :class:`RunError` where
        the teacher's weights give no probabilities, which says nothing against the student's.
        """
        asked, requests = [], []
        for sample in samples:
            fitting = student_room(sample, sampling, self._positions)
            if fitting is None:
                give_answer(sample, np.zeros(0, np.int64), Status.PROMPT_TOO_LONG, self._tokenizer)
                yield sample
            else:
                asked.append(sample)
                requests.append(GenerateRequest(sample.prompt_tokens, fitting, (*stream, sample.index)))
        if not requests:
            return
        try:
            async with contextlib.aclosing(self._engine.stream(requests)) as generations:
                async for place, generation in generations:
                    unknown = np.flatnonzero(generation.tokens >= self._vocab_size)
                    tokens, finish = generation.tokens, generation.finish
                    if unknown.size:
                        tokens, finish = tokens[: unknown[0]], Status.TRUNCATED
                    give_answer(asked[place], tokens, finish, self._tokenizer)
                    yield asked[place]
        except BrokenWeightsError as error:
            raise RunError(f"the teacher that answers in the student's place has damaged weights: {error}") from error

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()
