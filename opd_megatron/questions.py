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
class TokenStatistics:
    """How sure is the student of each response token? ``[T, 3]`` float32: see ``megatron.token_statistics``."""


@dataclass(frozen=True)
class TokenDiagnostics:
    """What do student and teacher think at each response token? A structured array: see ``megatron.token_diagnostics``.

    Teachers whose hidden rows were kept are compared with.
    """


Question: TypeAlias = LogProbs | Values | TopIds | TokenStatistics | TokenDiagnostics


class Respondent(Protocol):
    """The part of the trainer that answers."""

    def ask(self, question: Question, samples: Sequence[Sample]) -> list[np.ndarray]:
        """The answer for each of ``samples``, in their order."""
