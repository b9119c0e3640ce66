"""What is refused before it is sent, and which answers are believed."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.sample import Sample
from opd_megatron.system import free_port
from opd_megatron.teacher.protocol import FailureKind, Teacher, TeacherError, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_answer import AnswerError, read_answer, read_response

SENT = np.array([7, 3, 5])
VOCAB = 10


def answer(*entries: Any, **meta: Any) -> dict[str, Any]:
    return {"text": "", "meta_info": {"input_token_logprobs": list(entries), "weight_version": "v3", **meta}}


GOOD = ([None, 7, None], [-1.5, 3, None], [-0.25, 5, None])


def test_a_good_answer_is_read_with_its_weight_version() -> None:
    reading = read_answer(answer(*GOOD), SENT, VOCAB)
    np.testing.assert_array_equal(reading.log_probs_N, [-1.5, -0.25])
    assert reading.weight_version == "v3"
    assert reading.top is None


@pytest.mark.parametrize(
    ("bad", "reason", "kind"),
    [
        (answer(*GOOD[:2]), "2 tokens in the answer, 3 expected", FailureKind.WRONG_LENGTH),
        (answer(*GOOD, [-1.0, 9, None]), "4 tokens in the answer", FailureKind.WRONG_LENGTH),
        (answer(GOOD[0], [-1.5, 4, None], GOOD[2]), "id 4 where 3 was sent", FailureKind.WRONG_IDS),
        (answer([None, 8, None], *GOOD[1:]), "id 8 where 7 was sent", FailureKind.WRONG_IDS),
        (answer(GOOD[0], [None, 3, None], GOOD[2]), "None is not a log-probability", FailureKind.NOT_FINITE),
        (answer(GOOD[0], [float("nan"), 3, None], GOOD[2]), "nan is not a log-probability", FailureKind.NOT_FINITE),
        (answer(GOOD[0], [float("-inf"), 3, None], GOOD[2]), "-inf is not a log-probability", FailureKind.NOT_FINITE),
        (answer(GOOD[0], [0.5, 3, None], GOOD[2]), "0.5 is not a log-probability", FailureKind.NOT_FINITE),
        (answer(GOOD[0], [-1e300, 3, None], GOOD[2]), "-1e.300 is not a log-probability", FailureKind.NOT_FINITE),
        (answer(GOOD[0], [-(10**400), 3, None], GOOD[2]), "not a list of", FailureKind.MALFORMED),
        (answer(GOOD[0], [False, 3, None], GOOD[2]), "not a list of", FailureKind.MALFORMED),
        (answer(None, *GOOD[1:]), "not a list of", FailureKind.MALFORMED),
        (answer(GOOD[0], ["x", 3, None], GOOD[2]), "not a list of", FailureKind.MALFORMED),
        (
            answer(finish_reason={"type": "abort", "message": "by operator"}),
            "aborted the request .by operator.",
            FailureKind.ABORTED,
        ),
        ({"text": "hello"}, "is this a SGLang server", FailureKind.MALFORMED),
        ([answer(*GOOD)], "is this a SGLang server", FailureKind.MALFORMED),
        ({"meta_info": {"input_token_logprobs": None}}, "is this a SGLang server", FailureKind.MALFORMED),
    ],
)
def test_an_answer_about_anything_else_is_refused(bad: Any, reason: str, kind: FailureKind) -> None:
    with pytest.raises(AnswerError, match=reason) as caught:
        read_answer(bad, SENT, VOCAB)
    assert caught.value.kind == kind


def test_only_the_last_id_of_the_server_may_be_called_0() -> None:
    """The student's last id is no exception where the server has more."""
    sent, said = np.array([7, 9]), answer([None, 7, None], [-1.0, 0, None])
    assert read_answer(said, sent, VOCAB, last_id=9).log_probs_N.tolist() == [-1.0]
    with pytest.raises(AnswerError, match="id 0 where 9 was sent"):
        read_answer(said, sent, VOCAB, last_id=11)
    teacher = SGLangTeacher("http://127.0.0.1:9", vocab_size=VOCAB)
    teacher.restrict(vocab_size=12, server_vocab_size=12)
    with pytest.raises(AnswerError, match="id 0 where 9 was sent"):
        teacher._read_answer(said, sent)
    teacher.restrict(vocab_size=10, server_vocab_size=10)
    assert teacher._read_answer(said, sent).log_probs_N.tolist() == [-1.0]


def spoken(ids: Any = (3, 5), log_probs: Any = (-1.5, -0.25), **meta: Any) -> dict[str, Any]:
    entries = [[log_prob, token, None] for token, log_prob in zip(ids, log_probs, strict=False)]
    known = {"prompt_tokens": 4, "finish_reason": {"type": "length", "length": 2}, "weight_version": "v3"}
    return {"output_ids": list(ids), "meta_info": {"output_token_logprobs": entries, **known, **meta}}


def test_a_response_is_read_with_its_end() -> None:
    cut = read_response(spoken(), 4, 2, VOCAB)
    assert cut.response is not None
    assert (cut.response.tokens_T.tolist(), cut.response.ended, cut.weight_version) == ([3, 5], False, "v3")
    whole = read_response(spoken(finish_reason={"type": "stop", "matched": 5}), 4, 12, VOCAB)
    assert whole.response is not None
    assert whole.response.ended


@pytest.mark.parametrize(
    ("bad", "reason", "kind"),
    [
        (spoken(prompt_tokens=5), "to a prompt of 5 tokens, 4 sent", FailureKind.WRONG_LENGTH),
        (spoken((3, 5, 5), (-1, -1, -1)), "of 3 tokens, asked for were 1 to 2", FailureKind.WRONG_LENGTH),
        (spoken((), ()), "of 0 tokens, asked for were 1 to 2", FailureKind.WRONG_LENGTH),
        (spoken(log_probs=(-1,)), "1 tokens in the answer, 2 expected", FailureKind.WRONG_LENGTH),
        (spoken((3, VOCAB)), "has id 10, outside the vocabulary of 10", FailureKind.WRONG_IDS),
        (spoken((-1, 3)), "has id -1, outside", FailureKind.WRONG_IDS),
        (spoken(output_token_logprobs=[[-1, 3, None], [-1, 4, None]]), "are not those of its", FailureKind.WRONG_IDS),
        (spoken(finish_reason={"type": "stop", "matched": 7}), "are not those of its", FailureKind.WRONG_IDS),
        (spoken(log_probs=(-1, None)), "None is not a log-probability", FailureKind.NOT_FINITE),
        (
            spoken(finish_reason={"type": "stop", "matched": "NaN happened"}),
            "ended because the model's logits are NaN",
            FailureKind.NOT_FINITE,
        ),
        (spoken(log_probs=(-1, 0.5)), "0.5 is not a log-probability", FailureKind.NOT_FINITE),
        (spoken(("3", 5)), "no list output_ids", FailureKind.MALFORMED),
        (spoken((True, 5)), "no list output_ids", FailureKind.MALFORMED),
        (spoken(finish_reason=None), "ended for a reason that is not known .None.", FailureKind.MALFORMED),
        (spoken(finish_reason={"type": "abort", "message": "full"}), "aborted the request", FailureKind.ABORTED),
    ],
)
def test_a_response_to_anything_else_is_refused(bad: Any, reason: str, kind: FailureKind) -> None:
    with pytest.raises(AnswerError, match=reason) as caught:
        read_response(bad, 4, 2, VOCAB, VOCAB)
    assert caught.value.kind == kind


@pytest.mark.parametrize("known", [None, VOCAB + 3])
@pytest.mark.parametrize("place", [0, 1])
def test_a_response_is_cut_before_a_token_that_the_student_lacks(known: int | None, place: int) -> None:
    """As a Megatron teacher's: the end of the whole is no end of what is left."""
    ids = [3, 5]
    ids[place] = VOCAB + 2
    said = spoken(ids, finish_reason={"type": "stop", "matched": ids[-1]})
    reading = read_response(said, 4, 2, VOCAB, known)
    assert reading.response is not None
    assert reading.response.tokens_T.tolist() == ids[:place]
    assert len(reading.log_probs_N) == place
    assert not reading.response.ended


def test_only_the_last_id_of_the_vocabulary_may_come_back_as_0() -> None:
    renamed = answer(GOOD[0], [-1.5, 0, None], GOOD[2])
    reading = read_answer(renamed, np.array([7, 9, 5]), VOCAB)
    np.testing.assert_array_equal(reading.log_probs_N, [-1.5, -0.25])
    with pytest.raises(AnswerError, match="id 0 where 8 was sent"):
        read_answer(renamed, np.array([7, 8, 5]), VOCAB)


def flat(ids: Any, log_probs: Any, **changes: Any) -> dict[str, Any]:
    """A good answer with the flat form of the most probable tokens ``[2, K]``."""
    fields: dict[str, Any] = {"input_top_logprobs_shape": list(np.shape(ids)), "input_top_logprobs_null_prefix": 1}
    for side, values, dtype in (("idx", ids, "int32"), ("val", log_probs, "float32")):
        key = f"input_top_logprobs_{side}_flat_b64"
        fields[key] = base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()
        fields[f"{key}_dtype"] = dtype
    return answer(*GOOD, **(fields | changes))


# The sent tokens 3 and 5 have log-probabilities -1.5 and -0.25: the first is not among its two most probable ones.
TOP_IDS = [[1, 4], [5, 2]]
TOP_LOG_PROBS = [[-1.0, -1.25], [-0.25, -2.0]]


def test_the_most_probable_tokens_and_the_tail_are_read() -> None:
    top = read_answer(flat(TOP_IDS, TOP_LOG_PROBS), SENT, VOCAB, top_k=2).top
    assert top is not None
    np.testing.assert_array_equal(top.ids_NK, TOP_IDS)
    np.testing.assert_array_equal(top.log_probs_NK, np.float32(TOP_LOG_PROBS))
    np.testing.assert_allclose(np.exp(top.tail_log_mass_N), 1 - np.exp(TOP_LOG_PROBS).sum(axis=1), rtol=1e-6)
    assert [array.dtype for array in (top.ids_NK, top.log_probs_NK, top.tail_log_mass_N)] == [
        np.int32,
        np.float32,
        np.float32,
    ]


def test_the_tail_of_the_whole_vocabulary_is_empty_and_rounding_leaves_none_too_large() -> None:
    answer = flat([[1, 2], [0, 2]], [[0.0, -30.0], [-0.25, -1.5087]])
    answer["meta_info"]["input_token_logprobs"] = [[None, 0, None], [0.0, 1, None], [-0.25, 0, None]]
    sent = np.array([0, 1, 0])
    top = read_answer(answer, sent, VOCAB, top_k=2).top
    assert top is not None
    assert np.exp(top.tail_log_mass_N[0]) < 1e-7
    whole = read_answer(
        flat([[1, 0], [0, 1]], [[-0.5, -0.9328], [-0.25, -1.5087]])
        | {
            "meta_info": answer["meta_info"]
            | flat([[1, 0], [0, 1]], [[0.0, -30.0], [-0.25, -1.5087]])["meta_info"]
            | {"input_token_logprobs": answer["meta_info"]["input_token_logprobs"]}
        },
        sent,
        2,
        top_k=2,
    ).top
    assert whole is not None
    assert np.isneginf(whole.tail_log_mass_N).all()


@pytest.mark.parametrize(
    ("bad", "reason", "kind"),
    [
        (flat(TOP_IDS[:1], TOP_LOG_PROBS[:1]), "of shape", FailureKind.WRONG_LENGTH),
        (flat(TOP_IDS, TOP_LOG_PROBS, input_top_logprobs_null_prefix=0), "after 0 tokens", FailureKind.WRONG_LENGTH),
        (flat(TOP_IDS, TOP_LOG_PROBS[:1], input_top_logprobs_shape=[2, 2]), "2 values in", FailureKind.WRONG_LENGTH),
        (flat([[1, 4], [2, 5]], [[-1.0, -1.25], [-2.0, -0.25]]), "not in descending", FailureKind.TOP_K),
        (flat([[1, 1], [5, 2]], TOP_LOG_PROBS), "name a token twice", FailureKind.TOP_K),
        (flat([[1, 10], [5, 2]], TOP_LOG_PROBS), "outside the vocabulary", FailureKind.TOP_K),
        (flat([[1, -4], [5, 2]], TOP_LOG_PROBS), "outside the vocabulary", FailureKind.TOP_K),
        (flat(TOP_IDS, [[-0.1, -0.2], [-0.25, -2.0]]), "a mass of 1.7", FailureKind.TOP_K),
        (flat(TOP_IDS, [[-1.0, -1.25], [-0.5, -2.0]]), "contradict", FailureKind.TOP_K),
        (flat(TOP_IDS, [[-2.0, -2.25], [-0.25, -2.0]]), "contradict", FailureKind.TOP_K),
        (flat(TOP_IDS, [[-1.0, np.nan], [-0.25, -2.0]]), "is none", FailureKind.NOT_FINITE),
        (flat(TOP_IDS, [[-1.0, -np.inf], [-0.25, -2.0]]), "is none", FailureKind.NOT_FINITE),
        (flat(TOP_IDS, TOP_LOG_PROBS, input_top_logprobs_idx_flat_b64="?"), "no array", FailureKind.MALFORMED),
        (flat(TOP_IDS, TOP_LOG_PROBS, input_top_logprobs_val_flat_b64_dtype="O"), "dtype", FailureKind.MALFORMED),
        (answer(*GOOD), "0.5.23 or later", FailureKind.MALFORMED),
    ],
)
def test_most_probable_tokens_that_cannot_be_are_refused(bad: Any, reason: str, kind: FailureKind) -> None:
    with pytest.raises(AnswerError, match=reason) as caught:
        read_answer(bad, SENT, VOCAB, top_k=2)
    assert caught.value.kind == kind


def test_values_of_given_ids_are_read_in_the_order_asked() -> None:
    rows = [None, [[-1.0, 2, None], [-2.0, 6, None]], [[-3.0, 2, None], [-4.0, 6, None]]]
    reading = read_answer(answer(*GOOD, input_token_ids_logprobs=rows), SENT, VOCAB, union=np.array([2, 6]))
    np.testing.assert_array_equal(reading.union_log_probs_NU, [[-1.0, -2.0], [-3.0, -4.0]])
    with pytest.raises(AnswerError, match="other ids than those asked for"):
        read_answer(answer(*GOOD, input_token_ids_logprobs=rows), SENT, VOCAB, union=np.array([2, 5]))
    with pytest.raises(AnswerError, match="1 tokens in the answer, 2 expected"):
        read_answer(answer(*GOOD, input_token_ids_logprobs=rows[:1]), SENT, VOCAB, union=np.array([2, 6]))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([[-0.1, 2, None], [-0.2, 6, None]], "a mass of 1.7"),
        ([[-1.0, 2, None], [-0.9, 3, None]], "contradict the token's own log-probability"),
    ],
)
def test_values_of_given_ids_that_cannot_be_are_refused(values: list[Any], reason: str) -> None:
    asked = np.array([entry[1] for entry in values])
    rows = [None, values, [[-3.0, asked[0], None], [-4.0, asked[1], None]]]
    with pytest.raises(AnswerError, match=reason) as caught:
        read_answer(answer(*GOOD, input_token_ids_logprobs=rows), SENT, VOCAB, union=asked)
    assert caught.value.kind is FailureKind.TOP_K


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
    with pytest.raises(TeacherFailure, match=r"sample 4 .* outside the vocabulary of 10; not sent") as caught:
        nobody.score([sample([1], [2]), sample(*tokens)])
    assert caught.value.kind == FailureKind.UNSCORABLE


def test_the_servers_limits_bound_what_is_sent(nobody: SGLangTeacher) -> None:
    nobody.restrict(vocab_size=5, max_tokens=3)
    with pytest.raises(TeacherError, match="outside the vocabulary of 5"):
        nobody.score([sample([1], [5])])
    with pytest.raises(TeacherFailure, match="takes at most 3 tokens") as caught:
        nobody.score([sample([1, 2], [3, 4])])
    assert caught.value.kind == FailureKind.OVERLONG
    with pytest.raises(TeacherError, match="refused"):
        nobody.score([sample([1, 2], [3])])


def test_empty_responses_are_not_sent(nobody: SGLangTeacher) -> None:
    teacher: Teacher = nobody
    scores = teacher.score([sample([1, 2], []), sample([], [])])
    assert [score.log_probs_T.shape for score in scores] == [(0,), (0,)]
    assert teacher.score([]) == []
    teacher.close()


def test_more_most_probable_tokens_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(UserError, match="--opd-top-k 11 is more than the 10 tokens"):
        SGLangTeacher("http://127.0.0.1:1", vocab_size=10, top_k=11)
    teacher = SGLangTeacher("http://127.0.0.1:1", vocab_size=10, top_k=10)
    with pytest.raises(UserError, match="--opd-top-k 10 is more than the 9 tokens"):
        teacher.restrict(vocab_size=9)


def test_a_union_of_ids_that_costs_too_much_is_refused_with_the_reason() -> None:
    teacher = SGLangTeacher("http://127.0.0.1:1", vocab_size=10, max_union_ids=3)
    asked = sample([1], [2, 3])

    def score_ids(ids: Any) -> None:
        asyncio.run(teacher.score_ids(asked, np.array(ids)))

    with pytest.raises(TeacherFailure, match=r"4 different ids at 2 positions.*at most 3.*--opd-max-union-ids"):
        score_ids([[1, 2], [3, 4]])
    with pytest.raises(TeacherFailure, match="outside the vocabulary of 10"):
        score_ids([[1, 2], [1, 10]])
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for 2 response tokens"):
        score_ids([[1, 2]])
