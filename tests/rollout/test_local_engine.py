"""The local engine against transformers' generate and full forward passes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.rollout.engine import GenerateRequest, SamplingParams
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.sampling import UniformStreams
from opd_megatron.sample import Status
from tests.rollout.models import (
    EOS,
    FAMILIES,
    MIXTURES,
    VOCAB_SIZE,
    byte_tokenizer,
    character_tokenizer,
    engine_with,
    reference_model,
    stored_weights,
    tiny_config,
)

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=30)


def _prompts(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, size=length) for length in lengths]


def _requests(prompts: list[np.ndarray], sampling: SamplingParams) -> list[GenerateRequest]:
    return [GenerateRequest(prompt, sampling, (11, 0, place)) for place, prompt in enumerate(prompts)]


def _full_forward_log_probs(model: Any, prompt: np.ndarray, response: np.ndarray, temperature: float) -> np.ndarray:
    tokens = torch.from_numpy(np.concatenate([prompt, response])).unsqueeze(0)
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].double()
    log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    return log_probs.gather(1, torch.from_numpy(response)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_greedy_tokens_equal_transformers_generate(family: str) -> None:
    model = reference_model(tiny_config(family))
    prompts = _prompts([5, 12, 5, 1, 40, 12, 12])
    generations = engine_with(model).generate(_requests(prompts, GREEDY))
    ends = 0
    for prompt, generation in zip(prompts, generations, strict=True):
        expected = model.generate(
            torch.from_numpy(prompt)[None],
            do_sample=False,
            max_new_tokens=30,
            attention_mask=torch.ones(1, len(prompt)),
        )[0, len(prompt) :]
        assert generation.tokens.tolist() == expected.tolist()
        ended = expected[-1] == 1
        ends += int(ended)
        assert generation.finish is (Status.COMPLETED if ended else Status.TRUNCATED)
    assert len({generation.tokens.tobytes() for generation in generations}) > 3


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_a_full_forward(family: str, temperature: float) -> None:
    model = reference_model(tiny_config(family))
    prompts = _prompts([6, 3, 6, 20])
    sampling = SamplingParams(temperature=temperature, top_k=10, max_new_tokens=25, ignore_eos=True)
    for prompt, generation in zip(prompts, engine_with(model).generate(_requests(prompts, sampling)), strict=True):
        expected = _full_forward_log_probs(model, prompt, generation.tokens, temperature)
        np.testing.assert_allclose(generation.log_probs, expected, rtol=0, atol=1e-5)
        assert generation.log_probs.dtype == np.float32
        assert generation.tokens.dtype == np.int64


def test_a_sample_does_not_depend_on_its_batch(qwen3: Any, tokenizer: Any) -> None:
    prompts = _prompts([4, 9, 4, 2, 17, 9, 30, 4, 5, 6])
    prompts[7] = prompts[0]
    sampling = SamplingParams(max_new_tokens=80)
    requests = _requests(prompts, sampling)
    together = engine_with(qwen3, tokenizer).generate(requests)
    lengths = [len(generation.tokens) for generation in together]
    assert min(lengths) < 40 < max(lengths), "the case must drop sequences that ended"
    assert together[0].tokens.tolist() != together[7].tokens.tolist(), "equal prompts have streams of their own"
    one_by_one = [engine_with(qwen3, tokenizer).generate([request])[0] for request in requests]
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = engine_with(qwen3, tokenizer, max_batch_size=3).generate([requests[place] for place in order])
    for place, generation in enumerate(together):
        for other in (one_by_one[place], shuffled[list(order).index(place)]):
            assert generation.tokens.tolist() == other.tokens.tolist()
            assert (generation.text, generation.finish) == (other.text, other.finish)
            np.testing.assert_allclose(generation.log_probs, other.log_probs, rtol=0, atol=1e-5)


def test_requests_of_one_call_may_sample_differently(engine: LocalEngine) -> None:
    prompts = _prompts([7] * 4)
    ways = [
        GREEDY,
        SamplingParams(max_new_tokens=3, ignore_eos=True),
        SamplingParams(max_new_tokens=9, ignore_eos=True),
        SamplingParams(top_k=1, max_new_tokens=30),
    ]
    requests = [
        GenerateRequest(prompt, way, (5, place)) for place, (prompt, way) in enumerate(zip(prompts, ways, strict=True))
    ]
    generations = engine.generate(requests)
    assert [len(generations[place].tokens) for place in (1, 2)] == [3, 9]
    alone = [engine.generate([request])[0].tokens.tolist() for request in requests]
    assert [generation.tokens.tolist() for generation in generations] == alone
    greedy = engine.generate([GenerateRequest(prompts[3], GREEDY)])[0]
    assert greedy.tokens.tolist() == alone[3], "the top token alone is greedy decoding"


def _indifferent_model(**overrides: Any) -> Any:
    """Every token is equally probable, so that a response shows its uniform numbers."""
    model = reference_model(tiny_config("qwen2", **overrides))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_every_token_takes_the_next_number_of_its_sample_s_stream() -> None:
    engine = engine_with(_indifferent_model(max_position_embeddings=400))
    sampling = SamplingParams(max_new_tokens=150, ignore_eos=True)
    seeds = [(4, 0, 1), (4, 1, 0)]
    prompts = _prompts([3, 8])
    requests = [GenerateRequest(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    expected = (UniformStreams(seeds).draw([0, 1], 0, 150) * VOCAB_SIZE).astype(int)
    assert [generation.tokens.tolist() for generation in engine.generate(requests)] == expected.tolist()


def test_limits_hold_for_each_response_of_a_batch() -> None:
    engine = engine_with(_indifferent_model(eos_token_id=list(range(1, 15))))
    limits = [1, 3, 9, 4] * 10
    requests = [
        GenerateRequest(prompt, SamplingParams(max_new_tokens=limit), (place,))
        for place, (prompt, limit) in enumerate(zip(_prompts([5] * 40), limits, strict=True))
    ]
    for limit, generation in zip(limits, engine.generate(requests), strict=True):
        ends = [place for place, token in enumerate(generation.tokens) if 1 <= token < 15]
        assert ends in ([], [len(generation.tokens) - 1])
        assert generation.finish is (Status.COMPLETED if ends else Status.TRUNCATED)
        assert len(generation.tokens) <= limit
        assert ends or len(generation.tokens) == limit


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.6])
def test_tokens_have_the_model_s_distribution(qwen3: Any, temperature: float) -> None:
    prompt = _prompts([6])[0]
    draws = 4000
    sampling = SamplingParams(temperature=temperature, max_new_tokens=1)
    engine = engine_with(qwen3, max_batch_size=1000)
    requests = [GenerateRequest(prompt, sampling, (3, place)) for place in range(draws)]
    chosen = np.array([generation.tokens[0] for generation in engine.generate(requests)])
    with torch.inference_mode():
        logits = qwen3(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, dim=-1).numpy() * draws
    frequent = expected >= 5
    counts = np.bincount(chosen, minlength=VOCAB_SIZE)
    chi_square = ((counts - expected) ** 2 / expected)[frequent].sum()
    degrees = frequent.sum()
    assert degrees > 8
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)
    assert abs(counts[~frequent].sum() - expected[~frequent].sum()) <= 5 * np.sqrt(expected[~frequent].sum() + 1)


def test_an_end_token_ends_a_response_and_stays_in_it(engine: LocalEngine) -> None:
    sampling = SamplingParams(max_new_tokens=100)
    generations = engine.generate(_requests(_prompts([5] * 32), sampling))
    completed = [generation for generation in generations if generation.finish is Status.COMPLETED]
    assert completed
    for generation in completed:
        assert generation.tokens[-1] == 1
        assert 1 not in generation.tokens[:-1]
        assert EOS not in generation.text
        assert len(generation.text) == sum(token > 2 for token in generation.tokens)
    ignoring = SamplingParams(max_new_tokens=100, ignore_eos=True)
    for generation, other in zip(generations, engine.generate(_requests(_prompts([5] * 32), ignoring)), strict=True):
        assert len(other.tokens) == 100
        assert other.finish is Status.TRUNCATED
        assert other.tokens[: len(generation.tokens)].tolist() == generation.tokens.tolist()


def test_end_tokens_of_all_files_count(tmp_path: Path, tokenizer: Any) -> None:
    config = tiny_config("qwen2", eos_token_id=7)
    config.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, VOCAB_SIZE + 5]}))
    engine = LocalEngine(tmp_path, tokenizer)
    assert engine.end_token_ids == (1, 7, 9)
    model = reference_model(config)
    engine.update_weights(model.state_dict().items(), "1")
    sampling = SamplingParams(max_new_tokens=100)
    last = {generation.tokens[-1] for generation in engine.generate(_requests(_prompts([4] * 40), sampling))}
    assert {1, 7, 9} <= last


def test_stop_strings_end_with_the_token_that_completes_them(engine: LocalEngine, tokenizer: Any) -> None:
    prompts = _prompts([6] * 24)
    free = engine.generate(_requests(prompts, SamplingParams(max_new_tokens=60, ignore_eos=True)))
    stop = (free[3].text[10:12], free[8].text[20:23])
    stopped = engine.generate(_requests(prompts, SamplingParams(max_new_tokens=60, ignore_eos=True, stop=stop)))
    for before, after in zip(free, stopped, strict=True):
        visible = [place for place, token in enumerate(before.tokens) if token > 2]
        cuts = [visible[before.text.find(text) + len(text) - 1] + 1 for text in stop if text in before.text]
        expected = before.tokens[: min(cuts)] if cuts else before.tokens
        # A special token between the two characters keeps them apart in what the model said.
        if tokenizer.decode(expected, skip_special_tokens=True) == tokenizer.decode(expected):
            assert after.tokens.tolist() == expected.tolist()
            assert after.finish is (Status.COMPLETED if cuts else Status.TRUNCATED)
            assert after.text == tokenizer.decode(expected)
    assert stopped[3].finish is stopped[8].finish is Status.COMPLETED


def test_a_stop_string_of_several_bytes_per_character_is_found() -> None:
    tokenizer = byte_tokenizer()
    model = reference_model(tiny_config("llama", vocab_size=257, eos_token_id=0, pad_token_id=None))
    # The head repeats a fixed text: the token at position p + 1 follows from the one at p.
    said = [tokenizer.encode("xé…é…y", add_special_tokens=False)[place] for place in range(10)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        places = {token: place for place, token in reversed(list(enumerate(said)))}
        for token, place in places.items():
            model.model.embed_tokens.weight[token, place] = 1.0
            follower = said[place + 1] if place + 1 < len(said) else said[0]
            model.lm_head.weight[follower, place] = 1.0
    engine = engine_with(model, tokenizer)
    prompt = np.array(said[:1])
    for stop, expected in ((("é…",), "é…"), (("zzz", "…é"), "é…é"), (("é",), "é")):
        sampling = SamplingParams(temperature=0.0, max_new_tokens=12, stop=stop)
        generation = engine.generate([GenerateRequest(prompt, sampling)])[0]
        assert generation.text == expected
        assert generation.finish is Status.COMPLETED


def test_a_special_token_can_be_a_stop_string(engine: LocalEngine) -> None:
    sampling = SamplingParams(max_new_tokens=100, stop=("<turn>",))
    generations = engine.generate(_requests(_prompts([4] * 40), sampling))
    assert {1, 2} == {generation.tokens[-1] for generation in generations if generation.finish is Status.COMPLETED}


def test_responses_stop_where_the_model_s_positions_do(engine: LocalEngine) -> None:
    sampling = SamplingParams(max_new_tokens=50, ignore_eos=True)
    prompts = _prompts([100, 127, 128, 200, 60])
    generations = engine.generate(_requests(prompts, sampling))
    assert [len(generation.tokens) for generation in generations] == [28, 1, 0, 0, 50]
    assert [generation.finish for generation in generations] == [
        Status.TRUNCATED, Status.TRUNCATED, Status.PROMPT_TOO_LONG, Status.PROMPT_TOO_LONG, Status.TRUNCATED,
    ]  # fmt: skip
    assert generations[2].text == ""
    assert generations[2].log_probs.shape == (0,)


def test_no_requests_give_no_generations(engine: LocalEngine) -> None:
    assert engine.generate([]) == []


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([3, VOCAB_SIZE], "outside"), ([-1, 3], "outside")])
def test_prompts_that_no_model_reads_are_refused(engine: LocalEngine, prompt: list[int], message: str) -> None:
    good = GenerateRequest(np.array([3, 4]), GREEDY)
    with pytest.raises(ValueError, match=f"request 1: .*{message}"):
        engine.generate([good, GenerateRequest(np.array(prompt, dtype=np.int64), GREEDY)])


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@pytest.mark.parametrize("tied", [True, False])
def test_new_weights_replace_all_of_the_old(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    first, second = reference_model(config, seed=1), reference_model(config, seed=2)
    engine = engine_with(first)
    prompts = _prompts([8, 3])
    before = engine.generate(_requests(prompts, GREEDY))
    arriving = dict(stored_weights(second))
    if tied:
        arriving.pop("lm_head.weight", None)
    engine.update_weights(((name, tensor.double()) for name, tensor in arriving.items()), "second")
    after = engine.generate(_requests(prompts, GREEDY))
    assert engine.weight_version == "second"
    fresh = engine_with(second).generate(_requests(prompts, GREEDY))
    assert [generation.tokens.tolist() for generation in after] == [g.tokens.tolist() for g in fresh]
    for place, generation in enumerate(after):
        assert generation.tokens.tolist() != before[place].tokens.tolist()
        expected = _full_forward_log_probs(second, prompts[place], generation.tokens, 1.0)
        np.testing.assert_allclose(generation.log_probs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"), "did not arrive: .*1.self_attn.k_proj"),
        (lambda weights: weights.update({"model.layers.9.mlp.up_proj.weight": torch.ones(1)}), "no parameter .*9.mlp"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight .*\(31,\).*\(32,\)",
        ),
        (
            lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"] + 1}),
            "lm_head.weight arrived twice",
        ),
    ],
)
def test_an_update_that_does_not_fit_silences_the_engine(
    qwen3: Any, engine: LocalEngine, change: Any, message: str
) -> None:
    weights = {name: tensor.clone() for name, tensor in qwen3.state_dict().items()}
    change(weights)
    with pytest.raises(ValueError, match=message):
        engine.update_weights(weights.items(), "bad")
    assert engine.weight_version == ""
    with pytest.raises(RuntimeError, match="no weights"):
        engine.generate(_requests(_prompts([3]), GREEDY))
    engine.update_weights(qwen3.state_dict().items(), "good")
    assert len(engine.generate(_requests(_prompts([3]), GREEDY))) == 1


def test_an_engine_without_weights_or_closed_says_so(qwen3: Any, tokenizer: Any) -> None:
    engine = LocalEngine(qwen3.config, tokenizer)
    with pytest.raises(RuntimeError, match="no weights"):
        engine.generate([])
    engine.update_weights(qwen3.state_dict().items(), "1")
    engine.close()
    for use in (lambda: engine.generate([]), lambda: engine.update_weights([], "2")):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_engine_leaves_global_randomness_alone(qwen3: Any, tokenizer: Any) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    engine_with(qwen3, tokenizer).generate(_requests(_prompts([4]), SamplingParams(max_new_tokens=5)))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_the_trainer_s_model_is_not_touched(qwen3: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in qwen3.state_dict().items()}
    arriving = copy.deepcopy(weights)
    engine = LocalEngine(qwen3.config, character_tokenizer())
    engine.update_weights(arriving.items(), "1")
    for tensor in arriving.values():
        tensor.zero_()  # the engine holds copies
    generation = engine.generate(_requests(_prompts([4]), GREEDY))[0]
    expected = _full_forward_log_probs(qwen3, _prompts([4])[0], generation.tokens, 1.0)
    np.testing.assert_allclose(generation.log_probs, expected, rtol=0, atol=1e-5)


def test_other_families_are_refused(tokenizer: Any) -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="'gpt2'"):
        LocalEngine(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16), tokenizer)
