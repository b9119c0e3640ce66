"""Responses that stand in the data: whose they are, and which rows cannot give one."""

from __future__ import annotations

from typing import Any

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.rollout.given import GivenResponses
from tests.megatron.support import make_options
from tests.rollout.records import Record


class Letters:
    """A tokenizer of one token per letter."""

    eos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def options(fraction: float, **flags: Any) -> Options:
    return make_options(
        use_opd=True,
        opd_student_data_fraction=fraction,
        opd_data_response_key="answer",
        rollout_max_response_len=4,
        **flags,
    )


def choice(fraction: float, rollout_id: int, seed: int = 3, count: int = 400) -> list[bool]:
    given = GivenResponses(options(fraction, seed=seed), Letters())
    return [given.chosen(Record("ab", index=place), rollout_id) for place in range(count)]


def test_the_choice_is_a_function_of_seed_rollout_and_prompt() -> None:
    found = choice(0.7, 5)
    assert 0.2 < sum(found) / len(found) < 0.4  # 0.3 within four standard errors
    assert found == choice(0.7, 5)
    assert found != choice(0.7, 6)
    assert found != choice(0.7, 5, seed=4)
    given = GivenResponses(options(0.7, seed=3), Letters())
    assert [given.chosen(Record("b", index=place), 5) for place in reversed(range(400))] == found[::-1]


def test_the_ends_leave_no_chance() -> None:
    assert not any(choice(1.0, 0))
    assert all(choice(0.0, 0))


def test_a_prompt_that_is_too_long_has_no_response() -> None:
    given = GivenResponses(options(0.0, rollout_max_prompt_len=1), Letters())
    assert [given.chosen(Record(prompt), 0) for prompt in ("a", "ab")] == [True, False]


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({}, r"row 7 of --prompt-data \(counted from 0\) has nothing in the field 'answer' of --opd-data-response-key"),
        ({"answer": ""}, "has nothing in the field"),
        ({"answer": ["a"]}, "has a list in the field"),
        ({"answer": "abcd"}, "a response of 5 tokens in 'answer', the end token included, more than"),
        ({"answer": "abc"}, "has 6 tokens with its response in 'answer', the model 5 positions"),
    ],
)
def test_rows_without_a_fitting_response_are_refused(extras: dict[str, Any], message: str) -> None:
    row = Record("ab", index=7, extras=extras)
    with pytest.raises(UserError, match=message):
        GivenResponses(options(0.5), Letters()).check([Record("ab", extras={"answer": "a"}), row], positions=5)
    GivenResponses(options(1.0), Letters()).check([row], positions=5)
