"""Do student and teacher mean the same by a token id? Vocabulary, encodings and chat template of the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opd_megatron.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "4827+1936=6763; 3.14159 x 10^-7 = 1,234,567.89",
    "def add(a, b):\n    return a + b\n\n\tif not x:   pass\n",
    "naïve façade, Straße, Привет мир, 你好世界, こんにちは, مرحبا, 🙂👍🏽",
    "Let $x^2 + \\frac{1}{2} = \\boxed{42}$. Hence, <b>it's</b> \"done\" -- isn't it?",
)
"""Where tokenizers of different families differ: digits, spaces, other scripts, code, formulas, contractions."""

QUESTION = {"role": "user", "content": "What is 12*34?"}
ANSWER = {"role": "assistant", "content": "408"}


def probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """:data:`PROBE_TEXTS`, each special token of ``tokenizer`` between two words, and a rendered chat."""
    texts = list(PROBE_TEXTS)
    texts += [f"a{token}1" for token in tokenizer.all_special_tokens]
    if tokenizer.chat_template:
        texts.append(str(tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)))
    return texts


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` with nothing added around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def compare_encodings(
    texts: Sequence[str],
    student: PreTrainedTokenizerBase,
    teacher_ids: Sequence[Sequence[int]],
    teacher_name: str,
    teacher_token: Callable[[int], str],
) -> None:
    """Raise :class:`UserError` that shows the first token on which student and teacher tokenizers differ."""
    for text, theirs in zip(texts, teacher_ids, strict=True):
        difference = _first_difference(encode(student, text), theirs, student, teacher_token)
        if difference is not None:
            place, sides = difference
            raise UserError(
                f"{teacher_name} has another tokenizer than the student: token {place} of {text!r} is {sides}; choose "
                "a teacher with the student's tokenizer"
            )


def _first_difference(
    mine: Sequence[int], theirs: Sequence[int], student: PreTrainedTokenizerBase, teacher_token: Callable[[int], str]
) -> tuple[int, str] | None:
    """The first place that differs and what stands there: ``'a' (id 5) for the student and no token for the teacher``.

    None where the encodings are equal.
    """
    if list(theirs) == list(mine):
        return None
    place = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        place = min(len(mine), len(theirs))
    student_side = _shown(mine, place, lambda token: str(student.convert_ids_to_tokens(token)))
    return place, f"{student_side} for the student and {_shown(theirs, place, teacher_token)} for the teacher"


def _shown(ids: Sequence[int], place: int, token: Callable[[int], str]) -> str:
    return f"{token(ids[place])!r} (id {ids[place]})" if place < len(ids) else "no token"


def preflight_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_name: str
) -> list[str]:
    """Compare two loaded tokenizers: vocabulary, encodings and end token; returns warnings.

    The teacher may know more tokens than the student. Raises :class:`UserError` that shows the first token of the
    student that the teacher lacks or has under another id, or the first text that is split in another way.
    """
    theirs = teacher.get_vocab()
    for token, number in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            other = f"has id {theirs[token]}" if token in theirs else "does not exist"
            raise UserError(
                f"{teacher_name} has another tokenizer than the student: the student's token {token!r} (id {number}) "
                f"{other} there; choose a teacher with the student's tokenizer"
            )
    texts = probe_texts(student)
    encodings = [encode(teacher, text) for text in texts]
    compare_encodings(texts, student, encodings, teacher_name, lambda token: str(teacher.convert_ids_to_tokens(token)))
    if student.eos_token_id != teacher.eos_token_id:
        return [
            f"the student ends with {student.eos_token!r}, {teacher_name} with {teacher.eos_token!r}: "
            "the teacher's opinion of the end token means little"
        ]
    return []


def chat_questions(template_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two chats, as arguments of ``apply_chat_template`` and of a server's ``/tokenize``.

    A question that the student is to answer, rendered with the run's ``template_kwargs``, and a finished exchange,
    which shows how a turn ends.
    """
    asked = {"messages": [QUESTION], "add_generation_prompt": True, "chat_template_kwargs": dict(template_kwargs)}
    return [asked, {"messages": [QUESTION, ANSWER], "add_generation_prompt": False, "chat_template_kwargs": {}}]


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Mapping[str, Any]) -> list[int]:
    """Ids of one of :func:`chat_questions` by the chat template of ``tokenizer``."""
    settings = {**chat["chat_template_kwargs"], "add_generation_prompt": chat["add_generation_prompt"]}
    return encode(tokenizer, str(tokenizer.apply_chat_template(chat["messages"], tokenize=False, **settings)))


def compare_chat_templates(
    student: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    teacher_ids: Sequence[Sequence[int]],
    teacher_name: str,
    teacher_token: Callable[[int], str],
) -> str | None:
    """A warning that shows the first token in which the teacher writes :func:`chat_questions` otherwise; else None.

    The teacher scores the student's prompts whatever its own template is, so another one may be intended.
    """
    for chat, theirs in zip(chat_questions(template_kwargs), teacher_ids, strict=True):
        difference = _first_difference(encode_chat(student, chat), theirs, student, teacher_token)
        if difference is not None:
            place, sides = difference
            return (
                f"{teacher_name} has another chat template than the student: token {place} of a chat is {sides}; it "
                "reads prompts in a form that it may not have been trained on"
            )
    return None
