"""Log-probabilities of many samples under one model that is not trained, over all ranks, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.megatron.batching import BatchingRule, plan, sequence_cost
from opd_megatron.megatron.forward import add_over_context, head_log_probs, run_micro_batches
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.observe.progress import track
from opd_megatron.sample import Sample

MICRO_BATCHES_AT_A_TIME = 16
"""Micro-batches per rank between two updates of the progress; enough to keep a pipeline filled."""


@torch.no_grad()
def score_samples(
    model: HiddenStateModel, samples: Sequence[Sample], temperature: float, micro_batch_size: int
) -> list[np.ndarray]:
    """Log-probabilities ``[T]`` float32 of each response on the first rank, [] on the others; all ranks call it."""

    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> dict[int, np.ndarray]:
        return batch.split(head_log_probs(model, batch, rows_Nh, temperature)[0])

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    is_last = parallel_state.is_pipeline_last_stage()
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
        parts = run_micro_batches([model], model, chunk, micro_batches, last_stage, with_gradients=False)
        found = {order[start + place]: array for part in parts for place, array in part.items()}
        results |= _gather(add_over_context(found) if is_last else {})
    return [results[place] for place in range(len(samples))] if is_first else []


def _gather(found: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The results of all ranks on the first one."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everyone)
    return {place: array for one in everyone or [] for place, array in one.items()}
