"""A teacher checkpoint inside the trainer: on its ranks, of its own architecture, precision and layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.preflight import (
    check_same_folder,
    check_same_model,
    check_scores,
    known_tokens,
    plausible,
    preflight_tokenizers,
)
from opd_megatron.teacher.protocol import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Scorer(Protocol):
    """The part of the trainer that scores samples with its frozen teacher."""

    def score(
        self, name: Literal["teacher"], samples: Sequence[Sample], *, keep_hidden: bool = False
    ) -> list[np.ndarray]: ...


class MegatronTeacher:
    """Scores through the trainer's forward pass, without gradients, at the rollout temperature.

    ``folder`` names the checkpoint in scores and messages; ``vocab_size`` is the teacher's. With ``keep_hidden`` the
    trainer keeps the teacher's hidden states on the host for the exact KL of the following training step.
    """

    def __init__(self, trainer: Scorer, folder: str, *, temperature: float, vocab_size: int) -> None:
        self.name = folder
        self.keep_hidden = False
        self._trainer = trainer
        self._temperature = temperature
        self._vocab_size = vocab_size

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        """See :class:`~opd_megatron.teacher.protocol.Teacher`."""
        for sample in samples:
            if len(sample.tokens) and sample.tokens.max() >= self._vocab_size:
                raise TeacherError(
                    f"teacher {self.name} does not know token {sample.tokens.max()} of sample {sample.index}: its "
                    f"vocabulary has {self._vocab_size} tokens"
                )
        scored = self._trainer.score("teacher", samples, keep_hidden=self.keep_hidden)
        return [
            TeacherScores(log_probs_T=log_probs, temperature=self._temperature, teacher=self.name)
            for log_probs in scored
        ]

    def close(self) -> None:
        """Nothing: the trainer owns the weights."""


def preflight_megatron(
    teacher: MegatronTeacher,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    student_folders: Sequence[str] = (),
    known_texts: Sequence[str] = (),
    student_log_probs: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[str]:
    """Check the loaded teacher before the first step; returns warnings.

    The arguments are those of :func:`~opd_megatron.teacher.sglang_preflight.preflight_sglang`; ``vocab_size`` is the
    teacher's. Raises :class:`UserError` if its tokenizer is not the student's or its scores are not those of a
    language model.
    """
    name = f"teacher {teacher.name}"
    highest = max(student_tokenizer.get_vocab().values())
    if vocab_size <= highest:
        raise UserError(f"{name} has a vocabulary of {vocab_size} tokens, the student's tokenizer has ids to {highest}")
    if teacher_tokenizer is None:
        warnings = [f"{name} carries no tokenizer: that it is the student's cannot be checked"]
    else:
        warnings = preflight_tokenizers(student_tokenizer, teacher_tokenizer, name)
    tokens = known_tokens(student_tokenizer, vocab_size, known_texts)
    sample = Sample(index=0, group_index=0, prompt="", prompt_tokens=tokens[:1], response_tokens=tokens[1:])
    first, second = (teacher.score([sample])[0].log_probs_T for _ in range(2))
    check_scores(first, second, name)
    found = [check_same_folder(student_folders, teacher.name, name)]
    if known_texts:
        found.append(plausible(first, vocab_size, name))
    if student_log_probs is not None:
        found.append(check_same_model(student_log_probs(tokens), first, name))
    return warnings + [warning for warning in found if warning is not None]
