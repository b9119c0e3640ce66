"""Prompt files and prompt sets, with real tokenizers trained on the spot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd_megatron.config.errors import UserError
from opd_megatron.data.prompts import (
    PromptRecord,
    PromptSet,
    check_prompt_file,
    load_prompt_records,
    text_of_records,
)
from opd_megatron.data.rows import split_slice, write_jsonl
from opd_megatron.data.tokenizer import train_bpe_tokenizer

TEXTS = ["How many apples are there?", "user assistant system", "naïve café 12 + 34 = 46\n"] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_bpe_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("bpe"))


def sentence_tokenizer() -> Any:
    """A tokenizer that puts ``<s>`` before and ``</s>`` after a text, as some real ones do."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    template = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def load(path: Path | str, tokenizer: Any, **changes: Any) -> list[PromptRecord]:
    settings: dict[str, Any] = {
        "input_key": "prompt",
        "label_key": None,
        "metadata_key": "metadata",
        "apply_chat_template": False,
        "chat_template_kwargs": {},
    }
    return load_prompt_records(str(path), tokenizer=tokenizer, **{**settings, **changes})


def check(path: Path | str, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"input_key": "prompt", "label_key": None, "metadata_key": "metadata"}
    return check_prompt_file(str(path), **{**settings, **changes})


def records(count: int) -> list[PromptRecord]:
    return [PromptRecord(i, f"p{i}", f"p{i}", np.array([i, i + 1]), str(i), {}) for i in range(count)]


# Texts


def test_texts_are_prompts_with_labels_that_are_texts(tokenizer: Any) -> None:
    def record(index: int, prompt: str, label: Any) -> PromptRecord:
        return PromptRecord(index, prompt, prompt, np.array(tokenizer.encode(prompt)), label, {})

    long = "there are 12 apples, and then 34"
    rows = [record(0, "How many apples?", long), record(1, "What is 12 + 34?", "46"), record(2, "a", None)]
    texts = [tokenizer.decode(text) for text in text_of_records(rows, tokenizer, count=9, longest=100)]
    assert texts == ["How many apples?" + long, "What is 12 + 34?"]
    assert [len(text) for text in text_of_records(rows, tokenizer, count=9, longest=5)] == [5, 5]
    many = [record(i, f"How many {i:03d}", None) for i in range(100)]
    spread = [tokenizer.decode(text) for text in text_of_records(many, tokenizer, count=4, longest=100)]
    assert spread == ["How many 000", "How many 025", "How many 050", "How many 075"]


# Reading


@pytest.mark.parametrize("bounds", ["2:5", ":3", "4:", ":", "-2:", ":-3", "-4:-1", "0:100"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_slice_takes_the_rows_python_would_take(bounds: str, suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"apples {i}", "label": str(i)} for i in range(7)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # blank lines between
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    start, stop = (int(bound) if bound else None for bound in bounds.split(":"))
    loaded = load(f"{path}@[{bounds}]", tokenizer)
    assert [(item.prompt, item.label) for item in loaded] == [
        (row["prompt"], row["label"]) for row in rows[slice(start, stop)]
    ]
    assert [item.index for item in loaded] == list(range(len(loaded)))


def test_a_slice_that_is_not_one_is_refused_and_a_name_with_an_at_sign_is_a_name() -> None:
    assert split_slice("team@home/a.jsonl") == ("team@home/a.jsonl", slice(None))
    for name in ("a.jsonl@[3]", "a.jsonl@[1:2:3]", "a.jsonl@[x:]", "a.jsonl@[1:2", "@[1:2]"):
        with pytest.raises(ValueError, match="slice is written"):
            split_slice(name)


def test_parquet_and_jsonl_carry_the_same_records(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"q": [{"role": "user", "content": f"apples {i}"}], "a": i, "extra": {"level": i, "tag": "x"}} for i in range(3)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    changes = {"input_key": "q", "label_key": "a", "metadata_key": "extra", "apply_chat_template": True}
    first, second = (load(tmp_path / name, tokenizer, **changes) for name in ("rows.jsonl", "rows.parquet"))
    for row, one, other in zip(rows, first, second, strict=True):
        assert one.prompt == other.prompt == row["q"]
        assert one.label == other.label == row["a"]
        assert one.metadata == other.metadata == row["extra"]
        np.testing.assert_array_equal(one.prompt_tokens, other.prompt_tokens)


def test_without_a_label_key_only_rows_with_a_label_have_one(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "label": "7"}, {"prompt": "b", "metadata": None}])
    assert [item.label for item in load(tmp_path / "rows.jsonl", tokenizer)] == ["7", None]
    assert check(tmp_path / "rows.jsonl") == []
    assert "line 2: no field 'label' for --label-key" in check(tmp_path / "rows.jsonl", label_key="label")[0]


# Faults


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "not a JSON object"),
        (r'{"prompt": "a", "label": "1\udfff2"}', "has half of a character"),
        ('{"question": "a", "answer": 1}', "no field 'prompt' for --input-key (fields: question, answer)"),
        ('{"prompt": 3}', "neither text nor a list of messages"),
        ('{"prompt": []}', "neither text nor a list of messages"),
        ('{"prompt": ""}', "'prompt' is empty"),
        ('{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}', "entry 2 of 'prompt' is not a message"),
        ('{"prompt": "a", "metadata": "b"}', "'metadata' is not a mapping"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line: str, phrase: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line + "\n", encoding="utf-8")
    faults = check(path)
    assert len(faults) == 1
    assert faults[0].startswith(f"{path}, line 3: ")
    assert phrase in faults[0]
    with pytest.raises(UserError, match="line 3"):
        load(path, tokenizer, apply_chat_template=True)
    assert check(f"{path}@[:1]") == [], "rows outside the slice are not the run's business"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n", encoding="utf-8")
    (tmp_path / "one.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (tmp_path / "bad.parquet").write_text("text", encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "naïve"}\n'.encode("latin-1"))
    for name, phrase in {
        "missing.jsonl": "no such file",
        "": "not a file",
        "empty.jsonl": "no rows",
        "one.jsonl@[5:]": "slice is empty (the file has 1 rows)",
        "one.jsonl@[5]": "slice is written",
        "bad.parquet": "not a Parquet file",
        "latin.jsonl": "line 1: not JSON",
    }.items():
        faults = check(f"{tmp_path}/{name}")
        assert len(faults) == 1, name
        assert phrase in faults[0]
        assert "\n" not in faults[0]


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    """The same fault once, with the first row that has it; of different ones the first three."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"prompt": "a"}] + [{"prompt": "a", "metadata": "m"}] * 9 + [{"text": "a"}])
    first, second = check(path)
    assert first == (
        f"{path}, line 2 (and 8 more rows): field 'metadata' is not a mapping (--metadata-key names another)"
    )
    assert second.startswith(f"{path}, line 11: no field 'prompt'")
    write_jsonl(path, [{f"text {number}": "a"} for number in range(9)])
    faults = check(path)
    assert [fault.split(":")[0][-6:] for fault in faults[:3]] == ["line 1", "line 2", "line 3"]
    assert faults[3:] == ["6 more such rows"]


# Tokens


def test_the_chat_template_makes_the_prompt(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "user"}, {"role": "user", "content": "How many?"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": messages}, {"prompt": "How many?"}])
    first, second = load(tmp_path / "rows.jsonl", tokenizer, apply_chat_template=True)
    assert first.prompt_text == (
        "<|im_start|>system\nuser<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.prompt_text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert first.prompt == messages
    assert second.prompt == "How many?"
    for record in (first, second):
        assert record.prompt_tokens.dtype == np.int64
        assert tokenizer.decode(record.prompt_tokens) == record.prompt_text
        starts = int((record.prompt_tokens == tokenizer.convert_tokens_to_ids("<|im_start|>")).sum())
        assert starts == record.prompt_text.count("<|im_start|>"), "special tokens of a template are single ids"


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    tokenizer = sentence_tokenizer()
    tokenizer.chat_template = "{{ 'b' if thinking else 'a' }}{{ '<s>' if add_generation_prompt }}"
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    for arguments, text in (({}, "a<s>"), ({"thinking": True}, "b<s>"), ({"add_generation_prompt": False}, "a")):
        (record,) = load(tmp_path / "rows.jsonl", tokenizer, apply_chat_template=True, chat_template_kwargs=arguments)
        assert record.prompt_text == text


def test_special_tokens_appear_once_and_no_end_token_is_appended(tmp_path: Path) -> None:
    tokenizer = sentence_tokenizer()
    assert tokenizer("ab")["input_ids"] == [0, 3, 4, 1]
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "ab"}, {"prompt": "b</s>"}])
    plain = load(tmp_path / "rows.jsonl", tokenizer)
    assert [list(item.prompt_tokens) for item in plain] == [[0, 3, 4], [0, 4, 1, 1]]
    templated = load(f"{tmp_path}/rows.jsonl@[:1]", tokenizer, apply_chat_template=True)
    assert list(templated[0].prompt_tokens) == [0, 3, 4]


def test_messages_without_a_template_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    assert check(tmp_path / "rows.jsonl") == []
    assert "give --apply-chat-template" in check(tmp_path / "rows.jsonl", apply_chat_template=False)[0]
    with pytest.raises(UserError, match=r"line 1.*give --apply-chat-template"):
        load(tmp_path / "rows.jsonl", tokenizer)
    bare = sentence_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        load(tmp_path / "rows.jsonl", bare, apply_chat_template=True)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"line 1: the chat template refuses this prompt \(roles must alternate\)"):
        load(tmp_path / "rows.jsonl", bare, apply_chat_template=True)


def test_importing_the_checks_loads_no_heavy_package() -> None:
    code = (
        "import sys, opd_megatron.data.prompts, opd_megatron.data.column_arithmetic; "
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'tokenizers') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


# Order


def test_every_epoch_holds_every_prompt_once_in_an_order_of_its_own() -> None:
    prompts = PromptSet(records(23), shuffle=True, seed=5)
    drawn = [item.index for _ in range(20) for item in prompts.next_batch(7)]
    epochs = [drawn[start : start + 23] for start in range(0, 138, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert prompts.epoch == 140 // 23
    same = PromptSet(records(23), shuffle=True, seed=5)
    assert [item.index for item in same.next_batch(140)] == drawn, "the batch size does not change the order"
    other = PromptSet(records(23), shuffle=True, seed=6)
    assert [item.index for item in other.next_batch(23)] != drawn[:23]


def test_without_shuffling_the_order_is_the_files() -> None:
    prompts = PromptSet(records(4), shuffle=False, seed=5)
    assert [item.index for item in prompts.next_batch(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert prompts.next_batch(0) == []


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("before", [0, 3, 9, 10, 26])
def test_a_restored_set_goes_on_where_the_saved_one_stood(shuffle: bool, before: int) -> None:
    straight = PromptSet(records(10), shuffle=shuffle, seed=2)
    straight.next_batch(before)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = PromptSet(records(10), shuffle=shuffle, seed=2)
    resumed.next_batch(4)
    resumed.load_state_dict(state)
    expected = [item.index for item in straight.next_batch(33)]
    assert [item.index for item in resumed.next_batch(33)] == expected


def test_a_position_in_other_prompts_or_another_order_is_refused() -> None:
    state = PromptSet(records(10), shuffle=True, seed=2).state_dict()
    relabelled = records(10)
    relabelled[3] = PromptRecord(3, "p3", "p3", np.array([3, 4]), "another", {})
    retokenised = records(10)
    retokenised[3] = PromptRecord(3, "p3", "p3", np.array([3, 9]), "3", {})
    for other in (records(9), relabelled, retokenised):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            PromptSet(other, shuffle=True, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="with --rollout-shuffle and with --seed 2"):
        PromptSet(records(10), shuffle=True, seed=3).load_state_dict(state)
    with pytest.raises(UserError, match="with --rollout-shuffle"):
        PromptSet(records(10), shuffle=False, seed=2).load_state_dict(state)
    in_order = PromptSet(records(10), shuffle=False, seed=2).state_dict()
    PromptSet(records(10), shuffle=False, seed=3).load_state_dict(in_order)


@pytest.mark.parametrize(("count", "epochs", "batch"), [(10, 1, 5), (10, 1, 3), (10, 3, 4), (7, 2, 14), (5, 1, 8)])
def test_the_length_of_a_run_in_epochs(count: int, epochs: int, batch: int) -> None:
    rollouts = PromptSet(records(count), shuffle=True, seed=1).rollouts_for_epochs(epochs, batch)

    def fewest_uses(batches: int) -> int:
        prompts = PromptSet(records(count), shuffle=True, seed=1)
        uses = Counter(item.index for _ in range(batches) for item in prompts.next_batch(batch))
        return min(uses[index] for index in range(count))

    assert fewest_uses(rollouts) >= epochs
    assert fewest_uses(rollouts - 1) < epochs


def test_a_set_needs_prompts() -> None:
    with pytest.raises(UserError, match="at least one"):
        PromptSet([], shuffle=False, seed=0)
