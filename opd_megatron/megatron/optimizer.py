"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule from our options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from opd_megatron.config.options import OptimizerOptions
from opd_megatron.megatron import cpu
from opd_megatron.megatron.model import HiddenStateModel


def wrap_model(chunks: Sequence[HiddenStateModel], options: OptimizerOptions) -> list[DistributedDataParallel]:
    """Give the model Megatron's gradient buffers; gradients of all ranks are summed (see ``transformer_config``)."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.accumulate_allreduce_grads_in_fp32,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
    )
    config = chunks[0].config
    # buckets let the reduction start early, which pays for the chunk whose backward pass ends last
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=stage > 0) for stage, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = _finalize_grads
    if options.overlap_grad_reduce:
        # the schedules call it around all micro-batches but the last, which starts the reduction
        functions = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = functions if len(functions) > 1 else functions[0]
    return wrapped


def gather_weights(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Wait until every rank has the weights of the last optimizer step, which may still be under way."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _finalize_grads(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: object) -> None:
    """Sum gradients over the ranks. The loss is already divided by the step's count, so no token count is applied."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(wrapped: Sequence[DistributedDataParallel], options: OptimizerOptions) -> MegatronOptimizer:
    """Megatron's (distributed) optimizer over the wrapped model."""
    config = OptimizerConfig(
        optimizer=options.optimizer,
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        sgd_momentum=options.sgd_momentum,
        clip_grad=options.clip_grad,
        bf16=options.bf16,
        params_dtype=torch.bfloat16 if options.bf16 else torch.float32,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
    )
    with cpu.cuda_type_names():
        return get_megatron_optimizer(config, list(wrapped))


def build_scheduler(
    optimizer: MegatronOptimizer, options: OptimizerOptions, decay_steps: int, warmup_steps: int
) -> OptimizerParamScheduler:
    """Megatron's learning-rate schedule; lengths in optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=options.lr_warmup_init,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def gradients_are_zero(wrapped: Sequence[DistributedDataParallel]) -> bool:
    """Whether the summed gradient is 0 everywhere, to the bit: the same on every rank. Collective."""
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    found = torch.tensor(any(bool(buffer.grad_data.any()) for buffer in buffers), device=cpu.device()).int()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return not found.item()


def optimizer_step(optimizer: MegatronOptimizer) -> float:
    """Clip and apply the gradients; the global gradient norm before clipping."""
    with cpu.cuda_type_names():
        _, norm, _ = optimizer.step()
    return float(norm) if norm is not None else 0.0
