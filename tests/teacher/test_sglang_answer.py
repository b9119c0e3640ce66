"""What is refused before it is sent, and which answers are believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opd_megatron.sample import Sample
from opd_megatron.system import free_port
from opd_megatron.teacher.protocol import Teacher, TeacherError
from opd_megatron.teacher.sglang import SGLangTeacher, read_answer

SENT = np.array([7, 3, 5])
VOCAB = 10


def answer(*entries: Any, **meta: Any) -> dict[str, Any]:
    return {"text": "", "meta_info": {"input_token_logprobs": list(entries), "weight_version": "v3", **meta}}


GOOD = ([None, 7, None], [-1.5, 3, None], [-0.25, 5, None])


def test_a_good_answer_is_read_with_its_weight_version() -> None:
    log_probs, version = read_answer(answer(*GOOD), SENT, VOCAB)
    np.testing.assert_array_equal(log_probs, [-1.5, -0.25])
    assert version == "v3"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (answer(*GOOD[:2]), "2 tokens in the answer, 3 expected"),
        (answer(*GOOD, [-1.0, 9, None]), "4 tokens in the answer"),
        (answer(GOOD[0], [-1.5, 4, None], GOOD[2]), "id 4 where 3 was sent"),
        (answer([None, 8, None], *GOOD[1:]), "id 8 where 7 was sent"),
        (answer(GOOD[0], [None, 3, None], GOOD[2]), "None is not a log-probability"),
        (answer(GOOD[0], [float("nan"), 3, None], GOOD[2]), "nan is not a log-probability"),
        (answer(GOOD[0], [float("-inf"), 3, None], GOOD[2]), "-inf is not a log-probability"),
        (answer(GOOD[0], [0.5, 3, None], GOOD[2]), "0.5 is not a log-probability"),
        (answer(None, *GOOD[1:]), "not a list of"),
        (answer(GOOD[0], ["x", 3, None], GOOD[2]), "not a list of"),
        (answer(finish_reason={"type": "abort", "message": "by operator"}), "aborted the request .by operator."),
        ({"text": "hello"}, "is this a SGLang server"),
        ([answer(*GOOD)], "is this a SGLang server"),
        ({"meta_info": {"input_token_logprobs": None}}, "is this a SGLang server"),
    ],
)
def test_an_answer_about_anything_else_is_refused(bad: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_answer(bad, SENT, VOCAB)


def test_only_the_last_id_of_the_vocabulary_may_come_back_as_0() -> None:
    renamed = answer(GOOD[0], [-1.5, 0, None], GOOD[2])
    log_probs, _ = read_answer(renamed, np.array([7, 9, 5]), VOCAB)
    np.testing.assert_array_equal(log_probs, [-1.5, -0.25])
    with pytest.raises(ValueError, match="id 0 where 8 was sent"):
        read_answer(renamed, np.array([7, 8, 5]), VOCAB)


def sample(prompt: list[int], response: list[int]) -> Sample:
    return Sample(index=4, group_index=0, prompt="", prompt_tokens=np.array(prompt), response_tokens=np.array(response))


@pytest.fixture
def nobody() -> SGLangTeacher:
    """A teacher whose server does not exist: whatever is sent fails with a refused connection."""
    return SGLangTeacher(f"http://127.0.0.1:{free_port()}", vocab_size=10, max_retries=0)


@pytest.mark.parametrize("tokens", [([1, 10], [2]), ([1], [2, -1]), ([1], [2, 2**40])])
def test_ids_that_would_end_the_server_are_never_sent(
    nobody: SGLangTeacher, tokens: tuple[list[int], list[int]]
) -> None:
    with pytest.raises(TeacherError, match=r"sample 4 .* outside the vocabulary of 10; not sent"):
        nobody.score([sample([1], [2]), sample(*tokens)])


def test_the_servers_limits_bound_what_is_sent(nobody: SGLangTeacher) -> None:
    nobody.restrict(vocab_size=5, max_tokens=3)
    with pytest.raises(TeacherError, match="outside the vocabulary of 5"):
        nobody.score([sample([1], [5])])
    with pytest.raises(TeacherError, match="takes at most 3 tokens"):
        nobody.score([sample([1, 2], [3, 4])])
    with pytest.raises(TeacherError, match="refused"):
        nobody.score([sample([1, 2], [3])])


def test_empty_responses_are_not_sent(nobody: SGLangTeacher) -> None:
    teacher: Teacher = nobody
    scores = teacher.score([sample([1, 2], []), sample([], [])])
    assert [score.log_probs_T.shape for score in scores] == [(0,), (0,)]
    assert teacher.score([]) == []
    teacher.close()
