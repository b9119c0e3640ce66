"""Several teachers in one run: each sample goes to the one that its prompt's metadata names."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_megatron.config.flags import spoken, suggestion
from opd_megatron.http_client import blocking
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.gathering import score_together
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher


class RoutedTeachers:
    """Teachers by name; the metadata field ``key`` of a sample names its own."""

    def __init__(self, teachers: Mapping[str, SGLangTeacher], key: str) -> None:
        self.teachers = dict(teachers)
        self.name = ",".join(self.teachers)
        self._key = key

    def route(self, sample: Sample) -> SGLangTeacher:
        """The teacher of ``sample``; raises :class:`TeacherFailure` where its metadata names none."""
        route = sample.metadata.get(self._key)
        teacher = self.teachers.get(route) if isinstance(route, str) else None
        if teacher is None:
            near = suggestion(str(route), self.teachers)
            raise TeacherFailure(
                f"sample {sample.index}: its metadata field {self._key!r} is {route!r}, which is no teacher "
                f"of {spoken(self.teachers)}{near}",
                FailureKind.UNSCORABLE,
            )
        return teacher

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        """See :class:`~opd_megatron.teacher.protocol.Teacher`; an unknown route fails before anything is sent."""
        for sample in samples:
            self.check(sample)

        async def score_all() -> list[TeacherScores]:
            try:
                return await score_together(self.score_one, samples)
            finally:
                await self.aclose()

        return blocking(score_all)

    def check(self, sample: Sample) -> None:
        """Raise :class:`TeacherFailure` if ``sample`` must not be sent."""
        self.route(sample).check(sample)

    async def score_one(self, sample: Sample) -> TeacherScores:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        return await self.route(sample).score_one(sample)

    async def score_ids(self, sample: Sample, ids_TK: np.ndarray) -> TeacherScores:
        """See :meth:`SGLangTeacher.score_ids`."""
        return await self.route(sample).score_ids(sample, ids_TK)

    async def answer_one(self, sample: Sample, sampling: Mapping[str, Any]) -> tuple[np.ndarray, bool]:
        """See :meth:`SGLangTeacher.answer_one`."""
        return await self.route(sample).answer_one(sample, sampling)

    def begin_step(self, deadline: float | None) -> None:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        for teacher in self.teachers.values():
            teacher.begin_step(deadline)

    async def end_step(self, deadline: float | None) -> None:
        """All at once; see :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        proofs = (teacher.end_step(deadline) for teacher in self.teachers.values())
        for outcome in await asyncio.gather(*proofs, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def statistics(self) -> dict[str, float]:
        """Sums over the teachers; see :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        total: Counter[str] = Counter()
        for teacher in self.teachers.values():
            total.update(teacher.statistics())
        return {key: float(value) for key, value in total.items()}

    def close(self) -> None:
        """Nothing is open between calls from code that is not asynchronous; see :meth:`aclose`."""

    async def aclose(self) -> None:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        for teacher in self.teachers.values():
            await teacher.aclose()
