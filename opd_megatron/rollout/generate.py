"""From prompts to samples: the rollout as the training loop sees it."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from opd_megatron.config.options import Options
from opd_megatron.config.user_code import load_function
from opd_megatron.rollout.engine import GenerateRequest, Generation, RolloutEngine, SamplingParams
from opd_megatron.rollout.prompt import Prompt, new_sample
from opd_megatron.sample import Sample, Status

CustomGenerate = Callable[[Sample, RolloutEngine, SamplingParams], "Sample | Awaitable[Sample]"]
"""What ``--custom-generate-function-path`` names."""


def fill_sample(sample: Sample, generation: Generation) -> None:
    """Put an engine's answer into the sample; every token of it is trained on."""
    sample.response_tokens = generation.tokens
    sample.rollout_log_probs = generation.log_probs
    sample.loss_mask = np.ones(len(generation.tokens), dtype=np.bool_)
    sample.response = generation.text
    sample.status = generation.finish
    sample.weight_version = generation.weight_version
    sample.validate()


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
    fitting = []
    for sample in samples:
        sample.weight_version = engine.weight_version
        if max_prompt_len is not None and len(sample.prompt_tokens) > max_prompt_len:
            sample.status = Status.PROMPT_TOO_LONG
            sample.rollout_log_probs = np.zeros(0, dtype=np.float32)
        else:
            fitting.append(sample)
    requests = [GenerateRequest(sample.prompt_tokens, sampling, (*stream, sample.index)) for sample in fitting]
    for sample, generation in zip(fitting, engine.generate(requests), strict=True):
        fill_sample(sample, generation)


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
        """As :meth:`RolloutEngine.generate`."""
        return self._engine.generate(self._of_this_sample(requests))

    def stream(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[tuple[int, Generation]]:
        """As :meth:`RolloutEngine.stream`."""
        return self._engine.stream(self._of_this_sample(requests))

    def _of_this_sample(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
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

    Raises ``ValueError`` if not.
    """
    where = f"{path}, sample {index}"
    if not isinstance(made, Sample):
        raise ValueError(f"{where}: returned a {type(made).__name__}, not a Sample")
    if (made.index, made.group_index) != (index, group_index):
        raise ValueError(f"{where}: index or group_index was changed")
    try:
        made.validate()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(made.tokens) and made.tokens.min() < 0:
        raise ValueError(f"{where}: negative token ids")
    if made.rollout_log_probs is not None and not np.isfinite(made.rollout_log_probs[made.loss_mask]).all():
        raise ValueError(f"{where}: rollout_log_probs are not finite where loss_mask is 1")
    return made


class RolloutGenerator:
    """Makes the samples of a rollout with the options' sampling parameters."""

    def __init__(self, engine: RolloutEngine, tokenizer: Any, options: Options) -> None:
        rollout = options.rollout
        self._engine = engine
        self._tokenizer = tokenizer
        self._seed = options.training.seed
        self._copies = rollout.n_samples_per_prompt
        self._max_prompt_len = rollout.rollout_max_prompt_len
        self._custom_path = rollout.custom_generate_function_path
        self._custom: CustomGenerate | None = None
        if self._custom_path is not None:
            self._custom = load_function(self._custom_path, "--custom-generate-function-path")
        self.sampling = SamplingParams(
            temperature=rollout.rollout_temperature,
            top_p=rollout.rollout_top_p,
            top_k=rollout.rollout_top_k,
            max_new_tokens=rollout.rollout_max_response_len,
            stop=rollout.rollout_stop,
            ignore_eos=rollout.rollout_ignore_eos,
        )

    def generate(self, records: Sequence[Prompt], rollout_id: int) -> list[Sample]:
        """``n_samples_per_prompt`` samples of each prompt, in the order of the prompts.

        ``index`` is a sample's place in the list and ``group_index`` its prompt's. What is sampled is a function of
        the run's seed, ``rollout_id``, the index and the weights. Errors of a custom generate function propagate; a
        sample that it leaves inconsistent is a ``ValueError``.
        """
        samples = [
            new_sample(record, group * self._copies + number, group)
            for group, record in enumerate(records)
            for number in range(self._copies)
        ]
        return self._answer(samples, (self._seed, rollout_id), self.sampling)

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
        return self._answer(copies, (self._seed, rollout_id, len(samples)), sampling)

    def _answer(self, samples: list[Sample], stream: tuple[int, ...], sampling: SamplingParams) -> list[Sample]:
        if self._custom is None:
            generate_samples(self._engine, samples, sampling, stream, self._max_prompt_len)
            return samples
        return self._generate_custom(self._custom, samples, stream, sampling)

    def _generate_custom(
        self, function: CustomGenerate, samples: Sequence[Sample], stream: tuple[int, ...], sampling: SamplingParams
    ) -> list[Sample]:
        made = list(samples)
        groups = [sample.group_index for sample in samples]
        fitting = []
        for place, sample in enumerate(samples):
            sample.weight_version = self._engine.weight_version
            if self._max_prompt_len is not None and len(sample.prompt_tokens) > self._max_prompt_len:
                sample.status = Status.PROMPT_TOO_LONG
            else:
                fitting.append(place)
        answers: list[Any] = [
            function(samples[place], SampleEngine(self._engine, (*stream, place)), sampling) for place in fitting
        ]
        if any(inspect.isawaitable(answer) for answer in answers):
            answers = asyncio.run(_gather(answers))
        for place, answer in zip(fitting, answers, strict=True):
            sample = _checked(answer, place, groups[place], self._custom_path or "")
            if not sample.response and sample.response_length:
                sample.response = self._tokenizer.decode(sample.response_tokens, skip_special_tokens=True)
            made[place] = sample
        return made


async def _gather(answers: Sequence[Any]) -> list[Any]:
    async def settle(answer: Any) -> Any:
        return await answer if inspect.isawaitable(answer) else answer

    return list(await asyncio.gather(*map(settle, answers)))


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
