"""The synthetic task, against arithmetic done another way."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.data.column_arithmetic import (
    Problem,
    build_tokenizer,
    is_held_out,
    reward,
    sample_problems,
    verify,
)
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.sample import Sample, Status

KNOWN = {
    "4827+1936=": "7+6+0=13,2+3+1=06,8+9+0=17,4+1+1=06;6763",
    "5003-1807=": "3-7-0=16,0-0-1=19,0-8-1=11,5-1-1=03;3196",
    "9999+1000=": "9+0+0=09,9+0+0=09,9+0+0=09,9+1+0=10;10999",
    "9999+9999=": "9+9+0=18,9+9+1=19,9+9+1=19,9+9+1=19;19998",
    "4321-4321=": "1-1-0=00,2-2-0=00,3-3-0=00,4-4-0=00;0",
}


def answer_of(response: str, a: int, op: str, b: int) -> int:
    """Check every column of a response by whole-number arithmetic modulo powers of ten; return the answer."""
    columns, answer = response.split(";")
    for place, column in enumerate(columns.split(",")):
        left, right = column.split("=")
        x, y, flag = left.split(op)
        low = 10**place
        assert int(x) == a // low % 10
        assert int(y) == b // low % 10
        carried_in = (a % low + b % low) // low if op == "+" else int(a % low < b % low)
        assert int(flag) == carried_in
        above = low * 10
        carried_out = (a % above + b % above) // above if op == "+" else int(a % above < b % above)
        result = (a + b if op == "+" else a - b) // low % 10
        assert right == f"{carried_out}{result}"
        assert len(column) == 8
    assert columns.count(",") == 3
    return int(answer)


@pytest.mark.parametrize(("prompt", "response"), KNOWN.items())
def test_known_problems(prompt: str, response: str) -> None:
    problem = Problem.from_prompt(prompt)
    assert problem.prompt() == prompt
    assert problem.response() == response
    assert problem.answer() == response.split(";")[1]


def test_random_problems_agree_with_whole_number_arithmetic() -> None:
    generator = random.Random(11)
    for _ in range(5000):
        a, b = generator.randint(1000, 9999), generator.randint(1000, 9999)
        assert answer_of(Problem(a, "+", b).response(), a, "+", b) == a + b
        a, b = max(a, b), min(a, b)
        assert answer_of(Problem(a, "-", b).response(), a, "-", b) == a - b
        assert Problem(a, "-", b).answer() == str(a - b)


@pytest.mark.parametrize(("a", "op", "b"), [(999, "+", 1000), (1000, "+", 10000), (1000, "-", 1001), (1000, "*", 1000)])
def test_a_problem_outside_the_task_cannot_be_made(a: int, op: str, b: int) -> None:
    with pytest.raises(ValueError, match=r"numbers are|larger number|sign"):
        Problem(a, op, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["4827+1936", "4827+1936=7", "1000-2000=", "0999+1000=", "٤٨٢٧+1936=", ""])
def test_other_prompts_are_no_problems(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a problem|larger number|numbers are"):
        Problem.from_prompt(text)


# The held-out tenth


def test_the_held_out_tenth_is_fixed() -> None:
    """Pinned: another hash would let a new run train on what an old one held out."""
    generator = random.Random(3)
    problems = [Problem(generator.randint(5500, 9999), "-", generator.randint(1000, 5500)) for _ in range(20000)]
    share = np.mean([is_held_out(problem) for problem in problems])
    assert abs(share - 0.1) < 4 * (0.09 / 20000) ** 0.5
    assert [a for a in range(1000, 1060) if is_held_out(Problem(a, "+", 1936))] == [
        1006,
        1007,
        1009,
        1010,
        1031,
        1043,
        1046,
    ]
    assert [a for a in range(5000, 5060) if is_held_out(Problem(a, "-", 1936))] == [
        5005,
        5018,
        5025,
        5029,
        5048,
    ]


def test_both_orders_of_a_sum_are_on_one_side() -> None:
    generator = random.Random(4)
    for _ in range(500):
        a, b = generator.randint(1000, 9999), generator.randint(1000, 9999)
        assert is_held_out(Problem(a, "+", b)) == is_held_out(Problem(b, "+", a))


def test_samples_are_different_problems_of_one_side() -> None:
    train, held_out = sample_problems(3000, 7, held_out=False), sample_problems(1000, 7, held_out=True)
    assert len({problem.key() for problem in train + held_out}) == 4000
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    assert 0.45 < np.mean([problem.op == "+" for problem in train]) < 0.55
    assert any(len(problem.answer()) == 5 for problem in train)
    assert train[:100] == sample_problems(100, 7, held_out=False)
    assert train[:100] != sample_problems(100, 8, held_out=False)


# Tokenizer


@pytest.mark.parametrize("family", [None, "qwen2", "qwen3", "llama"])
def test_the_tokenizer_is_one_id_per_character_in_every_family(family: str | None, tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    if family is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    for problem in sample_problems(50, 1, held_out=False):
        text = problem.prompt() + problem.response()
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        with_end = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert tokenizer.decode(with_end, skip_special_tokens=True) == text
        assert tokenizer.decode(with_end) == text + "<eos><pad>"
    assert len(tokenizer) == 18
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_text_of_other_characters_still_has_tokens(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert tokenizer.encode("Paris 1\n") == [tokenizer.unk_token_id] * 6 + tokenizer.encode("1") + [
        tokenizer.unk_token_id
    ]


# Verifier


@pytest.mark.parametrize("problem", sample_problems(20, 5, held_out=True), ids=lambda problem: problem.prompt())
def test_only_the_right_number_that_ended_by_itself_counts(problem: Problem) -> None:
    prompt, response = problem.prompt(), problem.response()
    assert verify(prompt, response, True)
    assert verify(prompt, response + "<eos>", True)
    assert verify(prompt, ";" + problem.answer(), True), "the columns are not judged"
    assert not verify(prompt, response, False)
    for wrong in (
        response + "0",
        response + ";",
        response + " ",
        response[:-1],
        response.replace(";", ""),
        response.replace(";", ";0"),
        response.replace(";", ";;"),
        response + ";" + problem.answer(),
        response.split(";")[0] + f";{int(problem.answer()) + 1}",
        response + "<eos><eos>",
        "",
    ):
        assert not verify(prompt, wrong, True), wrong


def sample(response: str, label: str | None, status: Status = Status.COMPLETED, prompt: str = "4827+1936=") -> Sample:
    return Sample(4, 0, prompt, np.arange(3), label=label, response=response, status=status)


def test_the_reward_uses_the_label_and_else_the_prompt() -> None:
    right = KNOWN["4827+1936="]
    assert reward(sample(right, "6763")) == reward(sample(right, None)) == 1.0
    assert reward(sample(right, "6764")) == 0.0
    assert reward(sample(right, "6763", Status.TRUNCATED)) == 0.0
    assert reward(sample("", "6763", Status.PROMPT_TOO_LONG)) == 0.0
    with pytest.raises(UserError, match="sample 4: no label, and 'What'"):
        reward(sample(right, None, prompt="What"))
