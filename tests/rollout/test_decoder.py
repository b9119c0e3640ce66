"""The decoding forward pass against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from opd_megatron.rollout.cache import join_caches
from opd_megatron.rollout.decoder import Decoder
from tests.rollout.models import FAMILIES, MIXTURES, VOCAB_SIZE, reference_model, tiny_config


def _next_logits(model: Any, sequences: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([model(input_ids=tokens.unsqueeze(0)).logits[0, -1] for tokens in sequences])


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_logits_equal_transformers_through_prefill_steps_growth_and_dropping(family: str, padded: bool) -> None:
    model = reference_model(tiny_config(family))
    decoder = Decoder(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(3)
    lengths = [9, 4, 1, 9, 7] if padded else [9] * 5
    sequences = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in lengths]
    tokens = torch.zeros(5, 9, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[9 - len(sequence) :] = sequence
    pad = torch.tensor([9 - length for length in lengths])
    with torch.inference_mode():
        parts = [decoder.new_cache(pad[part], padded, capacity=9) for part in (slice(0, 2), slice(2, 5))]
        logits = torch.cat([decoder.forward(tokens[:2], parts[0]), decoder.forward(tokens[2:], parts[1])])
        cache = join_caches(parts)
        _assert_close(logits, _next_logits(model, sequences))
        for step in range(40):
            if step == 12:
                keep = torch.tensor([4, 0, 2, 2])
                cache.take(keep)
                sequences = [sequences[row] for row in keep]
            new = torch.randint(0, VOCAB_SIZE, (len(sequences),), generator=generator)
            sequences = [torch.cat((tokens, token[None])) for tokens, token in zip(sequences, new, strict=True)]
            logits = decoder.forward(new.unsqueeze(1), cache)
            if step in (0, 6, 7, 11, 12, 39):
                _assert_close(logits, _next_logits(model, sequences))
    assert cache.length == 49 <= cache.capacity


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family: str) -> None:
    config = tiny_config(family)
    precise = reference_model(config)
    coarse = copy.deepcopy(precise).to(torch.bfloat16)
    decoder = Decoder(copy.deepcopy(coarse))
    tokens = torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = decoder.new_cache(torch.zeros(3, dtype=torch.int64), False, capacity=12)
        decoder.forward(tokens[:, :11], cache)
        ours = decoder.forward(tokens[:, 11:], cache).float()
        expected = precise(input_ids=tokens).logits[:, -1]
        theirs = coarse(input_ids=tokens).logits[:, -1].float()
    assert (ours - expected).abs().mean() <= 1.5 * (theirs - expected).abs().mean()


def test_several_tokens_after_the_first_are_refused() -> None:
    decoder = Decoder(reference_model(tiny_config("qwen2")))
    with torch.inference_mode():
        cache = decoder.new_cache(torch.zeros(1, dtype=torch.int64), False, capacity=8)
        decoder.forward(torch.ones(1, 3, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match="one token at a time"):
            decoder.forward(torch.ones(1, 2, dtype=torch.int64), cache)
