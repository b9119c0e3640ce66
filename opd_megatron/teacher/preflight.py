"""Questions asked of any teacher before the first step: plausible scores, the same each time, not the student itself.

What makes the run's result wrong raises :class:`UserError`; what may be intended is a :class:`Finding` that warns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.sample import Sample
from opd_megatron.teacher.agreement import EXACT, Tolerance
from opd_megatron.teacher.tokenizer_checks import PROBE_TEXTS, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME_MODEL_TOLERANCE = 1e-4
"""Two models whose log-probabilities differ by less than this everywhere are taken for one."""
JUDGED_TEXTS = 8
"""Texts of the data that both are asked about."""
JUDGED_TOKENS = 256
"""Most tokens of each of them."""
WORSE_BY = 0.05
"""Nats per token by which a teacher must be worse than the student on the data before it is said."""


@dataclass(frozen=True)
class Finding:
    """What one check found, in one line; ``warning`` where a user should look at it."""

    check: str
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Student:
    """What a preflight knows of the student.

    ``folders`` are those that it starts from. ``log_probs`` maps texts, token ids ``[L]`` each, to the student's
    log-probabilities of tokens 2..L ``[L - 1]`` at the teacher's temperature; None where they cannot be had.
    ``texts`` are token ids of the run's own data. ``chat_template_kwargs`` are those of the run, None where prompts
    are plain text. ``vocab_size`` is that of its model, whose ids beyond the tokenizer's can be sampled, too.
    """

    tokenizer: PreTrainedTokenizerBase
    folders: Sequence[str | Path] = ()
    log_probs: Callable[[Sequence[np.ndarray]], list[np.ndarray]] | None = None
    texts: Sequence[np.ndarray] = ()
    chat_template_kwargs: Mapping[str, Any] | None = None
    vocab_size: int | None = None

    @property
    def highest_id(self) -> int:
        """The highest id that the tokenizer uses."""
        return max(self.tokenizer.get_vocab().values())


def unknown_ids(student: Student, vocab_size: int, name: str, consequence: str) -> list[Finding]:
    """A warning where the student can sample ids that another model, of ``vocab_size``, does not have."""
    own = student.vocab_size
    if own is None or own <= vocab_size:
        return []
    text = (
        f"{name} knows {vocab_size} ids, the student's model {own}: the other {own - vocab_size}, which the tokenizer "
        f"does not use, can be sampled, and {consequence}"
    )
    return [Finding("vocabulary", text, warning=True)]


def text_samples(texts: Sequence[np.ndarray]) -> list[Sample]:
    """Samples whose scores are the log-probabilities of tokens 2..L of each text."""
    return [
        Sample(index, index, "", prompt_tokens=tokens[:1], response_tokens=tokens[1:])
        for index, tokens in enumerate(texts)
    ]


def known_text(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """Ids (int64) of the first of :data:`PROBE_TEXTS` that the tokenizer can spell, at most 64; None without one."""
    for text in PROBE_TEXTS:
        ids = encode(tokenizer, text)[:64]
        spelled = "".join(str(tokenizer.decode(ids)).split())
        if len(ids) >= 4 and spelled and "".join(text.split()).startswith(spelled):
            return np.array(ids, dtype=np.int64)
    return None


def known_tokens(student: Student, vocab_size: int) -> np.ndarray:
    """Ids (int64) to score for a first impression: a known text, one of the data, or the vocabulary's first ids."""
    text = known_text(student.tokenizer)
    if text is not None:
        return text
    return student.texts[0] if student.texts else np.arange(min(vocab_size, 16), dtype=np.int64)


def judged_texts(student: Student, longest: int | None = None) -> list[np.ndarray]:
    """Texts for :func:`plausibility`, cut at ``longest`` tokens: those of the data, else the known one, if any."""
    known = known_text(student.tokenizer)
    return [text[:longest] for text in student.texts or ([] if known is None else [known])]


def check_scores(log_probs: np.ndarray, again: np.ndarray, teacher_name: str, tolerance: Tolerance = EXACT) -> None:
    """Raise :class:`UserError` unless both are the same finite log-probabilities of a model that distinguishes tokens.

    ``log_probs`` and ``again`` ``[N]`` are two answers about one text, which may differ by ``tolerance``.
    """
    what = f"{teacher_name} does not score a known text as a language model would:"
    if not (np.isfinite(log_probs).all() and np.isfinite(again).all() and (log_probs <= 1e-3).all()):
        raise UserError(f"{what} not all its log-probabilities are finite and at most 0; check its weights")
    if (gap := tolerance.exceeded(log_probs, again)) is not None:
        raise UserError(f"{what} the same text scored twice differs by {gap}; check the server's version and flags")
    if len(log_probs) > 2 and np.ptp(log_probs) < 1e-6:
        raise UserError(f"{what} every token has log-probability {log_probs[0]:.4g}; check that its weights are loaded")


def plausibility(
    teacher: Sequence[np.ndarray], student: Sequence[np.ndarray] | None, vocab_size: int, teacher_name: str
) -> Finding:
    """Compare perplexities on texts whose log-probabilities are given, ``[L - 1]`` each; warn where they speak against.

    A teacher that is worse than guessing among ``vocab_size`` tokens by a nat, or worse than the student, is no
    mistake for certain. Texts that the student itself finds worse than guessing say nothing about either.
    """
    values = np.concatenate(list(teacher))
    mean, guess = float(values.mean()), -math.log(vocab_size)
    figures = f"perplexity {_perplexity(mean):.4g} on {len(teacher)} texts of {len(values)} tokens"
    own = None if student is None else float(np.concatenate(list(student)).mean())
    if own is not None:
        figures += f", the student's {_perplexity(own):.4g}"
        if own < guess:
            return Finding("plausibility", f"{figures}: worse than guessing, so the texts are no measure")
    if mean < guess - 1.0:
        text = (
            f"{teacher_name} gives the texts a mean log-probability of {mean:.2f}, worse than guessing ({guess:.2f}): "
            "is it trained, and is this its kind of text?"
        )
        return Finding("plausibility", text, warning=True)
    if own is not None and mean < own - WORSE_BY:
        text = f"{teacher_name} finds the run's own texts less likely than the student does ({figures}): can it teach?"
        return Finding("plausibility", text, warning=True)
    return Finding("plausibility", figures)


def check_privileged_length(longest: int, positions: int, overlong: str) -> list[Finding]:
    """Whether prompt, context and response fit the ``positions`` of a model that is its own teacher.

    ``longest`` are the most tokens that they can have together. Raises :class:`UserError` with ``overlong``
    (``--opd-overlong``) ``stop`` where they do not fit.
    """
    if longest <= positions:
        return [Finding("context", f"up to {longest} tokens with the response, of {positions} positions")]
    fault = (
        f"--opd-teacher self sees prompts with their context and response of up to {longest} tokens, the model has "
        f"{positions} positions"
    )
    if overlong == "stop":
        raise UserError(
            f"{fault}: shorten the contexts, lower --rollout-max-response-len, or choose --opd-overlong mask"
        )
    return [Finding("context", f"{fault}: longer samples are left out of the distillation term", warning=True)]


def _perplexity(mean_log_prob: float) -> float:
    return math.exp(min(-mean_log_prob, 700.0))  # the largest that a float holds


def same_model_warnings(
    student: Student, teacher_folders: Sequence[Any], tokens: np.ndarray, log_probs: np.ndarray, teacher_name: str
) -> Iterator[Finding]:
    """Warnings where teacher and student are one: by a folder of the weights, or by the scores of ``tokens``."""
    theirs = [folder for folder in teacher_folders if isinstance(folder, str) and Path(folder).exists()]
    mine = [folder for folder in student.folders if Path(folder).exists()]
    for folder in theirs:
        if any(Path(own).samefile(folder) for own in mine):
            text = f"{teacher_name} serves {folder}, where the student starts: its part of the distillation term is 0"
            yield Finding("same model", text, warning=True)
    if student.log_probs is not None:
        (own,) = student.log_probs([tokens])
        if len(own) and np.abs(own - log_probs).max() < SAME_MODEL_TOLERANCE:
            text = (
                f"{teacher_name} gives the same log-probabilities as the student: "
                "if it is the same model, its part of the distillation term is 0"
            )
            yield Finding("same model", text, warning=True)
