"""How the model is spread over the ranks, and what leaves the device."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import checks
from opd_megatron.config.declare import option


@dataclass(frozen=True)
class ParallelOptions:
    """Parallelism and memory"""

    tensor_model_parallel_size: int = option(1, "tensor-parallel ranks", minimum=1)
    pipeline_model_parallel_size: int = option(1, "pipeline-parallel ranks", minimum=1)
    expert_model_parallel_size: int = option(1, "ranks over which the experts of a layer are spread", minimum=1)
    expert_tensor_parallel_size: int | None = option(
        None, "tensor-parallel ranks of one expert (default: --tensor-model-parallel-size)", minimum=1
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers of a virtual pipeline stage: each rank holds several, for shorter bubbles", minimum=1
    )
    context_parallel_size: int = option(1, "ranks that share each sequence (zigzag)", minimum=1)
    qkv_format: str = option(
        "thd",
        "how sequences lie in a micro-batch: thd, packed end to end; bshd, padded to the longest",
        choices=("thd", "bshd"),
    )
    sequence_parallel: bool = option(False, "split the activations between tensor-parallel regions by sequence")
    recompute_granularity: str | None = option(None, "recompute activations in backward", choices=("full", "selective"))
    recompute_method: str | None = option(
        None, "how --recompute-granularity full chooses layers", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = option(None, "layers per recomputed unit or recomputed layers", minimum=1)
    distributed_timeout_minutes: float = option(
        10.0, "limit of one collective operation", unit="minutes", above=0.0, maximum=checks.LONGEST_WAIT
    )

    def virtual_stages(self, num_layers: int) -> int | None:
        """Virtual pipeline stages of a rank for a model of ``num_layers``; None without them."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel ranks of one expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


@dataclass(frozen=True)
class OffloadOptions:
    """What leaves the device while it is not needed"""

    offload_teacher: bool = option(False, "keep teacher and reference on the host but for their scoring")
    offload_optimizer: bool = option(False, "keep the optimizer's state on the host but for its step")
    offload_train: bool = option(
        False, "keep the student's weights, gradients and optimizer on the host while others sample and score"
    )
    offload_dir: str | None = option(
        None, "files for what leaves, mapped into memory, in this folder (default: pinned memory)", metavar="DIR"
    )
