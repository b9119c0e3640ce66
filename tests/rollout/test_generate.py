"""From prompts to samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.config.options import Options, RolloutOptions, TrainingOptions
from opd_megatron.rollout.engine import GenerateRequest, SamplingParams
from opd_megatron.rollout.generate import RolloutGenerator, rollout_metrics
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.sample import Sample, Status
from tests.rollout.models import engine_with
from tests.rollout.records import Record

RECORDS = [Record("12+3=", label="15", metadata={"kind": "sum"}, index=4), Record("7-"), Record("12+3=")]


def _options(seed: int = 9, **rollout: Any) -> Options:
    settings = {"rollout_max_response_len": 12, "n_samples_per_prompt": 2} | rollout
    return Options(rollout=RolloutOptions(**settings), training=TrainingOptions(seed=seed))


def _tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.response_tokens.tolist() for sample in samples]


def test_samples_come_in_the_order_of_the_prompts(engine: LocalEngine, tokenizer: Any) -> None:
    samples = RolloutGenerator(engine, tokenizer, _options()).generate(RECORDS, rollout_id=3)
    assert [sample.index for sample in samples] == [0, 1, 2, 3, 4, 5]
    assert [sample.group_index for sample in samples] == [0, 0, 1, 1, 2, 2]
    assert [sample.prompt for sample in samples] == ["12+3=", "12+3=", "7-", "7-", "12+3=", "12+3="]
    assert (samples[1].label, samples[1].metadata) == ("15", {"kind": "sum"})
    assert samples[0].metadata is not samples[1].metadata
    for sample in samples:
        request = GenerateRequest(sample.prompt_tokens, SamplingParams(max_new_tokens=12), (9, 3, sample.index))
        expected = engine.generate([request])[0]
        assert sample.response_tokens.tolist() == expected.tokens.tolist()
        assert sample.loss_mask.all()
        assert sample.rollout_log_probs is not None
        np.testing.assert_allclose(sample.rollout_log_probs, expected.log_probs, atol=1e-5)
        assert (sample.response, sample.status) == (expected.text, expected.finish)
        assert sample.weight_version == "first"


def test_samples_are_a_function_of_seed_and_rollout(qwen3: Any, tokenizer: Any) -> None:
    def run(rollout_id: int, **options: Any) -> list[list[int]]:
        generator = RolloutGenerator(engine_with(qwen3, tokenizer), tokenizer, _options(**options))
        return _tokens(generator.generate(RECORDS, rollout_id))

    engine = engine_with(qwen3, tokenizer, max_batch_size=2)
    generator = RolloutGenerator(engine, tokenizer, _options())
    straight = [_tokens(generator.generate(RECORDS, rollout_id)) for rollout_id in range(3)]
    assert straight[2] == run(2)
    assert straight[0] != straight[1]
    assert straight[2] != run(2, seed=10)
    assert straight[0][0] != straight[0][1], "samples of one prompt differ"


def test_options_reach_the_engine(engine: LocalEngine, tokenizer: Any) -> None:
    options = _options(
        rollout_temperature=0.5,
        rollout_top_p=0.9,
        rollout_top_k=4,
        rollout_stop=("ab", "c"),
        rollout_ignore_eos=True,
        rollout_max_response_len=7,
    )
    sampling = RolloutGenerator(engine, tokenizer, options).sampling
    assert sampling == SamplingParams(0.5, 0.9, 4, 7, ("ab", "c"), True)


@pytest.mark.parametrize("custom", [None, "tests.rollout.records:two_turns", "tests.rollout.records:two_turns_async"])
def test_long_prompts_are_not_sent(engine: LocalEngine, tokenizer: Any, custom: str | None) -> None:
    options = _options(rollout_max_prompt_len=4, custom_generate_function_path=custom)
    samples = RolloutGenerator(engine, tokenizer, options).generate(RECORDS, 0)
    long = [sample.status is Status.PROMPT_TOO_LONG for sample in samples]
    assert long == [True, True, False, False, True, True]
    assert [sample.response_length == 0 for sample in samples] == long
    assert samples[0].weight_version == "first"
    metrics = rollout_metrics(samples)
    assert metrics["rollout/prompt_too_long_frac"] == pytest.approx(4 / 6)
    assert metrics["rollout/empty_frac"] == pytest.approx(4 / 6)


def test_no_prompts_give_no_samples(engine: LocalEngine, tokenizer: Any) -> None:
    assert RolloutGenerator(engine, tokenizer, _options()).generate([], 0) == []


def test_a_custom_function_makes_the_samples(qwen3: Any, engine: LocalEngine, tokenizer: Any) -> None:
    plain = _options(custom_generate_function_path="tests.rollout.records:two_turns")
    samples = RolloutGenerator(engine, tokenizer, plain).generate(RECORDS, 1)
    assert [sample.index for sample in samples] == list(range(6))
    for sample in samples:
        cut = int(np.flatnonzero(~sample.loss_mask)[0])
        assert sample.response_tokens[cut] == 2
        assert 0 < cut < sample.response_length - 1
        assert sample.response == tokenizer.decode(sample.response_tokens, skip_special_tokens=True)
        assert sample.weight_version == "first"
    turns = [(sample.response_tokens[:3].tolist()) for sample in samples if sample.prompt == "12+3="]
    assert len(set(map(tuple, turns))) == len(turns), "every sample has a stream of its own"
    asynchronous = _options(custom_generate_function_path="tests.rollout.records:two_turns_async")
    assert _tokens(RolloutGenerator(engine_with(qwen3), tokenizer, asynchronous).generate(RECORDS, 1)) == _tokens(
        samples
    )


def test_every_answer_in_a_custom_function_has_a_stream_of_its_own(engine: LocalEngine, tokenizer: Any) -> None:
    options = _options(custom_generate_function_path="tests.rollout.records:four_answers")
    generator = RolloutGenerator(engine, tokenizer, options)
    samples = generator.generate(RECORDS[:1], 0)
    answers = [tuple(answer) for sample in samples for answer in sample.metadata["answers"]]
    assert len(set(answers)) == len(answers) == 8
    again = generator.generate(RECORDS[:1], 0)
    assert [sample.metadata for sample in again] == [sample.metadata for sample in samples]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forgets_the_mask", "sample 0: .*loss_mask has shape"),
        ("returns_tokens", "sample 0: returned a list"),
        ("renumbers", "sample 1: index or group_index was changed"),
        ("lacks_log_probs", "sample 0: rollout_log_probs are not finite"),
    ],
)
def test_what_a_custom_function_returns_is_checked(
    engine: LocalEngine, tokenizer: Any, name: str, message: str
) -> None:
    options = _options(custom_generate_function_path=f"tests.rollout.records:{name}")
    with pytest.raises(RunError, match=f"{name}, {message}"):
        RolloutGenerator(engine, tokenizer, options).generate(RECORDS, 0)


def test_a_custom_function_that_is_cancelled_from_within_is_an_error(engine: LocalEngine, tokenizer: Any) -> None:
    """Its samples would be missing otherwise, without a word."""
    options = _options(custom_generate_function_path="tests.rollout.records:cancels_itself")
    with pytest.raises(RunError, match="cancels_itself, sample 0: the generate function was cancelled from within"):
        RolloutGenerator(engine, tokenizer, options).generate(RECORDS, 0)


def test_a_custom_function_cannot_change_the_weights(engine: LocalEngine, tokenizer: Any) -> None:
    options = _options(custom_generate_function_path="tests.rollout.records:meddles")
    with pytest.raises(RuntimeError, match="cannot change"):
        RolloutGenerator(engine, tokenizer, options).generate(RECORDS, 0)
    assert engine.weight_version == "first"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.rollout.records", "package.module:function"),
        ("tests.rollout.nowhere:f", "cannot import tests.rollout.nowhere"),
        ("tests.rollout.records:nothing", "has no nothing"),
        ("tests.rollout.records:not_a_function", "not_a_function is not a function"),
    ],
)
def test_a_custom_function_that_is_not_there_is_the_user_s_error(
    engine: LocalEngine, tokenizer: Any, path: str, message: str
) -> None:
    with pytest.raises(UserError, match=f"--custom-generate-function-path {path}: .*{message}"):
        RolloutGenerator(engine, tokenizer, _options(custom_generate_function_path=path))


def test_metrics_count_what_happened() -> None:
    def sample(length: int, status: Status) -> Sample:
        return Sample(0, 0, "", np.array([3]), response_tokens=np.full(length, 4), status=status)

    samples = [
        sample(0, Status.PROMPT_TOO_LONG),
        sample(0, Status.COMPLETED),
        sample(3, Status.COMPLETED),
        sample(9, Status.TRUNCATED),
    ]
    assert rollout_metrics(samples) == {
        "rollout/response_length_mean": 3.0,
        "rollout/response_length_max": 9.0,
        "rollout/truncated_frac": 0.25,
        "rollout/empty_frac": 0.5,
        "rollout/prompt_too_long_frac": 0.25,
        "rollout/tokens": 12.0,
    }
