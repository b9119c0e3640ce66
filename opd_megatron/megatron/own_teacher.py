"""The student as its own teacher: the model in training itself, or one of its layout that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.options import Options
from opd_megatron.megatron.batching import BatchingRule, MicroBatches, plan_steps, sequence_cost
from opd_megatron.megatron.forward import check_tokens
from opd_megatron.megatron.frozen import student_rule
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.scoring import response_log_probs
from opd_megatron.sample import Sample


class OwnTeacher:
    """Scores with ``chunks``, which are laid out as the student is; used as a :class:`~.frozen.FrozenScorer`.

    All methods are collective.
    """

    has_own_layout = False

    def __init__(
        self,
        chunks: Sequence[HiddenStateModel],
        options: Options,
        architecture: ModelArchitecture,
        *,
        in_training: bool,
    ) -> None:
        self.chunks = list(chunks)
        self.moves = in_training
        self.parts = ("weights",) if in_training else ()
        self.vocab_size = architecture.vocab_size
        self._options = options
        self._architecture = architecture

    @property
    def _rule(self) -> BatchingRule:
        own, student = self._options.opd, student_rule(self._options, self.chunks[-1])
        if own.opd_teacher_micro_batch_size is None and own.opd_teacher_max_tokens_per_gpu is None:
            return student
        return BatchingRule(
            own.opd_teacher_micro_batch_size or 1,
            own.opd_teacher_max_tokens_per_gpu,
            student.length,
            student.count_multiple,
        )

    def steps(self, samples: Sequence[Sample]) -> list[list[MicroBatches]]:
        """Micro-batches of every data-parallel rank for each optimizer step."""
        return plan_steps(
            [len(sample.tokens) for sample in samples],
            self._options.global_batch_size,
            self._rule,
            ranks=parallel_state.get_data_parallel_world_size(),
            cost=sequence_cost(self._architecture),
        )

    def score(
        self,
        samples: Sequence[Sample],
        steps: Sequence[Sequence[MicroBatches]],
        temperature: float,
        keep: Callable[[MicroBatch, Tensor], None] | None = None,
    ) -> dict[int, np.ndarray]:
        """See :func:`~opd_megatron.megatron.scoring.response_log_probs`; ``steps`` are those of :meth:`steps`.

        Raises ``ValueError`` for a token outside the vocabulary.
        """
        check_tokens(samples, self._architecture.vocab_size)
        rank = parallel_state.get_data_parallel_rank()
        micro_batches = [places for step in steps for places in step[rank]]
        return response_log_probs(self.chunks, samples, micro_batches, temperature, keep)

    def head_weight(self) -> Tensor | None:
        """This rank's rows of the output weight; None where there is no head."""
        return self.chunks[-1].head_weight() if parallel_state.is_pipeline_last_stage() else None
