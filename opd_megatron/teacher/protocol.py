"""What every teacher is to the rest of the program."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from opd_megatron.config.errors import RunError
from opd_megatron.http_client import HttpError
from opd_megatron.sample import Sample, TeacherScores


class FailureKind(enum.StrEnum):
    """Why a teacher has no score for a sample; counted by kind in the metrics."""

    CONNECTION = "connection"
    """The server could not be reached, or the connection broke, in every attempt."""
    TIMEOUT = "timeout"
    """No answer within the time limit of a request, in every attempt."""
    STATUS = "status"
    """The server answered with an error status."""
    MALFORMED = "malformed"
    """The answer is not JSON, or not of the form that the server's version documents."""
    WRONG_IDS = "wrong_ids"
    """The answer is about other tokens than those sent."""
    WRONG_LENGTH = "wrong_length"
    """The answer has another number of tokens than was asked for."""
    NOT_FINITE = "not_finite"
    """A value is no log-probability: NaN, infinite, positive, or null where a number belongs."""
    TOP_K = "top_k"
    """The most probable tokens are not in order, not distinct, or have a mass above 1."""
    CHANGED_MODEL = "changed_model"
    """The server's model or its weights are not those of the preflight."""
    ABORTED = "aborted"
    """The server gave the request up."""
    OVERLONG = "overlong"
    """The sample is longer than the teacher's context; it was not sent."""
    UNSCORABLE = "unscorable"
    """The sample holds what this teacher cannot score, such as an id outside its vocabulary; it was not sent."""
    DEADLINE = "deadline"
    """The time limit of the whole step passed first."""


class TeacherError(RunError):
    """A teacher could not score a sample. The message names the teacher and the sample; no score is made up."""


class TeacherFailure(TeacherError):
    """A :class:`TeacherError` about one sample, or one exchange, whose ``kind`` says what a policy can go by.

    ``status`` is that of a server's answer, if there was one.
    """

    def __init__(self, message: str, kind: FailureKind, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status

    def __reduce__(self) -> tuple[type[TeacherFailure], tuple[str, FailureKind, int | None]]:
        return type(self), (str(self), self.kind, self.status)


def failure_of(error: HttpError) -> TeacherFailure:
    """What an exchange that failed is to whoever asked for scores."""
    return TeacherFailure(str(error), FailureKind(error.fault.value), error.status)


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


class StreamingTeacher(Protocol):
    """A teacher that is asked for one sample at a time, many of them at once, from one running event loop."""

    name: str
    """Appears in scores, messages and metrics; holds no secret."""

    async def score_one(self, sample: Sample) -> TeacherScores:
        """Scores of the response tokens of ``sample``, which is left unchanged.

        Calls may be made without bound: the teacher gathers those that run at the same time into batches and limits
        what is in flight. Cancelling the calling task abandons its part of the request. Raises
        :class:`TeacherFailure` for this sample alone; its neighbours are not touched by it.
        """
        ...

    def begin_step(self, deadline: float | None) -> None:
        """Bound what follows, retries and pauses included, to ``deadline`` seconds from this moment (None: no bound).

        Samples that are not scored by then fail with :attr:`FailureKind.DEADLINE`.
        """
        ...

    async def end_step(self, deadline: float | None) -> None:
        """Raise :class:`TeacherFailure` if what was scored since :meth:`begin_step` may be of several models.

        ``deadline`` limits the search for proof in seconds; None: no bound.
        """
        ...

    def statistics(self) -> dict[str, float]:
        """Counts since the last call, which sets them back.

        ``requests``, ``retries``, ``samples``, ``wait_seconds`` (summed over the samples, from call to answer),
        ``in_flight_limit`` (samples that the servers may be asked for at a time, at this moment) and
        ``failed_<kind>`` for each :class:`FailureKind` that occurred.
        """
        ...

    async def aclose(self) -> None:
        """Abandon what is in flight and close the connections; repeated calls do nothing."""
        ...
