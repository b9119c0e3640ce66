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
from opd_megatron.teacher.megatron import MegatronTeacher, check_vocabulary, preflight_megatron
from opd_megatron.teacher.preflight import (
    Student,
    check_scores,
    judged_texts,
    known_tokens,
    plausibility,
    same_model_warnings,
)
from opd_megatron.teacher.tokenizer_checks import (
    chat_questions,
    compare_chat_templates,
    compare_encodings,
    encode,
    encode_chat,
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


def test_another_chat_template_is_shown_by_its_first_token(words: Any, tmp_path: Path) -> None:
    other = train_bpe_tokenizer(CORPUS, 300, tmp_path)
    other.chat_template = words.chat_template.replace("assistant\\n", "bot\\n")
    chats = [encode_chat(words, chat) for chat in chat_questions({})]
    assert compare_chat_templates(words, {}, chats, "T", str) is None
    theirs = [encode_chat(other, chat) for chat in chat_questions({})]
    place = next(i for i, (a, b) in enumerate(zip(chats[0], theirs[0], strict=False)) if a != b)
    fault = str(compare_chat_templates(words, {}, theirs, "T", words.convert_ids_to_tokens))
    assert f"token {place} of a chat is 'a' (id {chats[0][place]}) for the student and 'b'" in fault


def test_the_settings_of_the_run_reach_the_chat_template(words: Any, tmp_path: Path) -> None:
    thinking = train_bpe_tokenizer(CORPUS, 300, tmp_path)
    thinking.chat_template = words.chat_template + "{% if thinking %}hm{% endif %}"
    chats = chat_questions({"thinking": True})
    assert encode_chat(thinking, chats[0])[-2:] == encode(words, "hm")
    assert encode_chat(thinking, chats[1]) == encode_chat(words, chats[1])


def test_a_smaller_vocabulary_is_refused(words: Any) -> None:
    class Teacher(MegatronTeacher):
        def __init__(self) -> None:
            self.name, self.vocab_size = "small", highest

    highest = max(words.get_vocab().values())
    with pytest.raises(
        UserError, match=rf"vocabulary of {highest} tokens, the student's tokenizer has ids to {highest}"
    ):
        preflight_megatron(Teacher(), Student(words), words)


def test_ids_that_only_the_students_model_has_are_a_warning(words: Any) -> None:
    """Rows of a padded embedding are in no text, but can be sampled."""
    size = max(words.get_vocab().values()) + 3
    for own, count in ((None, 0), (size, 0), (size - 1, 0), (size + 7, 1)):
        found = check_vocabulary("teacher T", Student(words, vocab_size=own), words, vocab_size=size)
        warnings = [finding.text for finding in found if finding.warning]
        assert len(warnings) == count
    assert f"teacher T knows {size} ids, the student's model {size + 7}: the other 7" in warnings[0]


def test_known_tokens_are_a_text_that_the_tokenizer_can_spell(words: Any, characters: Any) -> None:
    assert words.decode(known_tokens(Student(words), 300)).startswith("The capital of France")
    own = np.array(encode(characters, "4827+1936="))
    np.testing.assert_array_equal(known_tokens(Student(characters, texts=[own]), 20), own)
    few = known_tokens(Student(characters), 20)
    assert len(few) >= 4
    assert few.max() < 20
    assert judged_texts(Student(characters)) == []
    assert len(judged_texts(Student(words), longest=5)[0]) == 5
    np.testing.assert_array_equal(judged_texts(Student(words, texts=[own]))[0], own)


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


def test_plausibility_compares_with_guessing_and_with_the_student() -> None:
    def texts(mean: float) -> list[np.ndarray]:
        return [np.full(5, mean), np.full(3, mean)]

    def judge(teacher: float, student: float | None) -> tuple[bool, str]:
        found = plausibility(texts(teacher), None if student is None else texts(student), 1000, "T")
        return found.warning, found.text

    guess = -math.log(1000)
    assert judge(-2.0, None) == (False, f"perplexity {math.exp(2):.4g} on 2 texts of 8 tokens")
    assert judge(-2.0, -2.04)[0] is False
    assert judge(-2.0, -1.98)[0] is False
    worse = judge(-2.0, -1.8)
    assert worse[0] is True
    assert "less likely than the student does (perplexity 7.389 on 2 texts of 8 tokens, the student's 6.05)" in worse[1]
    assert "worse than guessing (-6.91)" in judge(guess - 1.5, None)[1]
    assert judge(guess - 1.5, -3.0)[0] is True
    assert judge(-1e5, guess - 0.5)[0] is False
    assert "no measure" in judge(guess - 1.5, guess - 0.5)[1]


def test_the_student_itself_is_recognised_by_scores_and_by_folder(words: Any, tmp_path: Path) -> None:
    scores, tokens = np.array([-1.0, -2.0]), np.array([1, 2, 3])

    def warnings(teacher_folder: str, own: np.ndarray | None = None) -> list[str]:
        folders = [tmp_path / "missing", tmp_path / "student"]
        student = Student(words, folders=folders, log_probs=None if own is None else lambda texts: [own])
        return [finding.text for finding in same_model_warnings(student, [teacher_folder], tokens, scores, "T")]

    assert "same log-probabilities as the student" in warnings("other", scores + 5e-5)[0]
    assert warnings("other", scores + np.array([0.0, 1e-3])) == []
    (tmp_path / "student").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "student")
    assert "where the student starts" in warnings(str(tmp_path / "link"))[0]
    assert warnings(str(tmp_path)) == []
    assert warnings("Qwen/Qwen3-1.7B") == []
