"""From prompts to samples: the rollout as the training loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from opd_megatron.config.options import Options
from opd_megatron.config.user_code import load_function
from opd_megatron.rollout.custom import CustomGenerate, stream_custom
from opd_megatron.rollout.engine import GenerateRequest, Generation, RolloutEngine, SamplingParams
from opd_megatron.rollout.given import GivenResponses
from opd_megatron.rollout.prompt import Prompt, new_sample
from opd_megatron.rollout.teacher_voice import TeacherVoice
from opd_megatron.sample import Sample, Status


def fill_sample(sample: Sample, generation: Generation) -> None:
    """Put an engine's answer into the sample; every token of it is trained on."""
    sample.response_tokens = generation.tokens
    sample.rollout_log_probs = generation.log_probs
    sample.loss_mask = np.ones(len(generation.tokens), dtype=np.bool_)
    sample.response = generation.text
    sample.status = generation.finish
    sample.weight_version = generation.weight_version or sample.weight_version
    sample.weight_versions = generation.weight_versions
    sample.validate()


def split_by_length(
    samples: Sequence[Sample], weight_version: str, max_prompt_len: int | None
) -> tuple[list[Sample], list[Sample]]:
    """The samples whose prompts may be sent, and those whose prompts are too long: they stay empty and are marked."""
    fitting, too_long = [], []
    for sample in samples:
        sample.weight_version = weight_version
        if max_prompt_len is not None and len(sample.prompt_tokens) > max_prompt_len:
            sample.status = Status.PROMPT_TOO_LONG
            sample.rollout_log_probs = np.zeros(0, dtype=np.float32)
            too_long.append(sample)
        else:
            fitting.append(sample)
    return fitting, too_long


def _requests(samples: Sequence[Sample], sampling: SamplingParams, stream: tuple[int, ...]) -> list[GenerateRequest]:
    return [GenerateRequest(sample.prompt_tokens, sampling, (*stream, sample.index)) for sample in samples]


def generate_samples(
    engine: RolloutEngine,
    samples: Sequence[Sample],
    sampling: SamplingParams,
    stream: tuple[int, ...],
    max_prompt_len: int | None = None,
) -> None:
    """Let the engine answer every sample; sample ``i`` draws from the random stream ``(*stream, i)``.

    Prompts longer than ``max_prompt_len`` are not sent: their response stays empty with ``PROMPT_TOO_LONG``.
    """
    fitting, _ = split_by_length(samples, engine.weight_version, max_prompt_len)
    generations = engine.generate(_requests(fitting, sampling, stream))
    for sample, generation in zip(fitting, generations, strict=True):
        fill_sample(sample, generation)


class RolloutGenerator:
    """Makes the samples of a rollout with the options' sampling parameters.

    Prompts that the teacher is to answer (``--opd-data-source teacher``) go to ``voice``; without it their samples stay
    empty for whoever asks the teacher's servers.
    """

    def __init__(
        self, engine: RolloutEngine, tokenizer: Any, options: Options, voice: TeacherVoice | None = None
    ) -> None:
        rollout = options.rollout
        self._engine = engine
        self._voice = voice
        self._tokenizer = tokenizer
        self._seed = options.training.seed
        self._copies = rollout.n_samples_per_prompt
        self._max_prompt_len = rollout.rollout_max_prompt_len
        self._given = GivenResponses(options, tokenizer)
        self._custom_path = rollout.custom_generate_function_path
        self._custom: CustomGenerate | None = None
        if self._custom_path is not None:
            self._custom = load_function(self._custom_path, "--custom-generate-function-path")
        self.sampling = SamplingParams(
            temperature=rollout.rollout_temperature,
            top_p=rollout.rollout_top_p,
            top_k=rollout.rollout_top_k,
            max_new_tokens=options.training_response_len,
            stop=rollout.rollout_stop,
            ignore_eos=rollout.rollout_ignore_eos,
        )

    async def stream(
        self, records: Sequence[Prompt], rollout_id: int, first_group: int = 0
    ) -> AsyncGenerator[Sample, None]:
        """``n_samples_per_prompt`` samples of each prompt, each as soon as it is finished.

        ``group_index`` is a prompt's place in the list plus ``first_group``, ``index`` the sample's place if groups are
        counted from 0. Where it is chosen (``--opd-student-data-fraction``) all samples of a prompt have the response
        of its row, or one each of the teacher. What is sampled is a function of the run's seed, ``rollout_id``, the
        index and the weights.
        Errors of a custom generate function propagate; a sample that it leaves inconsistent is a ``RunError``.
        """
        samples, of_teacher = [], []
        for group, record in enumerate(records, start=first_group):
            given = self._given.chosen(record, rollout_id)
            for number in range(self._copies):
                sample = new_sample(record, group * self._copies + number, group)
                if not given:
                    samples.append(sample)
                elif self._given.by_teacher:
                    of_teacher.append(sample)
                else:
                    self._given.fill(sample, record)
                    yield sample
        stream = (self._seed, rollout_id)
        for answered in (self._by_teacher(of_teacher, stream), self._answer(samples, stream, self.sampling)):
            async with contextlib.aclosing(answered) as finished:
                async for sample in finished:
                    yield sample

    def generate(self, records: Sequence[Prompt], rollout_id: int) -> list[Sample]:
        """All samples of :meth:`stream` in the order of the prompts, for callers without an event loop."""
        return _collect(self.stream(records, rollout_id))

    def greedy(self, samples: Sequence[Sample], rollout_id: int) -> list[Sample]:
        """One greedy response to each prompt of ``samples``, by first occurrence of its ``group_index``."""
        prompts: dict[int, Sample] = {}
        for sample in samples:
            prompts.setdefault(sample.group_index, sample)
        copies = [
            Sample(
                index=place,
                group_index=group,
                prompt=sample.prompt,
                prompt_tokens=sample.prompt_tokens,
                label=sample.label,
                metadata=dict(sample.metadata),
            )
            for place, (group, sample) in enumerate(prompts.items())
        ]
        sampling = dataclasses.replace(self.sampling, temperature=0.0, top_p=1.0, top_k=-1)
        return _collect(self._answer(copies, (self._seed, rollout_id, len(samples)), sampling))

    async def _by_teacher(self, samples: Sequence[Sample], stream: tuple[int, ...]) -> AsyncGenerator[Sample, None]:
        for sample in samples:
            sample.from_data = True
            if self._voice is None:
                yield sample
        if self._voice is not None:
            async with contextlib.aclosing(self._voice.stream(samples, self.sampling, stream)) as finished:
                async for sample in finished:
                    yield sample

    async def _answer(
        self, samples: Sequence[Sample], stream: tuple[int, ...], sampling: SamplingParams
    ) -> AsyncGenerator[Sample, None]:
        fitting, too_long = split_by_length(samples, self._engine.weight_version, self._max_prompt_len)
        for sample in too_long:
            yield sample
        if fitting:
            answer = self._by_engine if self._custom is None else self._by_custom
            async with contextlib.aclosing(answer(fitting, stream, sampling)) as finished:
                async for sample in finished:
                    yield sample

    async def _by_engine(
        self, samples: Sequence[Sample], stream: tuple[int, ...], sampling: SamplingParams
    ) -> AsyncGenerator[Sample, None]:
        found = self._engine.stream(_requests(samples, sampling, stream))
        async with contextlib.aclosing(found) as generations:
            async for place, generation in generations:
                fill_sample(samples[place], generation)
                yield samples[place]

    async def _by_custom(
        self, samples: Sequence[Sample], stream: tuple[int, ...], sampling: SamplingParams
    ) -> AsyncGenerator[Sample, None]:
        assert self._custom is not None
        assert self._custom_path is not None
        made = stream_custom(self._custom, self._custom_path, samples, self._engine, sampling, stream)
        async with contextlib.aclosing(made) as finished:
            async for sample in finished:
                if not sample.response and sample.response_length:
                    sample.response = self._tokenizer.decode(sample.response_tokens, skip_special_tokens=True)
                yield sample


def _collect(finished: AsyncGenerator[Sample, None]) -> list[Sample]:
    async def collect() -> list[Sample]:
        return [sample async for sample in finished]

    return sorted(asyncio.run(collect()), key=lambda sample: sample.index)


def rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """``rollout/*`` of the samples: response lengths and tokens (in tokens), and fractions of the samples.

    ``truncated_frac`` counts responses cut at the length limit, ``empty_frac`` all that have no token, and
    ``prompt_too_long_frac`` those that are empty because the prompt did not fit.
    """
    if not samples:
        raise ValueError("a rollout without samples has no metrics")
    lengths = np.array([sample.response_length for sample in samples])
    statuses = [sample.status for sample in samples]
    return {
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/truncated_frac": statuses.count(Status.TRUNCATED) / len(samples),
        "rollout/empty_frac": float((lengths == 0).mean()),
        "rollout/prompt_too_long_frac": statuses.count(Status.PROMPT_TOO_LONG) / len(samples),
        "rollout/tokens": float(lengths.sum()),
    }
