"""The real server's scores are the model's, whatever the shape of the sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from opd_megatron.sample import Sample
from opd_megatron.teacher.protocol import TeacherError
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_preflight import server_info
from tests.sglang.conftest import CONTEXT, Served

pytestmark = pytest.mark.sglang
Connect = Callable[..., SGLangTeacher]


def assert_agrees(served: Served, teacher: SGLangTeacher, samples: list[Sample]) -> None:
    for sample, scores in zip(samples, teacher.score(samples), strict=True):
        expected = served.log_probs(sample.tokens)[-sample.response_length :] if sample.response_length else []
        assert scores.log_probs_T.shape == (sample.response_length,)
        assert scores.valid_T.all()
        np.testing.assert_allclose(scores.log_probs_T, expected, atol=1e-4)


def test_scores_agree_with_transformers_in_every_shape(qwen: Served, connect: Connect) -> None:
    generator = np.random.default_rng(1)
    shapes = [(9, 43), (1, 1), (1, 20), (30, 1), (9, 0), (2, 2), (200, 49), (1, 248), (248, 1), (0, 0)]
    samples = [qwen.random_sample(generator, *shape, index=i) for i, shape in enumerate(shapes)]
    assert_agrees(qwen, connect(qwen), samples)


def test_many_at_a_time_keep_their_order(qwen: Served, connect: Connect) -> None:
    generator = np.random.default_rng(2)
    samples = [
        qwen.random_sample(generator, int(generator.integers(1, 20)), int(generator.integers(0, 50)), index=i)
        for i in range(96)
    ]
    assert_agrees(qwen, connect(qwen, max_in_flight=32), samples)


def test_samples_of_one_prompt_are_scored_from_the_prefix_cache(qwen: Served, connect: Connect) -> None:
    generator = np.random.default_rng(3)
    prompt = qwen.random_sample(generator, 60, 0)
    group = [
        Sample(
            i, 0, "", prompt_tokens=prompt.prompt_tokens, response_tokens=generator.integers(qwen.vocab_size, size=5)
        )
        for i in range(4)
    ]
    teacher = connect(qwen)
    assert_agrees(qwen, teacher, group)
    payload = {
        "input_ids": group[0].tokens.tolist(), "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True, "logprob_start_len": 59,
    }  # fmt: skip
    assert teacher.ask("/generate", payload)["meta_info"]["cached_tokens"] >= 59


def test_the_first_token_after_no_prompt_has_no_score(qwen: Served, connect: Connect) -> None:
    sample = qwen.random_sample(np.random.default_rng(4), 0, 12)
    scores = connect(qwen).score([sample])[0]
    assert scores.valid_T.tolist() == [False] + [True] * 11
    assert scores.log_probs_T[0] == 0
    np.testing.assert_allclose(scores.log_probs_T[1:], qwen.log_probs(sample.tokens), atol=1e-4)
    single = connect(qwen).score([qwen.random_sample(np.random.default_rng(4), 0, 1)])[0]
    assert single.valid_T.tolist() == [False]


def test_scores_say_where_they_come_from_and_leave_the_sample_alone(qwen: Served, connect: Connect) -> None:
    sample = qwen.random_sample(np.random.default_rng(5), 4, 4)
    scores = connect(qwen).score([sample])[0]
    assert (scores.teacher, scores.temperature, scores.weight_version) == (qwen.server.url, 1.0, "default")
    assert sample.teacher_scores is None


def test_what_would_end_the_server_is_refused_and_the_server_lives(qwen: Served, connect: Connect) -> None:
    teacher = connect(qwen)
    for tokens in ([1, qwen.vocab_size, 2], [1, 2, -1]):
        sample = Sample(8, 0, "", prompt_tokens=np.array(tokens[:1]), response_tokens=np.array(tokens[1:]))
        with pytest.raises(TeacherError, match=r"sample 8 .* outside the vocabulary"):
            teacher.score([qwen.random_sample(np.random.default_rng(0), 2, 2), sample])
    assert qwen.is_alive()


def test_a_sample_that_is_too_long_is_refused_by_client_and_server(qwen: Served, connect: Connect) -> None:
    teacher, generator = connect(qwen), np.random.default_rng(6)
    too_long = qwen.random_sample(generator, 200, CONTEXT - 6 - 200, index=3)
    with pytest.raises(TeacherError, match=r"sample 3 \(200 prompt \+ 50 response tokens\): HTTP 400: .*250 tokens"):
        teacher.score([too_long])
    teacher.restrict(max_tokens=server_info(teacher).max_tokens)
    with pytest.raises(TeacherError, match=r"sample 3 .* takes at most 249 tokens"):
        teacher.score([too_long])
    assert_agrees(qwen, teacher, [qwen.random_sample(generator, 200, 49)])


def test_ids_beyond_the_tokenizer_but_within_the_model_are_scored(llama: Served, connect: Connect) -> None:
    assert llama.vocab_size > len(llama.tokenizer)
    sample = Sample(0, 0, "", prompt_tokens=np.array([5]), response_tokens=np.arange(llama.vocab_size)[-30:])
    assert_agrees(llama, connect(llama), [sample])
