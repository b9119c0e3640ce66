"""What the trainer can be asked about samples without learning from them.

A question is plain data that goes to every rank. The answer is one array for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from opd_megatron.sample import Sample


@dataclass(frozen=True)
class LogProbs:
    """How probable is each response? ``[T]`` float32 log-probabilities of its tokens under ``model``.

    ``model`` is ``student``, ``teacher``, or one of :mod:`opd_megatron.config.targets`. The temperature is that of the
    rollout unless another one is given. The teacher sees each response behind the prompt that is meant for it. With
    ``keep_hidden`` the hidden rows of a frozen model stay on the host until the samples were trained on.
    """

    model: str
    keep_hidden: bool = False
    temperature: float | None = None


@dataclass(frozen=True)
class Values:
    """What does the critic expect before each response token? ``[T]`` float32."""


@dataclass(frozen=True)
class TopIds:
    """Which tokens does the student find likeliest at each response position? ``[T, k]`` int32, most probable first."""

    k: int


@dataclass(frozen=True)
class StudentTokens:
    """What does the student make of each response token, at the rollout temperature? A structured array ``[T]``.

    Its float32 fields are those of :data:`~opd_megatron.objectives.diagnostics.OF_STUDENT`. Further ones come of the
    same pass: with ``divergence`` that of :data:`~opd_megatron.objectives.diagnostics.OF_CHOICE`; with ``diagnostics``
    :data:`~opd_megatron.objectives.diagnostics.OF_TEACHER` where hidden rows of a single teacher were kept, else,
    where all samples hold a server's top-k, :data:`~opd_megatron.objectives.diagnostics.OF_RECORD`.
    """

    divergence: bool = False
    diagnostics: bool = False


Question: TypeAlias = LogProbs | Values | TopIds | StudentTokens


class Respondent(Protocol):
    """The part of the trainer that answers."""

    def ask(self, question: Question, samples: Sequence[Sample]) -> list[np.ndarray]:
        """The answer for each of ``samples``, in their order."""
