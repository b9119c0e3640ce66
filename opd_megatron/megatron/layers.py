"""The torch layer spec: Megatron's transformer layer built from plain torch, with Transformer Engine's parameter names.

Megatron's own torch modules refuse sequence parallelism (the norm) and context parallelism (the attention), and give
the norms other names than Transformer Engine does. These modules accept the former and share the latter, so one weight
mapping and one checkpoint serve machines with and without Transformer Engine.

Shape legend: ``s`` sequence, ``b`` samples, ``a`` query heads and ``g`` key/value heads of this rank, ``d`` head size.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from opd_megatron.megatron import moe


def use_transformer_engine() -> bool:
    """Whether layers are built from Transformer Engine: it is installed, and the model goes to a CUDA device."""
    without_memory = torch.get_default_device().type == "meta"
    return find_spec("transformer_engine") is not None and torch.cuda.is_available() and not without_memory


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv 1910.07467).

    The statistics are float32 whatever the input's dtype. Under sequence parallelism every rank sees its own part of
    the sequence, so the weight is marked for Megatron to sum its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise ``x`` ``[..., h]`` by ``weight`` ``[h]`` with float32 statistics."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)
    return normed * weight


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm followed by a column-parallel linear layer, with Transformer Engine's ``layer_norm_weight``."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        setattr(self.layer_norm_weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = rms_norm(input_, self.layer_norm_weight, self.eps)
        output: tuple[Tensor, Tensor | None] = super().forward(normed, *args, **kwargs)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class CausalAttention(torch.nn.Module):
    """Scaled dot-product attention over the heads of this rank; the one place that computes attention on torch.

    Sequences are padded on the right, so the causal mask alone keeps padding out of every real position.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attention_type != "self":
            raise ValueError(f"only self attention is supported, not {attention_type}")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """``query`` ``[s, b, a, d]``, ``key`` and ``value`` ``[s, b, g, d]`` -> ``[s, b, a*d]``."""
        if packed_seq_params is not None or attention_mask is not None:
            raise ValueError("the micro-batch builder makes right-padded causal batches only")
        s, b, a, d = query.shape
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=k.shape[1] != a
        )
        return context.permute(2, 0, 1, 3).reshape(s, b, a * d)


def _torch_layer_spec(config: TransformerConfig) -> ModuleSpec:
    norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=NormColumnParallelLinear,
                    core_attention=CausalAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=norm,
                    k_layernorm=norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds and of the final norm."""
    if use_transformer_engine():
        dense = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        experts = moe.transformer_engine_layer_spec(config)
        norm = te.TENorm
    else:
        dense, norm = _torch_layer_spec(config), RMSNorm
        experts = moe.torch_layer_spec(dense, RMSNorm)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    first = get_transformer_layer_offset(config, pp_rank=rank)
    layers = get_num_layers_to_build(config, pp_rank=rank)
    kinds = moe.layer_pattern(config)[first : first + layers]
    return TransformerBlockSubmodules(
        layer_specs=[experts if has_experts else dense for has_experts in kinds], layer_norm=norm
    )
