"""Models that only score, by name: the reference and the teacher. Each has weights and sizes of its own.

A frozen model works on the samples of an optimizer step at a time, in the shares that :mod:`batching` plans for it, and
gives the log-probabilities of the responses. What else the objective needs of it is kept through ``keep``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.checkpoint_paths import Step
from opd_megatron.config.options import Options
from opd_megatron.megatron import checkpoint
from opd_megatron.megatron.batching import BatchingRule, MicroBatches, plan_steps, sequence_cost
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel, build_model
from opd_megatron.megatron.scoring import response_log_probs
from opd_megatron.sample import Sample

ModelName = Literal["student", "reference", "teacher"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FrozenModel:
    """A model that only scores: its architecture and the folder its weights come from.

    ``dtype``, ``micro_batch_size`` (samples) and ``max_tokens`` (of one rank) are the student's where they are None.
    """

    architecture: ModelArchitecture
    folder: Path
    step: Step | None = None
    dtype: str | None = None
    micro_batch_size: int | None = None
    max_tokens: int | None = None


def teacher_model(options: Options, architecture: ModelArchitecture, folder: Path) -> FrozenModel:
    """The teacher in ``folder`` as the ``--opd-teacher-*`` options want it."""
    opd = options.opd
    return FrozenModel(
        architecture,
        folder,
        opd.opd_teacher_ckpt_step,
        dtype=None if opd.opd_teacher_dtype == "same" else opd.opd_teacher_dtype,
        micro_batch_size=opd.opd_teacher_micro_batch_size,
        max_tokens=opd.opd_teacher_max_tokens_per_gpu,
    )


def build_from_options(options: Options, architecture: ModelArchitecture, dtype: str | None = None) -> HiddenStateModel:
    """This rank's part of a model of the run, its weights not yet set; ``dtype`` None is that of training."""
    return build_model(
        architecture,
        options.parallel,
        dtype=DTYPES[dtype or ("bfloat16" if options.optimizer.bf16 else "float32")],
        make_vocab_size_divisible_by=options.model.make_vocab_size_divisible_by,
        router_dtype=options.model.moe_router_dtype,
    )


def student_rule(options: Options, model: HiddenStateModel) -> BatchingRule:
    """How ``--micro-batch-size`` and ``--max-tokens-per-gpu`` make micro-batches for ``model``."""
    training = options.training
    return BatchingRule(
        micro_batch_size=training.micro_batch_size,
        max_tokens=training.max_tokens_per_gpu if training.use_dynamic_batch_size else None,
        length=model.sequence_layout.tokens_on_rank,
    )


class FrozenScorer:
    """A frozen model with its weights loaded. ``planned_for`` is the model whose work decides how ranks are balanced.

    All methods are collective.
    """

    def __init__(self, spec: FrozenModel, options: Options, planned_for: ModelArchitecture) -> None:
        self.spec = spec
        self._options = options
        self._cost = sequence_cost(planned_for)
        self.model = build_from_options(options, spec.architecture, spec.dtype)
        checkpoint.load_weights(self.model, spec.folder, spec.step)
        self.model.requires_grad_(False).eval()

    @property
    def _rule(self) -> BatchingRule:
        own = self.spec
        if own.micro_batch_size is None and own.max_tokens is None:
            return student_rule(self._options, self.model)
        return BatchingRule(own.micro_batch_size or 1, own.max_tokens, self.model.sequence_layout.tokens_on_rank)

    def steps(self, samples: Sequence[Sample]) -> list[list[MicroBatches]]:
        """Micro-batches of every data-parallel rank of this model for each optimizer step."""
        return plan_steps(
            [len(sample.tokens) for sample in samples],
            self._options.global_batch_size,
            self._rule,
            ranks=parallel_state.get_data_parallel_world_size(),
            cost=self._cost,
        )

    def score(
        self,
        samples: Sequence[Sample],
        temperature: float,
        keep: Callable[[MicroBatch, Tensor], None] | None = None,
    ) -> dict[int, np.ndarray]:
        """See :func:`~opd_megatron.megatron.scoring.response_log_probs`."""
        rank = parallel_state.get_data_parallel_rank()
        micro_batches = [places for step in self.steps(samples) for places in step[rank]]
        return response_log_probs(self.model, samples, micro_batches, temperature, keep)
