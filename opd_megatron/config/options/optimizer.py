"""Optimizer, schedule and precision."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer, schedule and precision"""

    optimizer: str = option("adam", "optimizer", choices=("adam", "sgd"))
    lr: float = option(1e-6, "peak learning rate", minimum=0.0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", minimum=0.0)
    lr_decay_style: str = option(
        "constant", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root")
    )
    lr_decay_iters: int | None = option(
        None, "length of the decay (default: all optimizer steps of the run)", unit="optimizer steps", minimum=1
    )
    lr_warmup_iters: int = option(0, "linear warm-up", unit="optimizer steps", minimum=0)
    lr_warmup_fraction: float | None = option(
        None, "warm-up as a fraction of the decay length (in place of --lr-warmup-iters)", minimum=0.0, below=1.0
    )
    lr_warmup_init: float = option(0.0, "learning rate at the start of the warm-up", minimum=0.0)
    weight_decay: float = option(0.01, "decoupled weight decay (not on biases and norms)", minimum=0.0)
    adam_beta1: float = option(0.9, "first moment's decay", minimum=0.0, below=1.0)
    adam_beta2: float = option(0.999, "second moment's decay", minimum=0.0, below=1.0)
    adam_eps: float = option(1e-8, "Adam's epsilon", above=0.0)
    sgd_momentum: float = option(0.9, "momentum of --optimizer sgd", minimum=0.0, below=1.0)
    clip_grad: float = option(1.0, "largest global gradient norm (0: no clipping)", minimum=0.0)
    bf16: bool = option(False, "train in bfloat16 with float32 master weights (default: float32)")
    accumulate_allreduce_grads_in_fp32: bool = option(False, "gradients in float32 with --bf16")
    use_distributed_optimizer: bool = option(False, "shard the optimizer's state over data-parallel ranks")
    overlap_grad_reduce: bool = option(False, "sum gradients over the ranks while the backward pass goes on")
    overlap_param_gather: bool = option(
        False, "gather the distributed optimizer's weights while the next forward pass goes on"
    )
