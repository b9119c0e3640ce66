"""Generations as they are finished: the same as those of ``generate``, and an end when nobody reads on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from opd_megatron.rollout.engine import GenerateRequest, Generation, SamplingParams
from opd_megatron.rollout.local import LocalEngine
from tests.rollout.models import VOCAB_SIZE, engine_with


def requests(count: int, **sampling: Any) -> list[GenerateRequest]:
    draw = np.random.default_rng(0)
    params = SamplingParams(**({"max_new_tokens": 30} | sampling))
    prompts = [draw.integers(3, VOCAB_SIZE, size=1 + place % 5) for place in range(count)]
    return [GenerateRequest(prompt, params, (3, place)) for place, prompt in enumerate(prompts)]


async def collect(engine: LocalEngine, asked: list[GenerateRequest]) -> list[tuple[int, Generation]]:
    return [finished async for finished in engine.stream(asked)]


@pytest.mark.parametrize("sampling", [{}, {"stop": ("ab", "c")}, {"ignore_eos": True, "temperature": 0.0}])
def test_a_stream_has_the_generations_of_generate_bit_for_bit(
    qwen3: Any, tokenizer: Any, sampling: dict[str, Any]
) -> None:
    engine = engine_with(qwen3, tokenizer, max_batch_size=16)
    asked = [*requests(40, **sampling), GenerateRequest(np.full(1000, 3), SamplingParams())]
    expected = engine.generate(asked)
    found = asyncio.run(collect(engine, asked))
    assert sorted(place for place, _ in found) == list(range(41))
    for place, generation in found:
        assert generation.tokens.tolist() == expected[place].tokens.tolist()
        assert generation.log_probs.tobytes() == expected[place].log_probs.tobytes()
        assert (generation.text, generation.finish) == (expected[place].text, expected[place].finish)
        assert generation.weight_version == "first"


def test_short_responses_come_before_long_ones(engine: LocalEngine) -> None:
    asked = requests(60)
    lengths = [len(generation.tokens) for _, generation in asyncio.run(collect(engine, asked))]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_a_closed_stream_ends_its_thread(qwen3: Any, tokenizer: Any) -> None:
    engine = engine_with(qwen3, tokenizer)
    decoded = 0
    forward = engine._decoder.forward  # type: ignore[union-attr]

    def counting(*arguments: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return forward(*arguments)

    engine._decoder.forward = counting  # type: ignore[union-attr, method-assign]
    short, long = requests(1, max_new_tokens=2)[0], requests(2, max_new_tokens=50, ignore_eos=True)[1]

    async def read_one() -> None:
        stream = engine.stream([short, long])
        assert (await anext(stream))[0] == 0
        await stream.aclose()
        assert not any(thread.name == "local engine" for thread in threading.enumerate())

    asyncio.run(read_one())
    assert decoded < 50


def test_errors_of_the_thread_arrive_at_the_reader(engine: LocalEngine) -> None:
    with pytest.raises(ValueError, match="request 1: the prompt has no tokens"):
        asyncio.run(collect(engine, [*requests(1), GenerateRequest(np.zeros(0, np.int64), SamplingParams())]))

    def broken(tokens: Any) -> list[str]:
        raise OSError("no text")

    engine._texts = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no text"):
        asyncio.run(collect(engine, requests(2)))
