"""``--opd-data-source teacher``: the teacher answers, in an engine with its weights or through its servers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import has_megatron_teacher, student_architecture, teacher_answers
from opd_megatron.megatron import cpu
from opd_megatron.megatron.frozen import DTYPES
from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.sglang_answer import cut_at_stop, sampling_params
from opd_megatron.rollout.stop import StopStrings, TokenTexts, end_token_ids
from opd_megatron.rollout.teacher_voice import TeacherVoice, give_answer, student_room
from opd_megatron.sample import Sample, Status
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher


class Exporter(Protocol):
    """The part of the trainer that gives away a model's weights."""

    def export_weights(self, name: str) -> Iterable[tuple[str, Tensor]]: ...


def student_end_ids(options: Options, tokenizer: Any) -> tuple[int, ...]:
    """The tokens at which the student's responses end."""
    folder = Path(str(options.checkpoint.hf_checkpoint))
    return end_token_ids(tokenizer, AutoConfig.from_pretrained(folder), folder)


def megatron_voice(options: Options, trainer: Exporter, tokenizer: Any) -> TeacherVoice | None:
    """A local engine with the weights that the trainer's teacher scores with; None where no such teacher answers.

    It ends responses where either model does.
    """
    if not teacher_answers(options) or not has_megatron_teacher(options):
        return None
    student, opd = student_architecture(options), options.opd
    folder = inspect_checkpoint(str(opd.opd_teacher_load)).hf_folder
    assert folder is not None  # its architecture was read from there
    own = "bfloat16" if options.optimizer.bf16 else "float32"
    dtype = DTYPES[own if opd.opd_teacher_dtype == "same" else opd.opd_teacher_dtype]
    engine = LocalEngine(
        folder,
        tokenizer,
        device=cpu.device(),
        dtype=dtype,
        max_batch_size=options.rollout.rollout_engine_batch_size,
    )
    engine.end_token_ids = tuple(sorted({*engine.end_token_ids, *student_end_ids(options, tokenizer)}))
    engine.update_weights(trainer.export_weights("teacher"), "teacher")
    return TeacherVoice(engine, tokenizer, positions=student.max_position_embeddings, vocab_size=student.vocab_size)


def server_answer(options: Options, teacher: object, tokenizer: Any, sampling: SamplingParams) -> ServerAnswer | None:
    """How the servers of ``teacher`` answer in place of the student, who samples by ``sampling``; None: not at all."""
    if not teacher_answers(options) or not isinstance(teacher, SGLangTeacher | RoutedTeachers):
        return None
    return ServerAnswer(options, teacher, tokenizer, sampling)


class ServerAnswer:
    """Lets a teacher behind servers answer as the student does; its models' own end tokens end responses, too."""

    def __init__(
        self, options: Options, teacher: SGLangTeacher | RoutedTeachers, tokenizer: Any, sampling: SamplingParams
    ) -> None:
        student = student_architecture(options)
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._seed = options.training.seed
        self._positions = student.max_position_embeddings
        self._end_ids = student_end_ids(options, tokenizer)
        self._stop = StopStrings(TokenTexts(tokenizer, student.vocab_size), sampling.stop) if sampling.stop else None

    async def __call__(self, sample: Sample, rollout_id: int) -> None:
        """Give ``sample`` a response; raises :class:`TeacherFailure`.

        It has the seed of the student's sample in its place, by which a server draws that runs with
        ``--enable-deterministic-inference``. A prompt that fills the student's positions gets none.
        """
        fitting = student_room(sample, self._sampling, self._positions)
        if fitting is None:
            give_answer(sample, np.zeros(0, np.int64), Status.PROMPT_TOO_LONG, self._tokenizer)
            return
        seed = (self._seed, rollout_id, sample.index)
        wanted = sampling_params(fitting, seed, fitting.max_new_tokens, self._end_ids)
        tokens, ended = await self._teacher.answer_one(sample, wanted)
        cut = None if self._stop is None else cut_at_stop(tokens, self._stop)
        if cut is not None:
            tokens, ended = tokens[:cut], True
        give_answer(sample, tokens, Status.COMPLETED if ended else Status.TRUNCATED, self._tokenizer)
