"""The teacher that a run's options name, of whichever kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from opd_megatron.config.options import Options
from opd_megatron.config.resolve import (
    has_megatron_teacher,
    is_self_taught,
    student_architecture,
    teacher_architecture,
)
from opd_megatron.teacher.connect import connect_server, connect_teachers
from opd_megatron.teacher.megatron import MegatronTeacher, Scorer
from opd_megatron.teacher.own_engine import EngineTeacher
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher

AnyTeacher: TypeAlias = MegatronTeacher | SGLangTeacher | RoutedTeachers | EngineTeacher


def build_teacher(options: Options, trainer: Scorer, addresses: Callable[[], list[str]] | None) -> AnyTeacher | None:
    """The teacher, None without ``--use-opd``; ``addresses`` are those of the rollout engine's servers, if it has any.

    Raises :class:`UserError` where an address, a key or a file of teachers does not fit.
    """
    opd = options.opd
    if not opd.use_opd:
        return None
    if has_megatron_teacher(options):
        return MegatronTeacher(
            trainer,
            "self" if is_self_taught(options) else str(opd.opd_teacher_load),
            temperature=options.rollout.rollout_temperature,
            vocab_size=teacher_architecture(options).vocab_size,
        )
    vocab_size = student_architecture(options).vocab_size
    if is_self_taught(options) and opd.opd_self_weights == "current":
        if addresses is None:
            raise ValueError("the rollout engine has no servers")
        return EngineTeacher(addresses, lambda urls: connect_server(options, vocab_size, tuple(urls), name="self"))
    return connect_teachers(options, vocab_size)
