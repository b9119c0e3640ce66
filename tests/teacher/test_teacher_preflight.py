"""The questions asked of any teacher, with real tokenizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.data.column_arithmetic import build_tokenizer
from opd_megatron.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from opd_megatron.teacher.preflight import (
    check_same_folder,
    check_same_model,
    check_scores,
    compare_encodings,
    encode,
    known_tokens,
    plausible,
    preflight_tokenizers,
    probe_texts,
)

CORPUS = ["the cat sat on the mat", "a man, a plan, a canal: Panama", "2 + 3 = 5"] * 4


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_bpe_tokenizer(CORPUS, 300, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tokenizer(tmp_path_factory.mktemp("characters"))


def rewritten(tokenizer: Any, folder: Path, change: Any) -> Any:
    """``tokenizer`` saved, its tokenizer.json changed by ``change``, and loaded again."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return load_tokenizer(folder)


def test_equal_tokenizers_pass_without_a_word(words: Any, characters: Any) -> None:
    assert preflight_tokenizers(words, words, "the teacher") == []
    assert preflight_tokenizers(characters, characters, "the teacher") == []


def test_the_first_differing_token_is_shown(words: Any, tmp_path: Path) -> None:
    a, b = words.convert_tokens_to_ids("x"), words.convert_tokens_to_ids("y")

    def swap(record: Any) -> None:
        record["model"]["vocab"]["x"], record["model"]["vocab"]["y"] = b, a

    first = words.convert_ids_to_tokens(min(a, b))
    with pytest.raises(
        UserError, match=rf"teacher T has another tokenizer .* token '{first}' \(id {min(a, b)}\) has id"
    ):
        preflight_tokenizers(words, rewritten(words, tmp_path, swap), "teacher T")


def test_a_token_that_the_teacher_lacks_is_shown_and_more_tokens_are_fine(words: Any, tmp_path: Path) -> None:
    larger = train_bpe_tokenizer(CORPUS, 300, tmp_path)
    larger.add_tokens(["<extra>"])
    assert preflight_tokenizers(words, larger, "T") == []
    with pytest.raises(UserError, match=r"token '<extra>' \(id \d+\) does not exist there"):
        preflight_tokenizers(larger, words, "T")


def test_equal_vocabularies_that_split_text_differently_are_refused(words: Any, tmp_path: Path) -> None:
    def drop_merges(record: Any) -> None:
        record["model"]["merges"] = []

    with pytest.raises(UserError, match=r"token \d+ of 'The capital.*for the student and .* for the teacher"):
        preflight_tokenizers(words, rewritten(words, tmp_path, drop_merges), "T")


def test_another_end_token_is_a_warning(words: Any, tmp_path: Path) -> None:
    other = train_bpe_tokenizer(CORPUS, 300, tmp_path)
    other.eos_token = "<|endoftext|>"
    assert "ends with" in preflight_tokenizers(words, other, "T")[0]


def test_a_longer_and_a_shorter_encoding_are_shown(words: Any) -> None:
    mine = encode(words, "cat")
    for theirs, shown in ((mine[:-1], "no token for the teacher"), ([*mine, 5], "is no token for the student")):
        with pytest.raises(UserError, match=shown):
            compare_encodings(["cat"], words, [theirs], "T", str)


def test_probes_hold_special_tokens_and_the_chat_template(words: Any, characters: Any) -> None:
    assert any("<|im_start|>user" in text for text in probe_texts(words))
    assert any("<eos>" in text for text in probe_texts(characters))


def test_known_tokens_are_a_text_that_the_tokenizer_can_spell(words: Any, characters: Any) -> None:
    assert words.decode(known_tokens(words, 300)).startswith("The capital of France")
    own = "4827+1936="
    np.testing.assert_array_equal(known_tokens(characters, 20, [own]), encode(characters, own))
    few = known_tokens(characters, 20, ["no such letters"])
    assert len(few) >= 4
    assert few.max() < 20


def test_scores_must_be_finite_repeatable_and_not_all_equal() -> None:
    good = np.array([-1.0, -2.0, -0.5])
    check_scores(good, good + 5e-4, "T")
    for bad, again, reason in (
        (np.array([-1.0, np.nan, -2.0]), good, "finite"),
        (good, np.array([-1.0, -np.inf, -2.0]), "finite"),
        (-good, -good, "at most 0"),
        (good, good - 0.01, "differs by 0.01"),
        (np.full(3, -2.5), np.full(3, -2.5), "every token has log-probability -2.5"),
    ):
        with pytest.raises(UserError, match=reason):
            check_scores(bad, again, "T")


def test_worse_than_guessing_is_a_warning() -> None:
    guess = np.full(5, -math.log(1000))
    assert plausible(guess, 1000, "T") is None
    assert "worse than guessing (-6.91)" in str(plausible(guess - 1.5, 1000, "T"))


def test_the_student_itself_is_recognised_by_scores_and_by_folder(tmp_path: Path) -> None:
    scores = np.array([-1.0, -2.0])
    assert "same log-probabilities as the student" in str(check_same_model(scores, scores + 5e-5, "T"))
    assert check_same_model(scores, scores + np.array([0.0, 1e-3]), "T") is None
    (tmp_path / "student").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "student")
    folders = [tmp_path / "missing", tmp_path / "student"]
    assert "where the student starts" in str(check_same_folder(folders, str(tmp_path / "link"), "T"))
    assert check_same_folder(folders, str(tmp_path), "T") is None
    assert check_same_folder(folders, "Qwen/Qwen3-1.7B", "T") is None
