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
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
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
from opd_megatron.megatron.gated_unit import GatedMLP
from opd_megatron.megatron.packing import PackedSequences


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
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    """Keeps one number per row beside the input: torch's own is made of twice as many passes over the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_at_least_float32(x)).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight if x.dtype != scale.dtype else (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """``dx = scale (g w - n mean(g w n))`` and ``dw = sum g n`` with the normed rows ``n``."""
        x, weight, scale = ctx.saved_tensors
        grad, normed = grads[0].to(scale.dtype), x * scale
        weighted = grad * weight
        mean = torch.linalg.vecdot(weighted, normed).unsqueeze(-1).div_(x.shape[-1])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return weighted.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_weight, None


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rotation(frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of rotary ``frequencies`` ``[s, 1, 1, d]``, ``[2, s, 1, 1, d]``; see :func:`rotate`."""
    sines = frequencies.sin()
    sines[..., : sines.shape[-1] // 2].neg_()
    return torch.stack([frequencies.cos(), sines]).to(dtype)


def rotate(x: Tensor, rotation_2: Tensor) -> Tensor:
    """Rotate ``x`` ``[s, b, heads, d]``: ``x cos + (x with its halves exchanged) sin``.

    The first half of the sines is negated, so this is RoPE on the pairs ``(i, i + d/2)`` (arXiv 2104.09864).
    """
    cosines, sines = rotation_2
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, which takes :func:`rotation` where Megatron has frequencies.

    Megatron computes cosines and sines anew for queries and keys of each layer; here all layers share one computation.
    """

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        self._rotation_2 = rotary_pos_emb
        output: tuple[Tensor, Tensor | None] = super().forward(*args, rotary_pos_emb=None, **kwargs)
        return output

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return rotate(query, self._rotation_2), rotate(key, self._rotation_2), value


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

    Sequences are packed, or padded on the right, where the causal mask alone keeps padding out of every real position.
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
        """``query`` ``[s, b, a, d]``, ``key`` and ``value`` ``[s, b, g, d]`` -> ``[s, b, a*d]``; packed, ``b`` is 1."""
        if attention_mask is not None:
            raise ValueError("the micro-batch builder makes causal batches only")
        s, b, a, d = query.shape
        if packed_seq_params is None:
            context = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), None)
            return context.transpose(0, 1).reshape(s, b, a * d)
        assert isinstance(packed_seq_params, PackedSequences)
        if packed_seq_params.rows_T is None:
            (bucket,) = packed_seq_params.buckets
            q, k, v = (tensor[:, 0].unflatten(0, bucket.queries_bq.shape) for tensor in (query, key, value))
            return self._attend(q, k, v, bucket.mask_b1qk).reshape(s, b, a * d)
        query, key, value = query[:, 0], self._of_all_ranks(key[:, 0]), self._of_all_ranks(value[:, 0])
        outputs = []
        for bucket in packed_seq_params.buckets:
            context = self._attend(
                _rows(query, bucket.queries_bq),
                _rows(key, bucket.keys_bk),
                _rows(value, bucket.keys_bk),
                bucket.mask_b1qk,
            )
            outputs.append(context.reshape(-1, a * d))
        return torch.cat(outputs).index_select(0, packed_seq_params.rows_T)[:, None]

    def _attend(self, query_bqad: Tensor, key_bkgd: Tensor, value_bkgd: Tensor, mask_b1qk: Tensor | None) -> Tensor:
        """``[b, q, a, d]``; causal without a mask."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (query_bqad, key_bkgd, value_bkgd))
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask_b1qk,
            is_causal=mask_b1qk is None,
            scale=self.softmax_scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return context.transpose(1, 2)

    @staticmethod
    def _of_all_ranks(tensor_Tgd: Tensor) -> Tensor:
        """Rows of all context-parallel ranks, rank after rank; in backward every rank gets the sum for its own."""
        if parallel_state.get_context_parallel_world_size() == 1:
            return tensor_Tgd
        group = parallel_state.get_context_parallel_group()
        gathered: Tensor = gather_from_sequence_parallel_region(tensor_Tgd.contiguous(), group=group)
        return gathered


def _rows(tensor_Tad: Tensor, rows_bq: Tensor) -> Tensor:
    """``[b, q, a, d]`` rows of a packed tensor."""
    return tensor_Tad.index_select(0, rows_bq.flatten()).unflatten(0, rows_bq.shape)


def _torch_layer_spec(config: TransformerConfig) -> ModuleSpec:
    norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
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
                module=GatedMLP,
                submodules=MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: TransformerConfig, virtual_stage: int | None = None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage, or virtual stage, holds and of the final norm."""
    if use_transformer_engine():
        dense = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        experts = moe.transformer_engine_layer_spec(config)
        norm = te.TENorm
    else:
        dense, norm = _torch_layer_spec(config), RMSNorm
        experts = moe.torch_layer_spec(dense, RMSNorm)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    first = get_transformer_layer_offset(config, virtual_stage, rank)
    layers = get_num_layers_to_build(config, virtual_stage, rank)
    kinds = moe.layer_pattern(config)[first : first + layers]
    return TransformerBlockSubmodules(
        layer_specs=[experts if has_experts else dense for has_experts in kinds], layer_norm=norm
    )
