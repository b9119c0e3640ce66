"""One pass over micro-batches through Megatron's pipeline schedules, with or without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
from opd_megatron.megatron.micro_batch import MicroBatch, build
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.vocab_head import token_log_probs
from opd_megatron.sample import Sample

LastStage = Callable[[MicroBatch, Tensor], Any]
"""What the last pipeline stage makes of a micro-batch and its hidden rows ``[N, h]``."""


def response_rows(model: HiddenStateModel, batch: MicroBatch, hidden: Tensor) -> Tensor:
    """``[N, h]`` hidden states that predict the response tokens, ready for the vocabulary head.

    The mapping applied here adds up the head's gradient over the tensor-parallel ranks in backward.
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden.flatten(0, 1).index_select(0, batch.rows_N)


def head_log_probs(
    model: HiddenStateModel, batch: MicroBatch, rows_Nh: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens and entropies, ``[N]`` float32 each, at ``temperature``.

    Raises ``ValueError`` if a token is not in the model's vocabulary.
    """
    vocab_size = model.architecture.vocab_size
    if len(batch.targets_N) and int(batch.targets_N.max()) >= vocab_size:
        raise ValueError(f"token {int(batch.targets_N.max())} is not in the vocabulary of {vocab_size} tokens")
    return token_log_probs(
        rows_Nh,
        model.head_weight(),
        batch.targets_N,
        temperature=temperature,
        vocab_size=vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
    )


def run_micro_batches(
    module: torch.nn.Module,
    model: HiddenStateModel,
    samples: Sequence[Sample],
    micro_batches: Sequence[tuple[int, ...]],
    last_stage: LastStage,
    *,
    with_gradients: bool,
) -> list[Any]:
    """Send micro-batches through the pipeline; the results of ``last_stage`` in order, or [] on earlier stages.

    ``module`` is what is called (the data-parallel wrapper or ``model`` itself). With gradients ``last_stage`` returns
    ``(loss, result)``, where the losses of all micro-batches and ranks add up to the step's loss; without, only the
    result.
    """
    wanted = len(micro_batches)
    if not with_gradients and samples:
        micro_batches = [*micro_batches, *[(0,)] * (_most_micro_batches(model, wanted) - wanted)]
    if not micro_batches:
        return []
    multiple = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    device = cpu.device()

    def forward_step(places_iterator: Any, _: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = build(samples, next(places_iterator), device=device, length_multiple=multiple)
        hidden = module(batch.tokens_bs, batch.position_ids_bs, None, padding_mask=batch.sequences_bsn)

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            result = last_stage(batch, response_rows(model, batch, output))
            if non_loss_data:
                return result
            loss, kept = result
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), kept

        return hidden, finish

    longest = max(max(1, len(samples[place].tokens) - 1) for places in micro_batches for place in places)
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[module],
        num_microbatches=len(micro_batches),
        seq_length=-(-longest // multiple) * multiple,
        micro_batch_size=max(len(places) for places in micro_batches),
        forward_only=not with_gradients,
        collect_non_loss_data=not with_gradients,
    )
    return results[:wanted]


def _most_micro_batches(model: HiddenStateModel, count: int) -> int:
    """``count`` of the rank that has the most: ranks that share experts go through the layers together.

    A step with gradients has as many on each rank by the rules for batch sizes.
    """
    if model.config.expert_model_parallel_size == 1:
        return count
    most = torch.tensor(count, device=cpu.device())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return int(most)
