"""A teacher checkpoint inside the trainer: on its ranks, of its own architecture, precision and layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.questions import LogProbs, Respondent
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.preflight import (
    Finding,
    Student,
    check_scores,
    judged_texts,
    known_tokens,
    plausibility,
    same_model_warnings,
    text_samples,
    unknown_ids,
)
from opd_megatron.teacher.protocol import TeacherError
from opd_megatron.teacher.tokenizer_checks import (
    chat_questions,
    compare_chat_templates,
    encode_chat,
    preflight_tokenizers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MegatronTeacher:
    """Scores through the trainer's forward pass, without gradients, at the rollout temperature.

    ``folder`` names the checkpoint in scores and messages, ``model`` is the trainer's name of the frozen model;
    ``vocab_size`` is the teacher's. With ``keep_hidden`` the
    trainer keeps the teacher's hidden states on the host for the exact KL of the following training step.
    """

    def __init__(
        self, trainer: Respondent, folder: str, *, temperature: float, vocab_size: int, model: str = "teacher"
    ) -> None:
        self.name = folder
        self.vocab_size = vocab_size
        self.keep_hidden = False
        self._trainer = trainer
        self._temperature = temperature
        self._model = model

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        """See :class:`~opd_megatron.teacher.protocol.Teacher`."""
        for sample in samples:
            tokens = sample.seen_by_teacher().tokens
            if len(tokens) and tokens.max() >= self.vocab_size:
                raise TeacherError(
                    f"teacher {self.name} does not know token {tokens.max()} of sample {sample.index}: its "
                    f"vocabulary has {self.vocab_size} tokens"
                )
        scored = self._trainer.ask(LogProbs(self._model, keep_hidden=self.keep_hidden), samples)
        return [
            TeacherScores(log_probs_T=log_probs, temperature=self._temperature, teacher=self.name)
            for log_probs in scored
        ]

    def close(self) -> None:
        """Nothing: the trainer owns the weights."""


def preflight_megatron(
    teacher: MegatronTeacher,
    student: Student,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> list[Finding]:
    """Check the loaded teacher before the first step.

    Raises :class:`UserError` if its tokenizer is not the student's or its scores are not those of a language model.
    """
    name = f"teacher {teacher.name}"
    vocab_size = teacher.vocab_size
    findings = check_vocabulary(name, student, teacher_tokenizer, vocab_size=vocab_size)

    def score(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [scores.log_probs_T for scores in teacher.score(text_samples(texts))]

    tokens = known_tokens(student, vocab_size)
    first, second = (score([tokens])[0] for _ in range(2))
    check_scores(first, second, name)
    gap = float(np.abs(first - second).max(initial=0.0))
    findings.append(Finding("known text", f"{len(first)} tokens scored twice, the same to {gap:.1g}"))
    findings += same_model_warnings(student, [teacher.name], tokens, first, name)
    if texts := judged_texts(student):
        own = None if student.log_probs is None else student.log_probs(texts)
        findings.append(plausibility(score(texts), own, vocab_size, name))
    return findings


def check_vocabulary(
    name: str, student: Student, theirs: PreTrainedTokenizerBase | None, *, vocab_size: int
) -> list[Finding]:
    """Whether a frozen model of ``vocab_size`` ids means the same by them; raises :class:`UserError` if it does not."""
    if vocab_size <= student.highest_id:
        raise UserError(
            f"{name} has a vocabulary of {vocab_size} tokens, the student's tokenizer has ids to {student.highest_id}"
        )
    return [
        Finding("vocabulary", f"of {vocab_size} ids; the student's tokenizer uses ids up to {student.highest_id}"),
        *unknown_ids(student, vocab_size, name, "one in a response ends the run"),
        *_check_tokenizer(student, theirs, name),
    ]


def _check_tokenizer(student: Student, theirs: PreTrainedTokenizerBase | None, name: str) -> list[Finding]:
    if theirs is None:
        text = f"{name} carries no tokenizer: that it is the student's cannot be checked"
        return [Finding("tokenizer", text, warning=True)]
    notes = preflight_tokenizers(student.tokenizer, theirs, name)
    findings = [Finding("tokenizer", note, warning=True) for note in notes] or [Finding("tokenizer", "the student's")]
    settings = student.chat_template_kwargs
    if settings is None or not theirs.chat_template:
        return findings
    chats = [encode_chat(theirs, chat) for chat in chat_questions(settings)]
    fault = compare_chat_templates(
        student.tokenizer, settings, chats, name, lambda token: str(theirs.convert_ids_to_tokens(token))
    )
    return [*findings, Finding("chat template", fault or "the student's", warning=fault is not None)]
