"""What a rollout does about samples that the teacher could not score."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from opd_megatron.teacher.protocol import FailureKind, StreamingTeacher, TeacherError, TeacherFailure


@dataclass(frozen=True)
class FailurePolicy:
    """``on_failure`` and ``on_overlong`` are ``stop``, ``mask`` or ``drop``.

    ``max_failed_frac`` is the part of a rollout's samples that may fail before the run stops in any case;
    ``deadline`` the seconds that a step waits for the teacher alone before what is unanswered counts as failed.
    """

    on_failure: str = "stop"
    on_overlong: str = "stop"
    max_failed_frac: float = 0.1
    deadline: float = 1800.0

    def of(self, kind: FailureKind) -> str:
        """What is to be done about a failure of this kind."""
        return self.on_overlong if kind is FailureKind.OVERLONG else self.on_failure


class FailureCount:
    """Failures of one rollout of ``samples`` samples."""

    def __init__(self, policy: FailurePolicy, samples: int) -> None:
        self._policy = policy
        self._samples = samples
        self._by_kind: Counter[FailureKind] = Counter()
        self.asked = 0
        """Samples that the teacher was asked about."""

    def add(self, failure: TeacherFailure) -> str:
        """Count a failure and return what is to be done, ``mask`` or ``drop``.

        Raises ``failure`` itself where the policy says ``stop``, and :class:`TeacherError` above the budget.
        """
        todo = self._policy.of(failure.kind)
        if todo == "stop":
            raise failure
        self._by_kind[failure.kind] += 1
        failed, budget = self._by_kind.total(), self._policy.max_failed_frac
        if failed > budget * self._samples:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self._by_kind.items()))
            raise TeacherError(
                f"the teacher failed for {failed} samples of a rollout of {self._samples} ({kinds}), more than "
                f"--opd-max-failed-frac {budget:g} allows; the last: {failure}"
            ) from failure
        return todo

    def metrics(self) -> dict[str, float]:
        """``opd/teacher_failed_frac``, of the samples asked about, and ``opd/teacher_failed/<kind>``, counts."""
        found = {f"opd/teacher_failed/{kind}": float(count) for kind, count in sorted(self._by_kind.items())}
        return {"opd/teacher_failed_frac": self._by_kind.total() / max(self.asked, 1), **found}


def teacher_metrics(teacher: StreamingTeacher) -> dict[str, float]:
    """``perf/teacher_*`` of what was exchanged with the teacher's servers since the last call."""
    found = teacher.statistics()
    return {
        "perf/teacher_requests": found["requests"],
        "perf/teacher_retries": found["retries"],
        "perf/teacher_answer_seconds": found["wait_seconds"] / max(found["samples"], 1.0),
        "perf/teacher_in_flight_limit": found["in_flight_limit"],
    }
