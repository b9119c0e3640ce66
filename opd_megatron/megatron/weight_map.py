"""The one table between Hugging Face and Megatron parameters, used by loading, saving, weight sync and the tools.

Each :class:`ParameterMap` names one global Megatron parameter and the Hugging Face tensors it is made of, and its
:class:`Layout` knows four moves: ``merge`` (HF -> full), ``split`` (full -> HF), ``shard`` (full -> rank) and
``unshard`` (ranks -> full). The families differ only in which rows the table has.

Shape legend: ``a`` query heads, ``g`` key/value heads, ``d`` head size, ``h`` hidden size, ``f`` feed-forward size,
``E`` experts, ``v`` vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture


@dataclass(frozen=True)
class Layout:
    """How the Hugging Face tensors of one parameter are laid out in Megatron and over tensor-parallel ranks."""

    merge: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    shard: Callable[[Tensor, int, int], Tensor]
    unshard: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class ParameterMap:
    """One global Megatron parameter, the Hugging Face names it is made of, and their (unpadded) shapes."""

    megatron_name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    init: str = "normal"
    is_expert: bool = False
    """Whether it is a weight of one expert, which only the ranks of that expert hold."""

    def random(self, architecture: ModelArchitecture, seed: int, dtype: torch.dtype) -> list[Tensor]:
        """Seeded initial HF tensors: N(0, ``init_method_std``) matrices, norms of one, biases of zero.

        Each tensor has a generator of its own, seeded by ``seed`` and its name, so every parallel layout starts from
        the same weights.
        """
        return [
            self._random_tensor(name, shape, architecture.init_method_std, seed).to(dtype)
            for name, shape in zip(self.hf_names, self.hf_shapes, strict=True)
        ]

    def _random_tensor(self, name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
        if self.init == "ones":
            return torch.ones(shape)
        if self.init == "zeros":
            return torch.zeros(shape)
        # torch's generator uses 32 bits of its seed, so the name must reach all of them.
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.randn(shape, generator=generator) * std


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


_REPLICATED = Layout(
    merge=_only,
    split=lambda full: [full],
    shard=lambda full, rank, size: full,
    unshard=lambda shards: shards[0],
)


def _along(dim: int) -> Layout:
    return Layout(
        merge=_only,
        split=lambda full: [full],
        shard=lambda full, rank, size: full.chunk(size, dim)[rank],
        unshard=lambda shards: torch.cat(list(shards), dim),
    )


def _gate_up() -> Layout:
    """``[2f, h]``: gate rows then up rows, in each rank's shard too."""

    def shard(full: Tensor, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])

    def unshard(shards: Sequence[Tensor]) -> Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])

    return Layout(merge=torch.cat, split=lambda full: list(full.chunk(2)), shard=shard, unshard=unshard)  # type: ignore[arg-type]


def _qkv(architecture: ModelArchitecture) -> Layout:
    """Rows by key/value head: the query heads of the group, its key, its value; heads are split over ranks."""
    groups, size = architecture.num_query_groups, architecture.kv_channels
    queries = architecture.num_attention_heads // groups

    def merge(tensors: Sequence[Tensor]) -> Tensor:
        q, k, v = (tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors)
        return torch.cat([q, k, v], dim=1).flatten(0, 1)

    def split(full: Tensor) -> list[Tensor]:
        grouped = full.reshape(groups, (queries + 2) * size, *full.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split([queries * size, size, size], dim=1)]

    rows = _along(0)
    return Layout(merge=merge, split=split, shard=rows.shard, unshard=rows.unshard)


def _vocabulary(vocab_size: int, padded: int) -> Layout:
    """Rows padded with zeros to the padded vocabulary; the padding does not exist in Hugging Face."""

    def merge(tensors: Sequence[Tensor]) -> Tensor:
        full = _only(tensors)
        return torch.cat([full, full.new_zeros(padded - vocab_size, full.shape[1])])

    rows = _along(0)
    return Layout(merge=merge, split=lambda full: [full[:vocab_size]], shard=rows.shard, unshard=rows.unshard)


def parameter_maps(architecture: ModelArchitecture, padded_vocab_size: int) -> list[ParameterMap]:
    """Every parameter of the model in the order of its layers; layers are numbered globally from 0."""
    a = architecture
    h, d = a.hidden_size, a.kv_channels
    q_rows, kv_rows = a.num_attention_heads * d, a.num_query_groups * d
    vocabulary = _vocabulary(a.vocab_size, padded_vocab_size)
    qkv = _qkv(a)
    maps = [
        ParameterMap(
            "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((a.vocab_size, h),), vocabulary
        )
    ]
    for layer in range(a.num_layers):
        mcore, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention = f"{hf}.self_attn"
        projections = tuple(f"{attention}.{name}_proj" for name in "qkv")

        def add(
            name: str,
            hf_names: tuple[str, ...],
            shapes: tuple[tuple[int, ...], ...],
            layout: Layout,
            init: str,
            prefix: str = mcore,
        ) -> None:
            maps.append(ParameterMap(f"{prefix}.{name}", hf_names, shapes, layout, init))

        add("self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), ((h, q_rows),), _along(1), "normal")
        add(
            "self_attention.linear_qkv.layer_norm_weight",
            (f"{hf}.input_layernorm.weight",),
            ((h,),),
            _REPLICATED,
            "ones",
        )
        add(
            "self_attention.linear_qkv.weight",
            tuple(f"{name}.weight" for name in projections),
            ((q_rows, h), (kv_rows, h), (kv_rows, h)),
            qkv,
            "normal",
        )
        if a.add_qkv_bias:
            add(
                "self_attention.linear_qkv.bias",
                tuple(f"{name}.bias" for name in projections),
                ((q_rows,), (kv_rows,), (kv_rows,)),
                qkv,
                "zeros",
            )
        if a.qk_layernorm:
            for name in "qk":
                add(
                    f"self_attention.{name}_layernorm.weight",
                    (f"{attention}.{name}_norm.weight",),
                    ((d,),),
                    _REPLICATED,
                    "ones",
                )
        maps.extend(_feed_forward(a, layer))
    maps.append(ParameterMap("decoder.final_layernorm.weight", ("model.norm.weight",), ((h,),), _REPLICATED, "ones"))
    if a.untie_embeddings_and_output_weights:
        maps.append(ParameterMap("output_layer.weight", ("lm_head.weight",), ((a.vocab_size, h),), vocabulary))
    return maps


def _gated_linear_unit(mcore: str, hf: str, h: int, f: int, number: str = "") -> list[ParameterMap]:
    """A feed-forward unit: ``number`` is the expert's, which Megatron appends to the names of its two weights."""
    gate_up, down = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"), (f"{hf}.down_proj.weight",)
    expert = bool(number)
    return [
        ParameterMap(f"{mcore}.linear_fc1.weight{number}", gate_up, ((f, h), (f, h)), _gate_up(), is_expert=expert),
        ParameterMap(f"{mcore}.linear_fc2.weight{number}", down, ((h, f),), _along(1), is_expert=expert),
    ]


def _feed_forward(a: ModelArchitecture, layer: int) -> list[ParameterMap]:
    """The feed-forward part of one layer and the norm before it."""
    mcore, hf, h = f"decoder.layers.{layer}", f"model.layers.{layer}", a.hidden_size
    has_experts = a.has_experts(layer)
    norm = "pre_mlp_layernorm.weight" if has_experts else "mlp.linear_fc1.layer_norm_weight"
    maps = [
        ParameterMap(f"{mcore}.{norm}", (f"{hf}.post_attention_layernorm.weight",), ((h,),), _REPLICATED, "ones"),
    ]
    mcore, hf = f"{mcore}.mlp", f"{hf}.mlp"
    if a.mixture is None or not has_experts:
        return maps + _gated_linear_unit(mcore, hf, h, a.ffn_hidden_size)
    experts, shared = a.mixture.num_experts, a.mixture.moe_shared_expert_intermediate_size
    maps.append(ParameterMap(f"{mcore}.router.weight", (f"{hf}.gate.weight",), ((experts, h),), _REPLICATED))
    for expert in range(experts):
        unit = f"{mcore}.experts", f"{hf}.experts.{expert}"
        maps += _gated_linear_unit(*unit, h, a.mixture.moe_ffn_hidden_size, str(expert))
    if shared is not None:
        maps += _gated_linear_unit(f"{mcore}.shared_experts", f"{hf}.shared_expert", h, shared)
    if a.mixture.moe_shared_expert_gate:
        gate = f"{hf}.shared_expert_gate.weight"
        maps.append(ParameterMap(f"{mcore}.shared_experts.gate_weight", (gate,), ((1, h),), _REPLICATED))
    return maps


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(\.mlp\.experts\.linear_fc[12]\.weight)(\d+)$")


def global_name(local_name: str, layer_offset: int, expert_offset: int) -> str:
    """Name of a rank's parameter in the whole model: layers and experts are counted from those of the other ranks."""
    name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + layer_offset}.", local_name)
    return _EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + expert_offset}", name)
