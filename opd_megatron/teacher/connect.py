"""The teachers behind servers that a run's options name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd_megatron.config.errors import UserError, refuse
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import needs_student_ids
from opd_megatron.config.teachers_file import TeacherEntry, read_teachers
from opd_megatron.teacher.mixture import Combine, MixedServers
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher


def connect_teachers(
    options: Options, vocab_size: int, combine: Combine | None = None
) -> SGLangTeacher | RoutedTeachers:
    """The teacher of ``--opd-teacher-url``, or those of ``--opd-teachers``; nothing is sent yet.

    ``vocab_size`` is the student's; with ``combine`` the teachers of the file are mixed, and prompts choose none.
    Raises :class:`UserError` where an address, a key or the file does not fit.
    """
    opd = options.opd
    if needs_student_ids(options) and (opd.opd_top_k or 0) > vocab_size:
        raise UserError(f"--opd-top-k {opd.opd_top_k} is more than the {vocab_size} tokens of the student's vocabulary")
    if opd.opd_teachers is None:
        return connect_server(options, vocab_size, opd.opd_teacher_url, opd.opd_teacher_api_key_env)
    teachers = {
        entry.name: connect_server(options, vocab_size, entry.urls, entry.api_key_env, entry.name)
        for entry in _entries(opd.opd_teachers)
    }
    if combine is not None:
        return MixedServers(teachers, combine)
    return RoutedTeachers(teachers, opd.opd_teacher_route_key)


def connect_server(
    options: Options, vocab_size: int, urls: tuple[str, ...], api_key_env: str | None = None, name: str | None = None
) -> SGLangTeacher:
    """One teacher behind the servers ``urls``, as the options want it to be asked; nothing is sent yet."""
    opd = options.opd
    return SGLangTeacher(
        urls,
        name=name,
        vocab_size=vocab_size,
        max_in_flight=opd.opd_teacher_max_in_flight,
        timeout=opd.opd_teacher_timeout,
        answer_timeout=options.engine.rollout_engine_timeout,
        max_retries=opd.opd_teacher_max_retries,
        top_k=0 if needs_student_ids(options) else opd.opd_top_k or 0,
        max_union_ids=opd.opd_max_union_ids,
        api_key_env=api_key_env,
    )


def part_of_prompts(options: Options, name: str, metadata: Sequence[Mapping[str, Any]]) -> float:
    """The part of the prompts that go to the teacher ``name``: 1 where there is one teacher, or no prompt is known."""
    opd = options.opd
    if opd.opd_teachers is None or opd.opd_teacher_mixture is not None or not metadata:
        return 1.0
    return sum(entry.get(opd.opd_teacher_route_key) == name for entry in metadata) / len(metadata)


def servers_of(teacher: SGLangTeacher | RoutedTeachers) -> list[SGLangTeacher]:
    """Each teacher alone, for questions that are asked of every one."""
    return [teacher] if isinstance(teacher, SGLangTeacher) else list(teacher.teachers.values())


def _entries(path: str) -> list[TeacherEntry]:
    entries, faults = read_teachers(path)
    refuse(faults)
    return entries
