"""What every teacher is to the rest of the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opd_megatron.config.errors import RunError
from opd_megatron.sample import Sample, TeacherScores


class TeacherError(RunError):
    """A teacher could not score a sample. The message names the teacher and the sample; no score is made up."""


class Teacher(Protocol):
    """Scores the tokens that the student sampled."""

    name: str
    """Appears in scores, messages and metrics; holds no secret."""

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        """Scores of each sample's response tokens, in the order of ``samples``, which are left unchanged.

        An empty response has scores of length 0. Raises :class:`TeacherError` if any sample cannot be scored; then
        there are no scores at all.
        """
        ...

    def close(self) -> None:
        """Release connections and threads; the teacher cannot be used afterwards."""
        ...
