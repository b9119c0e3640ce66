"""Prompts of a student that is its own teacher, with real tokenizers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.parse import parse_options
from opd_megatron.data.privileged import extra_keys, with_teacher_prompts
from opd_megatron.data.prompts import PromptRecord, PromptSet
from opd_megatron.data.tokenizer import train_bpe_tokenizer
from tests.data.test_prompts import TEXTS, load, sentence_tokenizer

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = train_bpe_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("bpe"))
    tokenizer.chat_template = CHAT
    return tokenizer


def options_of(path: Path, *flags: str) -> Options:
    taught = ["--use-opd", "--opd-type", "megatron", "--opd-teacher", "self", "--prompt-data", str(path)]
    return parse_options([*taught, *flags])


def seen(path: Path, rows: list[dict[str, Any]], tokenizer: Any, *flags: str) -> list[PromptRecord]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = options_of(path, *flags)
    chat = options.data.apply_chat_template
    records = load(path, tokenizer, extra_keys=extra_keys(options), apply_chat_template=chat)
    return with_teacher_prompts(options, records, tokenizer)


def text_of(tokenizer: Any, record: PromptRecord) -> str:
    assert record.teacher_prompt_tokens is not None
    return str(tokenizer.decode(record.teacher_prompt_tokens))


def test_context_and_prompt_stand_where_the_template_says(tmp_path: Path, tokenizer: Any) -> None:
    """A brace in either text is a character; the student's own prompt is what it was."""
    rows = [
        {"prompt": "12 + {context} =", "solution": "it is {prompt}"},
        {"prompt": "a", "metadata": {"solution": "b"}},
    ]
    flags = ("--opd-self-context-key", "solution", "--opd-self-template", "Q {prompt} H {context} Q {prompt}")
    found = seen(tmp_path / "rows.jsonl", rows, tokenizer, *flags)
    assert [text_of(tokenizer, record) for record in found] == [
        "Q 12 + {context} = H it is {prompt} Q 12 + {context} =",
        "Q a H b Q a",
    ]
    assert [tokenizer.decode(record.prompt_tokens) for record in found] == ["12 + {context} =", "a"]
    assert "solution" not in found[0].metadata


def test_the_teacher_s_prompt_is_encoded_as_the_student_s_is(tmp_path: Path) -> None:
    """With a leading token of the tokenizer's own, and without the end token that it appends."""
    (record,) = seen(
        tmp_path / "rows.jsonl",
        [{"prompt": "ab", "hint": "bb"}],
        sentence_tokenizer(),
        *("--opd-self-context-key", "hint", "--opd-self-template", "{context}{prompt}"),
    )
    assert record.prompt_tokens.tolist() == [0, 3, 4]
    assert record.teacher_prompt_tokens is not None
    assert record.teacher_prompt_tokens.tolist() == [0, 4, 4, 3, 4]


def test_with_a_chat_template_the_context_goes_into_the_user_s_last_message(tmp_path: Path, tokenizer: Any) -> None:
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "12 + 34"},
        {"role": "assistant", "content": "well"},
    ]
    rows = [{"prompt": talk, "label": "46"}, {"prompt": "apples", "label": "12"}]
    flags = ("--apply-chat-template", "--opd-self-context-key", "label", "--opd-self-template", "{prompt} ({context})")
    found = seen(tmp_path / "rows.jsonl", rows, tokenizer, *flags)
    assert [text_of(tokenizer, record) for record in found] == [
        "[system]s[user]first[assistant]so[user]12 + 34 (46)[assistant]well[me]",
        "[user]apples (12)[me]",
    ]
    assert talk[3]["content"] == "12 + 34"
    assert found[0].prompt == talk


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"row 1 of --prompt-data .* has nothing in the field 'hint'"),
        ({"prompt": "a", "hint": ""}, "has nothing in the field 'hint'"),
        ({"prompt": "a", "hint": None}, "has nothing in the field 'hint'"),
        ({"prompt": "a", "hint": 3}, "has a int in the field 'hint'"),
        ({"prompt": [{"role": "system", "content": "s"}], "hint": "h"}, "needs a message of the user with a text"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}], "hint": "h"}, "needs a message of the user"),
    ],
)
def test_a_row_that_the_teacher_cannot_see_more_of_is_refused(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], message: str
) -> None:
    flags = ("--apply-chat-template", "--opd-self-context-key", "hint")
    with pytest.raises(UserError, match=message):
        seen(tmp_path / "rows.jsonl", [{"prompt": "a", "hint": "h"}, row], tokenizer, *flags)


def test_another_context_is_another_prompt_set(tmp_path: Path, tokenizer: Any) -> None:
    """A run does not resume on rows whose hidden part was changed; without a context nothing is as it was not."""
    flags = ("--opd-self-context-key", "hint")
    row = {"prompt": "a", "label": "b"}
    saved = PromptSet(seen(tmp_path / "one.jsonl", [row | {"hint": "x"}], tokenizer, *flags), False, 0).state_dict()
    other = PromptSet(seen(tmp_path / "two.jsonl", [row | {"hint": "y"}], tokenizer, *flags), False, 0)
    with pytest.raises(UserError, match="the prompts are not those of the checkpoint"):
        other.load_state_dict(saved)
    retold = (*flags, "--opd-self-template", "{prompt}{context}")
    told = PromptSet(seen(tmp_path / "one.jsonl", [row | {"hint": "x"}], tokenizer, *retold), False, 0)
    with pytest.raises(UserError, match="the prompts are not those of the checkpoint"):
        told.load_state_dict(saved)
    # A run may go on with another teacher, and take up a context where it had none.
    plain = PromptSet([replace(record, teacher_prompt_tokens=None, extras={}) for record in told.records], False, 0)
    plain.load_state_dict(saved)
    told.load_state_dict(plain.state_dict())
