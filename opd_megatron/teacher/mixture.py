"""Several teachers that speak as one: each scores every sample, and their log-probabilities are mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from opd_megatron.questions import Respondent
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.gathering import score_together
from opd_megatron.teacher.megatron import MegatronTeacher
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher

Combine: TypeAlias = Callable[[Sequence[np.ndarray]], np.ndarray]
"""The mixture's log-probabilities ``[T]`` of one sample from those of the teachers, in their order."""


def _mixed(scores: Sequence[TeacherScores], combine: Combine, name: str) -> TeacherScores:
    """The scores of one sample; valid where those of every teacher are."""
    return TeacherScores(
        log_probs_T=combine([score.log_probs_T for score in scores]),
        valid_T=np.logical_and.reduce([score.valid_T for score in scores]),
        temperature=scores[0].temperature,
        teacher=name,
        weight_version=",".join(score.weight_version for score in scores if score.weight_version),
    )


class MixedMegatronTeachers(MegatronTeacher):
    """Frozen models of one trainer, scored one after the other. ``members`` have the trainer's names of the models."""

    def __init__(
        self, trainer: Respondent, members: Sequence[MegatronTeacher], combine: Combine, *, temperature: float
    ) -> None:
        name = " + ".join(member.name for member in members)
        smallest = min(member.vocab_size for member in members)
        super().__init__(trainer, name, temperature=temperature, vocab_size=smallest)
        self.members = list(members)
        self._combine = combine

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        """See :class:`~opd_megatron.teacher.protocol.Teacher`."""
        scored = []
        for member in self.members:
            member.keep_hidden = self.keep_hidden
            scored.append(member.score(samples))
        return [_mixed(scores, self._combine, self.name) for scores in zip(*scored, strict=True)]


class MixedServers(RoutedTeachers):
    """Teachers behind servers, of which each is asked about every sample; what one cannot score has no score."""

    def __init__(self, teachers: Mapping[str, SGLangTeacher], combine: Combine) -> None:
        super().__init__(teachers, key="")
        self.name = " + ".join(self.teachers)
        self._combine = combine

    def check(self, sample: Sample) -> None:
        """Raise what the first teacher that cannot score ``sample`` raises."""
        for teacher in self.teachers.values():
            teacher.check(sample)

    async def score_one(self, sample: Sample) -> TeacherScores:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        scores = await score_together(lambda teacher: teacher.score_one(sample), list(self.teachers.values()))
        return _mixed(scores, self._combine, self.name)
