"""The local engine: a transformers model in this process that decodes in batches."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from opd_megatron.config.architecture import FAMILIES
from opd_megatron.rollout.decode_loop import Batch, decode_batch
from opd_megatron.rollout.decoder import Decoder
from opd_megatron.rollout.engine import GenerateRequest, Generation, SamplingParams
from opd_megatron.rollout.feed_forward import tensors_by_stored_name
from opd_megatron.rollout.stop import StopStrings, TokenTexts, end_token_ids
from opd_megatron.sample import Status


def _build_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """An empty model. It is built on its device, never on ``meta``: the rotary frequencies are in no weight file."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def _nothing() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, np.int64), np.zeros(0, np.float32)


class LocalEngine:
    """Speaks with a transformers causal language model of the Qwen2, Qwen3 or Llama family, or one of Qwen's mixtures.

    ``config`` is a transformers config or a Hugging Face folder, of which the config and the end tokens are read and
    nothing else: weights arrive by :meth:`update_weights`, and nothing is generated before they have. Responses end at
    any of ``end_token_ids``. What a request samples depends on its prompt, its parameters, its seed and the weights;
    batches change it only as far as they change the rounding of a logit.
    """

    def __init__(
        self,
        config: PreTrainedConfig | str | Path,
        tokenizer: Any,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch_size: int = 256,
    ) -> None:
        folder = None if isinstance(config, PreTrainedConfig) else Path(config)
        resolved = config if isinstance(config, PreTrainedConfig) else AutoConfig.from_pretrained(config)
        if resolved.model_type not in FAMILIES:
            raise ValueError(
                f"the local engine does not know model_type {resolved.model_type!r} (known: {', '.join(FAMILIES)})"
            )
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._device = torch.device(device)
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._vocab_size = int(resolved.vocab_size)
        self._max_positions = int(resolved.max_position_embeddings)
        self._model: Any = _build_model(resolved, self._device, dtype)
        self._decoder: Decoder | None = Decoder(self._model)
        self._token_texts = TokenTexts(tokenizer, self._vocab_size)
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._weight_version = ""
        self._update_seconds: float | None = None
        self._ready = False
        self.end_token_ids = end_token_ids(tokenizer, resolved, folder)

    @property
    def weight_version(self) -> str:
        return self._weight_version

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Copy full tensors under their Hugging Face names into the model.

        Every parameter must arrive; of parameters that are one tensor (a tied ``lm_head.weight``) one name is enough,
        and if both arrive they must be equal. Raises ``ValueError`` on a missing, unknown, wrongly shaped or
        conflicting tensor; after that the engine refuses to speak until an update succeeds.
        """
        if self._decoder is None:
            raise RuntimeError("the engine is closed")
        began = time.perf_counter()
        self._ready, self._weight_version = False, ""
        parameters = tensors_by_stored_name(self._model)
        missing = {id(parameter): name for name, parameter in reversed(parameters.items())}
        with torch.no_grad():
            for name, tensor in named_tensors:
                parameter = parameters.get(name)
                if parameter is None:
                    raise ValueError(f"weight update {version!r}: the model has no parameter {name!r}")
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"weight update {version!r}: {name} has shape {tuple(tensor.shape)}, "
                        f"the model's has {tuple(parameter.shape)}"
                    )
                arriving = tensor.to(device=parameter.device, dtype=parameter.dtype)
                if id(parameter) not in missing and not torch.equal(arriving, parameter):
                    raise ValueError(f"weight update {version!r}: {name} arrived twice with different values")
                parameter.copy_(arriving)
                missing.pop(id(parameter), None)
            if missing:
                names = sorted(missing.values())
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                raise ValueError(f"weight update {version!r}: {len(names)} parameters did not arrive: {shown}")
            self._decoder.refresh()
        self._ready, self._weight_version = True, version
        self._update_seconds = (self._update_seconds or 0.0) + time.perf_counter() - began

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """One generation per request, in order; raises ``ValueError`` on an empty prompt or an unknown token id.

        Responses end early where prompt and response fill the model's positions; a prompt that leaves no room gives
        an empty response with ``PROMPT_TOO_LONG``.
        """
        if self._decoder is None:
            raise RuntimeError("the engine is closed")
        if not self._ready:
            raise RuntimeError("the engine has no weights: update_weights has not succeeded yet")
        prompts = self._check_prompts(requests)
        room = [self._max_positions - len(prompt) for prompt in prompts]
        results: dict[int, Generation] = {
            place: Generation(*_nothing(), "", Status.PROMPT_TOO_LONG, self._weight_version)
            for place, left in enumerate(room)
            if left < 1
        }
        with torch.inference_mode():
            for places in self._plan(requests, [place for place, left in enumerate(room) if left >= 1]):
                batch = Batch(
                    prompts=[prompts[place] for place in places],
                    sampling=requests[places[0]].sampling,
                    limits=[min(requests[place].sampling.max_new_tokens, room[place]) for place in places],
                    seeds=[requests[place].seed for place in places],
                )
                results.update(zip(places, self._run(self._decoder, batch), strict=True))
        return [results[place] for place in range(len(requests))]

    async def stream(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[tuple[int, Generation]]:
        """As :meth:`generate`, decoded in another thread and given out when all are complete."""
        for place, generation in enumerate(await asyncio.to_thread(self.generate, requests)):
            yield place, generation

    def metrics(self) -> dict[str, float]:
        """Seconds of the updates of the weights since the last call."""
        seconds, self._update_seconds = self._update_seconds, None
        return {} if seconds is None else {"perf/weight_update_seconds": seconds}

    def rest(self) -> None:
        """Nothing: the model stays where it is."""

    def close(self) -> None:
        """Release the model; the engine cannot be used afterwards."""
        self._decoder, self._model, self._ready, self._weight_version = None, None, False, ""

    def _check_prompts(self, requests: Sequence[GenerateRequest]) -> list[np.ndarray]:
        prompts = [np.ascontiguousarray(request.prompt_tokens, dtype=np.int64).reshape(-1) for request in requests]
        for place, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"request {place}: the prompt has no tokens")
            if prompt.min() < 0 or prompt.max() >= self._vocab_size:
                raise ValueError(f"request {place}: the prompt has token ids outside 0..{self._vocab_size - 1}")
        return prompts

    def _plan(self, requests: Sequence[GenerateRequest], places: Sequence[int]) -> list[list[int]]:
        """Batches of requests that sample alike, by prompt length so that few are padded, of about equal size."""
        alike: dict[SamplingParams, list[int]] = {}
        for place in places:
            key = dataclasses.replace(requests[place].sampling, max_new_tokens=1)
            alike.setdefault(key, []).append(place)
        batches = []
        for group in alike.values():
            group.sort(key=lambda place: len(requests[place].prompt_tokens))
            count = -(-len(group) // self._max_batch_size)
            bounds = [len(group) * part // count for part in range(count + 1)]
            batches += [group[start:end] for start, end in itertools.pairwise(bounds)]
        return batches

    def _run(self, decoder: Decoder, batch: Batch) -> list[Generation]:
        stop = None
        if batch.sampling.stop:
            if batch.sampling.stop not in self._stops:
                self._stops[batch.sampling.stop] = StopStrings(self._token_texts, batch.sampling.stop)
            stop = self._stops[batch.sampling.stop]
        end_ids = () if batch.sampling.ignore_eos else self.end_token_ids
        result = decode_batch(decoder, batch, end_ids, stop, self._device)
        tokens = [row[:length].copy() for row, length in zip(result.tokens_BT, result.lengths_B, strict=True)]
        log_probs = [row[:length].copy() for row, length in zip(result.log_probs_BT, result.lengths_B, strict=True)]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        statuses = [Status.COMPLETED if ended else Status.TRUNCATED for ended in result.ended_B]
        return [
            Generation(*fields, self._weight_version) for fields in zip(tokens, log_probs, texts, statuses, strict=True)
        ]
