"""One pass over micro-batches through Megatron's pipeline schedules, with or without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from opd_megatron.megatron import cpu
from opd_megatron.megatron.micro_batch import MicroBatch, SequenceLayout, build
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.vocab_head import token_log_probs
from opd_megatron.sample import Sample

LastStage = Callable[[MicroBatch, Tensor], Any]
"""What the last pipeline stage makes of a micro-batch and its hidden rows ``[N, h]``, or a critic's values."""


def response_rows(model: HiddenStateModel, batch: MicroBatch, hidden: Tensor) -> Tensor:
    """``[N, h]`` of the model's output, hidden states mostly, where it predicts the response tokens.

    Where the head that follows is split, the mapping applied here adds up its gradient over the tensor-parallel ranks
    in backward.
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=model.has_split_head)
    elif model.has_split_head:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden.flatten(0, 1).index_select(0, batch.rows_N)


def head_log_probs(
    model: HiddenStateModel, batch: MicroBatch, rows_Nh: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens and entropies, ``[N]`` float32 each, at ``temperature``."""
    return token_log_probs(
        rows_Nh,
        model.head_weight(),
        batch.targets_N,
        temperature=temperature,
        vocab_size=model.architecture.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
    )


def run_micro_batches(
    modules: Sequence[torch.nn.Module],
    model: HiddenStateModel,
    samples: Sequence[Sample],
    micro_batches: Sequence[tuple[int, ...]],
    last_stage: LastStage,
    *,
    with_gradients: bool,
) -> list[Any]:
    """Send micro-batches through the pipeline; the results of ``last_stage`` in order, or [] on earlier stages.

    ``modules`` are what is called, one for each virtual stage (data-parallel wrappers, or the bare chunks); ``model``
    is the last chunk itself. With gradients ``last_stage`` returns ``(loss, result)``, where the losses of all
    micro-batches and ranks add up to the step's loss; without, only the result. Micro-batches may be empty; all
    data-parallel ranks bring the same number. The tokens must be in the model's vocabulary (:func:`check_tokens`).
    """
    if not micro_batches:
        return []
    layout = model.sequence_layout
    device = cpu.device()
    stages = len(modules)
    # Virtual stages exchange tensors of one size; other pipelines tell one another the sizes of what they send.
    row_length = _longest_row(samples, micro_batches, layout) if stages > 1 else None

    def forward_step(places_iterator: Any, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = build(samples, next(places_iterator), device=device, layout=layout, row_length=row_length)
        hidden = chunk(
            batch.tokens_bs,
            batch.position_ids_bs,
            None,
            packed_seq_params=batch.packed,
            padding_mask=batch.sequences_bsn,
        )

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            result = last_stage(batch, response_rows(model, batch, output))
            if non_loss_data:
                return result
            loss, kept = result
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), kept

        return hidden, finish

    schedule = get_forward_backward_func(
        parallel_state.get_pipeline_model_parallel_world_size(), stages if stages > 1 else None
    )
    results: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in modules] if stages > 1 else iter(micro_batches),
        model=list(modules),
        num_microbatches=len(micro_batches),
        seq_length=(row_length or 1) * layout.split.size,
        micro_batch_size=1,
        forward_only=not with_gradients,
        collect_non_loss_data=not with_gradients,
    )
    return results


def check_tokens(samples: Sequence[Sample], vocab_size: int) -> None:
    """Raise ``ValueError`` if a token of any sample, be it another rank's, is not in the vocabulary: all ranks do.

    An embedding split over tensor-parallel ranks would take it for another rank's, and sum up nothing.
    """
    parts = [part for sample in samples for part in (sample.prompt_tokens, sample.response_tokens)]
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = tokens.max() if tokens.max() >= vocab_size else tokens.min()
        raise ValueError(f"token {wrong} is not in the vocabulary of {vocab_size} tokens")


def _longest_row(samples: Sequence[Sample], micro_batches: Sequence[tuple[int, ...]], layout: SequenceLayout) -> int:
    return max(
        layout.row_length(sum(layout.tokens_on_rank(len(samples[place].tokens)) for place in places))
        for places in micro_batches
    )


def add_over_context(arrays: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Arrays by place, summed over the context-parallel ranks, of which each holds a part and 0 elsewhere.

    All ranks of the group bring the same places; the dtype is float32.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1 or not arrays:
        return arrays
    places = sorted(arrays)
    joined = torch.from_numpy(np.concatenate([arrays[place] for place in places])).to(cpu.device())
    dist.all_reduce(joined, group=group)
    parts = np.split(joined.cpu().numpy(), np.cumsum([len(arrays[place]) for place in places])[:-1])
    return dict(zip(places, parts, strict=True))
