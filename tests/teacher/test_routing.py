"""Which teacher a sample goes to, before anything is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from opd_megatron.sample import Sample
from opd_megatron.system import free_port
from opd_megatron.teacher.protocol import FailureKind, StreamingTeacher, TeacherFailure
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher


def sample(index: int, length: int = 2, **metadata: Any) -> Sample:
    tokens = np.ones(length, dtype=np.int64)
    return Sample(index, 0, "", prompt_tokens=np.array([1]), response_tokens=tokens, metadata=metadata)


@pytest.fixture
def routed() -> RoutedTeachers:
    """Two teachers whose servers do not exist, of vocabularies of 5 and 10 tokens."""
    sizes = {"math": 5, "code": 10}
    url = f"http://127.0.0.1:{free_port()}"
    teachers = {name: SGLangTeacher(url, name=name, vocab_size=size, max_retries=0) for name, size in sizes.items()}
    return RoutedTeachers(teachers, "teacher")


def test_the_metadata_names_the_teacher(routed: RoutedTeachers) -> None:
    empty = [sample(0, 0, teacher="code"), sample(1, 0, teacher="math")]
    assert [scores.teacher for scores in routed.score(empty)] == ["code", "math"]


@pytest.mark.parametrize("metadata", [{}, {"teacher": "maths"}, {"teacher": ["math"]}, {"other": "math"}])
def test_an_unknown_route_fails_before_anything_is_sent(routed: RoutedTeachers, metadata: dict[str, Any]) -> None:
    with pytest.raises(
        TeacherFailure, match=r"sample 1: its metadata field 'teacher' is .*, which is no teacher of"
    ) as one:
        routed.score([sample(0, teacher="math"), sample(1, **metadata)])
    assert one.value.kind == FailureKind.UNSCORABLE
    assert routed.statistics()["requests"] == 0

    streaming: StreamingTeacher = routed
    with pytest.raises(TeacherFailure, match="which is no teacher of math or code"):
        asyncio.run(streaming.score_one(sample(1, **metadata)))


def test_failures_name_the_teacher_and_are_counted(routed: RoutedTeachers) -> None:
    async def ask() -> list[Any]:
        both = [sample(0, teacher="math"), sample(1, teacher="code")]
        found = await asyncio.gather(*map(routed.score_one, both), return_exceptions=True)
        await routed.aclose()
        return found

    assert [failure.kind for failure in asyncio.run(ask())] == [FailureKind.CONNECTION] * 2
    counted = routed.statistics()
    assert (counted["samples"], counted["requests"], counted["failed_connection"]) == (2, 2, 2)


def test_the_proofs_at_the_end_of_a_step_share_its_deadline(
    routed: RoutedTeachers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other would each have the whole of it; the failure of one does not leave the other's behind."""
    ended = []

    async def end(routed: RoutedTeachers) -> None:
        both = asyncio.Barrier(2)

        async def end_step(teacher: SGLangTeacher, deadline: float | None) -> None:
            async with asyncio.timeout(20):
                await both.wait()
            if teacher.name == "math":
                raise TeacherFailure("other weights", FailureKind.CHANGED_MODEL)
            await asyncio.sleep(0)
            ended.append((teacher.name, deadline))

        monkeypatch.setattr(SGLangTeacher, "end_step", end_step)
        await routed.end_step(7.0)

    with pytest.raises(TeacherFailure, match="other weights"):
        asyncio.run(end(routed))
    assert ended == [("code", 7.0)]
