"""Log-probabilities of samples under one model without gradients, and how the ranks' parts of them are merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.options import Options
from opd_megatron.megatron import distributed
from opd_megatron.megatron.batching import BatchingRule, MicroBatches, plan, plan_steps, sequence_cost
from opd_megatron.megatron.distributed import Groups
from opd_megatron.megatron.forward import add_over_context, check_tokens, head_log_probs, run_micro_batches
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel, Models, chunks_of
from opd_megatron.megatron.vocab_head import top_k
from opd_megatron.observe.progress import track
from opd_megatron.sample import Sample

MICRO_BATCHES_AT_A_TIME = 16
"""Micro-batches per rank between two updates of the progress; enough to keep a pipeline filled."""


def reports() -> bool:
    """Whether this rank holds results: last pipeline stage, first of the ranks that share its samples."""
    return (
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def merge_parts(parts: Sequence[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """The arrays of all micro-batches by place, on the ranks that report; {} on the others. All ranks call it."""
    if not parallel_state.is_pipeline_last_stage():
        return {}
    merged = add_over_context({place: array for part in parts for place, array in part.items()})
    return merged if reports() else {}


@torch.no_grad()
def response_log_probs(
    models: Models,
    samples: Sequence[Sample],
    micro_batches: Sequence[tuple[int, ...]],
    temperature: float,
    keep: Callable[[MicroBatch, Tensor], None] | None = None,
) -> dict[int, np.ndarray]:
    """Log-probabilities ``[T]`` float32 of each response of this rank's ``micro_batches``, by its place in ``samples``.

    They come from the ranks that report; all ranks call it. ``keep`` is given each micro-batch and its hidden rows
    ``[N, h]`` on the last pipeline stage.
    """

    chunks = chunks_of(models)

    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> dict[int, np.ndarray]:
        if keep is not None:
            keep(batch, rows_Nh)
        return batch.split(head_log_probs(chunks[-1], batch, rows_Nh, temperature)[0])

    return merge_parts(run_micro_batches(chunks, chunks[-1], samples, micro_batches, last_stage, with_gradients=False))


@torch.no_grad()
def response_top_ids(
    models: Models, samples: Sequence[Sample], micro_batches: Sequence[tuple[int, ...]], k: int
) -> dict[int, np.ndarray]:
    """Ids ``[T, k]`` int32 of the most probable tokens at each response position, as :func:`response_log_probs`.

    Raises ``ValueError`` unless ``1 <= k <= vocab_size``.
    """
    chunks = chunks_of(models)
    model = chunks[-1]

    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> dict[int, np.ndarray]:
        found = top_k(
            rows_Nh,
            model.head_weight(),
            k,
            temperature=1.0,  # which does not change the order
            vocab_size=model.architecture.vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return batch.split(found.ids_NK.int())

    return merge_parts(run_micro_batches(chunks, model, samples, micro_batches, last_stage, with_gradients=False))


def student_rule(options: Options, model: HiddenStateModel) -> BatchingRule:
    """How ``--micro-batch-size`` and ``--max-tokens-per-gpu`` make micro-batches for ``model``."""
    training, parallel = options.training, options.parallel
    is_divided = parallel.num_layers_per_virtual_pipeline_stage is not None
    return BatchingRule(
        micro_batch_size=training.micro_batch_size,
        max_tokens=training.max_tokens_per_gpu if training.use_dynamic_batch_size else None,
        length=model.sequence_layout.tokens_on_rank,
        # virtual stages take turns with groups of as many micro-batches as there are ranks in the pipeline
        count_multiple=parallel.pipeline_model_parallel_size if is_divided else 1,
    )


class Scorer:
    """A model that gives the log-probabilities of responses; what else is wanted of it is kept through ``keep``.

    It works on the samples of an optimizer step at a time, in the shares that :mod:`batching` plans for it, so that the
    ranks are balanced for the work of ``planned_for``. ``micro_batch_size`` (samples) and ``max_tokens`` (of one rank)
    are those of training unless one is given. ``groups`` are those of its layout if that is not the student's.
    ``in_training`` says that the weights are those of the student. All methods are collective.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenStateModel],
        options: Options,
        planned_for: ModelArchitecture,
        *,
        micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        groups: Groups | None = None,
        in_training: bool = False,
    ) -> None:
        self.chunks, self.groups = list(chunks), groups
        self.vocab_size = chunks[-1].architecture.vocab_size
        self.moves = in_training
        """Whether its weights may change before the rollout is trained on."""
        self.parts = ("weights",) if in_training else ()
        """Parts of the trainer's memory that it needs beside its own."""
        self._options = options
        self._micro_batch_size, self._max_tokens = micro_batch_size, max_tokens
        self._cost = sequence_cost(planned_for)

    @property
    def has_own_layout(self) -> bool:
        return self.groups is not None

    @property
    def _rule(self) -> BatchingRule:
        student = student_rule(self._options, self.chunks[-1])
        if self._micro_batch_size is None and self._max_tokens is None:
            return student
        count_multiple = student.count_multiple if len(self.chunks) > 1 else 1
        return BatchingRule(self._micro_batch_size or 1, self._max_tokens, student.length, count_multiple)

    def steps(self, samples: Sequence[Sample]) -> list[list[MicroBatches]]:
        """Micro-batches of every data-parallel rank of this model for each optimizer step."""
        with distributed.using(self.groups):
            ranks = parallel_state.get_data_parallel_world_size()
        lengths = [len(sample.tokens) for sample in samples]
        return plan_steps(lengths, self._options.global_batch_size, self._rule, ranks=ranks, cost=self._cost)

    def score(
        self,
        samples: Sequence[Sample],
        steps: Sequence[Sequence[MicroBatches]],
        temperature: float,
        keep: Callable[[MicroBatch, Tensor], None] | None = None,
    ) -> dict[int, np.ndarray]:
        """See :func:`response_log_probs`; ``steps`` are those of :meth:`steps`.

        Raises ``ValueError`` for a token outside this model's vocabulary.
        """
        check_tokens(samples, self.vocab_size)
        with distributed.using(self.groups):
            rank = parallel_state.get_data_parallel_rank()
            micro_batches = [places for step in steps for places in step[rank]]
            return response_log_probs(self.chunks, samples, micro_batches, temperature, keep)

    def head_weight(self) -> Tensor | None:
        """Rows of the output weight for the student's columns on this rank; None where the student has no head."""
        return self.chunks[-1].head_weight() if parallel_state.is_pipeline_last_stage() else None


def score_samples(
    model: HiddenStateModel, samples: Sequence[Sample], temperature: float, micro_batch_size: int
) -> list[np.ndarray]:
    """Log-probabilities ``[T]`` float32 of each response on the first rank, [] on the others; all ranks call it.

    The first rank shows the progress. Raises ``ValueError`` for a token outside the model's vocabulary.
    """
    check_tokens(samples, model.architecture.vocab_size)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    is_first = dist.get_rank() == 0
    # Longest first: what needs the most memory fails at once, and sequences of one micro-batch are of one length.
    order = sorted(range(len(samples)), key=lambda place: -samples[place].response_length)
    size = micro_batch_size * MICRO_BATCHES_AT_A_TIME * ranks
    rule, cost = BatchingRule(micro_batch_size), sequence_cost(model.architecture)
    results: dict[int, np.ndarray] = {}
    starts = range(0, len(samples), size)
    for start in track(starts, "score", len(starts)) if is_first else starts:
        chunk = [samples[place] for place in order[start : start + size]]
        micro_batches = plan([len(sample.tokens) for sample in chunk], rule, ranks=ranks, cost=cost)[rank]
        found = response_log_probs(model, chunk, micro_batches, temperature)
        results |= _gather({order[start + place]: array for place, array in found.items()})
    return [results[place] for place in range(len(samples))] if is_first else []


def _gather(found: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The results of all ranks on the first one."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everyone)
    return {place: array for one in everyone or [] for place, array in one.items()}
