"""The models of a rank that say how probable responses are, by name, and what they keep of their pass for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import teaches_itself_by_average, teaches_itself_now
from opd_megatron.megatron.frozen import DTYPES, FrozenModel, FrozenScorer, ModelName, build_from_options
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.moving_average import MovingAverage
from opd_megatron.megatron.offload import DeviceMemory, HostStore, Part, weights_of
from opd_megatron.megatron.prompts import PromptReading
from opd_megatron.megatron.scoring import Scorer
from opd_megatron.megatron.teacher_rows import OtherPrompts, TeacherRows
from opd_megatron.questions import LogProbs
from opd_megatron.sample import Sample


class Scorers:
    """The student, the frozen ``models``, and the teacher where the student is its own.

    ``average`` is the moving average that teaches, if one does; ``kept_rows`` are hidden rows by model, until
    :meth:`forget`. All methods are collective.
    """

    def __init__(
        self,
        options: Options,
        architecture: ModelArchitecture,
        student: Sequence[HiddenStateModel],
        models: Mapping[ModelName, FrozenModel],
        memory: DeviceMemory,
        store: HostStore,
    ) -> None:
        self._options, self._memory, self._architecture = options, memory, architecture
        self.student = Scorer(student, options, architecture, in_training=True)
        self.frozen: dict[ModelName, Scorer] = {}
        self.average: MovingAverage | None = None
        self.kept_rows: dict[ModelName, TeacherRows] = {}
        leaves = options.offload.offload_teacher
        for name, model in models.items():
            self.frozen[name] = scorer = FrozenScorer(model, options, architecture)
            if leaves:
                memory.add(name, Part(partial(weights_of, [scorer.model]), store, constant=True))
        if teaches_itself_now(options):
            self.frozen["teacher"] = self._own_teacher(student, in_training=True)
        if teaches_itself_by_average(options):
            chunks = build_from_options(options, architecture)
            with memory.holding("weights"):  # at which it begins
                self.average = MovingAverage(chunks, student, options.opd.opd_self_ema_decay)
            if leaves:
                memory.add("teacher", Part(self.average.tensors, store))
            self.frozen["teacher"] = self._own_teacher(chunks, in_training=False)

    def _own_teacher(self, chunks: Sequence[HiddenStateModel], *, in_training: bool) -> Scorer:
        opd = self._options.opd
        return Scorer(
            chunks,
            self._options,
            self._architecture,
            micro_batch_size=opd.opd_teacher_micro_batch_size,
            max_tokens=opd.opd_teacher_max_tokens_per_gpu,
            in_training=in_training,
        )

    def log_probs(self, question: LogProbs, samples: Sequence[Sample]) -> dict[int, np.ndarray]:
        """The answer for this rank's share of ``samples``, by place in them; keeps rows where it is asked to.

        Raises ``ValueError`` for a token outside the model's vocabulary.
        """
        temperature = question.temperature
        if temperature is None:
            temperature = self._options.rollout.rollout_temperature
        if question.model == "student":
            with self._memory.holding(*self.student.parts):
                return self.student.score(samples, self.student.steps(samples), temperature)
        self.kept_rows.pop(question.model, None)
        frozen = self.frozen[question.model]
        seen = [sample.seen_by_teacher() for sample in samples] if question.model == "teacher" else samples
        reading = PromptReading.of(seen, question.keep_hidden and self._options.opd.opd_include_prompt)
        steps = frozen.steps(seen)
        if not question.keep_hidden:
            with self._memory.holding(question.model, *frozen.parts):
                return reading.cut(frozen.score(reading.read, steps, temperature))
        rows = TeacherRows(DTYPES.get(self._options.opd.opd_teacher_hidden_dtype), frozen.vocab_size)
        with self._memory.holding(question.model, *frozen.parts):
            found = frozen.score(reading.read, steps, temperature, rows.keep)
            leaves = self._options.offload.offload_teacher and not frozen.has_own_layout
            rows.take_weight(frozen.head_weight(), leaves=leaves or frozen.moves)
        layout, wanted = self.student.chunks[-1].sequence_layout, self.student.steps(samples)
        if layout.split.size > 1 and any(one is not other for one, other in zip(seen, samples, strict=True)):
            rows.bring_by_offset(steps, wanted, OtherPrompts(samples, layout))
        else:
            rows.bring(steps, wanted, other_ranks=frozen.has_own_layout)
        self.kept_rows[question.model] = rows
        return reading.cut(found)

    def forget(self) -> None:
        """Let go of the rows that were kept."""
        self.kept_rows = {}
