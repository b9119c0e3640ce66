"""Questions asked of any teacher before the first step: same tokenizer, plausible scores, not the student itself.

What makes the run's result wrong raises :class:`UserError`; what may be intended is returned as a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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

SAME_MODEL_TOLERANCE = 1e-4
"""Two models whose log-probabilities differ by less than this everywhere are taken for one."""


def probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """:data:`PROBE_TEXTS`, each special token of ``tokenizer`` between two words, and a rendered chat."""
    texts = list(PROBE_TEXTS)
    texts += [f"a{token}1" for token in tokenizer.all_special_tokens]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "What is 12*34?"}, {"role": "assistant", "content": "408"}]
        texts.append(str(tokenizer.apply_chat_template(turns, tokenize=False)))
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
        mine = encode(student, text)
        if list(theirs) == mine:
            continue
        place = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            place = min(len(mine), len(theirs))
        student_side = _shown(mine, place, lambda token: str(student.convert_ids_to_tokens(token)))
        raise UserError(
            f"{teacher_name} has another tokenizer than the student: token {place} of {text!r} is {student_side} for "
            f"the student and {_shown(theirs, place, teacher_token)} for the teacher; choose a teacher with the "
            "student's tokenizer"
        )


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


def known_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, texts: Sequence[str] = ()) -> np.ndarray:
    """Ids (int64) to score for a first impression: the first text that ``tokenizer`` can spell, at most 64 tokens.

    ``texts`` come before :data:`PROBE_TEXTS`; if none can be spelled (a tokenizer of few characters), the first ids.
    """
    for text in (*texts, *PROBE_TEXTS):
        ids = encode(tokenizer, text)[:64]
        spelled = "".join(str(tokenizer.decode(ids)).split())
        if len(ids) >= 4 and spelled and "".join(text.split()).startswith(spelled):
            return np.array(ids, dtype=np.int64)
    return np.arange(min(vocab_size, 16), dtype=np.int64)


def check_scores(log_probs: np.ndarray, again: np.ndarray, teacher_name: str) -> None:
    """Raise :class:`UserError` unless both are the same finite log-probabilities of a model that distinguishes tokens.

    ``log_probs`` and ``again`` ``[N]`` are two answers about one text; they may differ by 1e-3.
    """
    what = f"{teacher_name} does not score a known text as a language model would:"
    if not (np.isfinite(log_probs).all() and np.isfinite(again).all() and (log_probs <= 1e-3).all()):
        raise UserError(f"{what} not all its log-probabilities are finite and at most 0; check its weights")
    if (gap := float(np.abs(log_probs - again).max(initial=0.0))) > 1e-3:
        raise UserError(f"{what} the same text scored twice differs by {gap:.2g}; check the server's version and flags")
    if len(log_probs) > 2 and np.ptp(log_probs) < 1e-6:
        raise UserError(f"{what} every token has log-probability {log_probs[0]:.4g}; check that its weights are loaded")


def plausible(log_probs: np.ndarray, vocab_size: int, teacher_name: str) -> str | None:
    """A warning where a known text is scored worse than by guessing, mean log p < -log(vocabulary) - 1; else None."""
    mean, guess = float(np.mean(log_probs)), -math.log(vocab_size)
    if mean >= guess - 1.0:
        return None
    return (
        f"{teacher_name} gives a known text a mean log-probability of {mean:.2f}, worse than guessing ({guess:.2f}): "
        "is it trained, and is this its kind of text?"
    )


def check_same_model(student_log_probs: np.ndarray, teacher_log_probs: np.ndarray, teacher_name: str) -> str | None:
    """A warning where both gave one text the same log-probabilities ``[N]``; else None."""
    if len(student_log_probs) and np.abs(student_log_probs - teacher_log_probs).max() < SAME_MODEL_TOLERANCE:
        return (
            f"{teacher_name} gives the same log-probabilities as the student: "
            "if it is the same model, the distillation term is 0"
        )
    return None


def check_same_folder(student_folders: Sequence[str | Path], teacher_folder: Any, teacher_name: str) -> str | None:
    """A warning where the teacher's weights lie in a folder that the student starts from; else None."""
    if not isinstance(teacher_folder, str) or not Path(teacher_folder).exists():
        return None
    for folder in student_folders:
        if Path(folder).exists() and Path(folder).samefile(teacher_folder):
            return f"{teacher_name} serves {teacher_folder}, where the student starts: the distillation term is 0"
    return None
