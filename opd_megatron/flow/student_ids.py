"""A teacher behind servers that is asked about the tokens which the student finds likeliest.

Only the trainer knows those, under the weights that sampled, and it looks at whole rollouts: so does this teacher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from opd_megatron.flow.failures import FailureCount, FailurePolicy, teacher_metrics
from opd_megatron.flow.masking import complete_masked, mask
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.gathering import score_together
from opd_megatron.teacher.protocol import TeacherFailure
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher

TopIds = Callable[[Sequence[Sample]], Sequence[np.ndarray]]
"""Ids ``[T, K]`` of the student's most probable tokens at each response position of each sample."""


class StudentIdsTeacher:
    """Asks ``servers`` about ``top_ids``; what they cannot score meets ``policy``, which must not say ``drop``."""

    def __init__(self, servers: SGLangTeacher | RoutedTeachers, top_ids: TopIds, policy: FailurePolicy) -> None:
        self.name = servers.name
        self.servers = servers
        self._top_ids = top_ids
        self._policy = policy
        self._runner = asyncio.Runner()

    def teach(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Give every sample that has none yet its scores, or mark it as masked; metrics.

        Raises :class:`TeacherError` where the policy stops the run.
        """
        ids = {sample.index: ids_TK for sample, ids_TK in zip(samples, self._top_ids(samples), strict=True)}
        failures = FailureCount(self._policy, len(samples))
        asked = [sample for sample in samples if sample.teacher_scores is None]
        failures.asked = len(asked)

        async def score(sample: Sample) -> TeacherScores:
            try:
                return await self.servers.score_ids(sample, ids[sample.index])
            except TeacherFailure as failure:
                failures.add(failure)
                return mask(sample, failure.kind, self.name)

        async def score_all() -> list[TeacherScores]:
            found = await score_together(score, asked)
            await self.servers.end_step(self._policy.deadline)
            return found

        self.servers.begin_step(self._policy.deadline)  # nothing else is left to do meanwhile
        for sample, scores in zip(asked, self._runner.run(score_all()), strict=True):
            sample.teacher_scores = scores
            sample.validate()
        complete_masked(samples)
        return failures.metrics() | teacher_metrics(self.servers)

    def close(self) -> None:
        """Close the connections; the teacher cannot be used afterwards."""
        self._runner.run(self.servers.aclose())
        self._runner.close()
