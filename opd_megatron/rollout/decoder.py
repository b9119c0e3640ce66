"""Incremental forward pass of a Hugging Face causal language model, written for decoding.

It runs the weights of the transformers modules of the Qwen2, Qwen3 and Llama families and of Qwen's mixtures, which
agree in everything but QKV bias, QK norm, rotary frequencies and the feed-forward part. Compared with the modules' own
``forward`` it multiplies by joined QKV and gate/up matrices, writes keys and values in place, and attends without
repeating the key/value heads.
``benchmarks/decode.py`` measures what that is worth; the tests hold both forwards equal.

Shape legend: ``B`` sequences, ``S`` new tokens per sequence, ``L`` cached positions, ``D`` head size, ``V``
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_megatron.rollout.cache import CacheShape, KeyValueCache, round_up_length
from opd_megatron.rollout.feed_forward import FeedForward, join, read_feed_forward


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output_weight: Tensor
    mlp_norm: Tensor
    feed_forward: FeedForward


def _read_layer(layer: Any) -> _Layer:
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    has_norm = hasattr(attention, "q_norm")
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv_weight=join(projections, "weight"),
        qkv_bias=None if attention.q_proj.bias is None else join(projections, "bias"),
        q_norm=attention.q_norm.weight if has_norm else None,
        k_norm=attention.k_norm.weight if has_norm else None,
        output_weight=attention.o_proj.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        feed_forward=read_feed_forward(layer.mlp),
    )


class Decoder:
    """Runs ``model`` (a transformers causal language model) over new tokens and a cache.

    The model's QKV and gate/up parameters become views of joined tensors: replace weights by copying into them.
    Call :meth:`refresh` after that.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        attention = model.model.layers[0].self_attn
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_size = int(attention.head_dim)
        self.attention_scale = float(attention.scaling)
        self.epsilon = float(config.rms_norm_eps)
        self.shape = CacheShape(int(config.num_hidden_layers), self.kv_heads, self.head_size)
        self._model = model
        self._layers = [_read_layer(layer) for layer in model.model.layers]
        self._cos_LD = self._sin_LD = torch.empty(0)
        self._qk_norms: list[Tensor | None] = []
        self.refresh()

    def refresh(self) -> None:
        """Recompute what is derived from weights: the QK norm of all heads of a layer as one ``[heads, D]``."""
        self._qk_norms = [
            None
            if layer.q_norm is None or layer.k_norm is None
            else torch.cat((layer.q_norm.expand(self.heads, -1), layer.k_norm.expand(self.kv_heads, -1)))
            for layer in self._layers
        ]

    def new_cache(self, pad_B: Tensor, padded: bool, capacity: int) -> KeyValueCache:
        """An empty cache for sequences with ``pad_B`` positions of padding on the left (``padded``: any at all)."""
        return KeyValueCache(pad_B, padded, capacity, self.shape, self._model.dtype)

    def forward(self, tokens_BS: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits after the last of the new tokens, ``[B, V]``; the cache grows by ``S`` positions.

        Several tokens at a time are only possible while the cache is empty (``ValueError``).
        """
        batch, count = tokens_BS.shape
        if count > 1 and cache.length > 0:
            raise ValueError("a cache that holds tokens takes one token at a time")
        cache.advance(count)
        cos, sin = self._rotation(cache, count)
        mask = _prompt_mask(cache) if count > 1 and cache.padded else None
        hidden = F.embedding(tokens_BS.reshape(-1), self._model.model.embed_tokens.weight)
        size = hidden.shape[-1:]
        for index, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, size, layer.input_norm, self.epsilon)
            qkv = F.linear(normed, layer.qkv_weight, layer.qkv_bias).view(batch, count, -1, self.head_size)
            rotated, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            qk_norm = self._qk_norms[index]
            if qk_norm is not None:
                rotated = F.rms_norm(rotated, (self.head_size,), None, self.epsilon) * qk_norm
            rotated = torch.addcmul(rotated * cos, rotated.roll(self.head_size // 2, -1), sin)
            query, key = rotated.split((self.heads, self.kv_heads), dim=2)
            cache.write(index, key, value)
            attended = (
                self._attend_one(query, cache, index) if count == 1 else self._attend_prompt(query, key, value, mask)
            )
            hidden = torch.addmm(hidden, attended.reshape(batch * count, -1), layer.output_weight.t())
            normed = F.rms_norm(hidden, size, layer.mlp_norm, self.epsilon)
            hidden = layer.feed_forward(hidden, normed)
        last = hidden.view(batch, count, -1)[:, -1]
        normed = F.rms_norm(last, size, self._model.model.norm.weight, self.epsilon)
        return F.linear(normed, self._model.lm_head.weight)

    def _rotation(self, cache: KeyValueCache, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of the positions opened last, ``[B or 1, S, 1, D]``.

        With the first half of the sines negated, rotating is ``x * cos + roll(x, D / 2) * sin``.
        """
        if len(self._cos_LD) < cache.length:
            positions = torch.arange(2 * cache.length, device=cache.pad_B.device).unsqueeze(0)
            cos, sin = self._model.model.rotary_emb(self._model.model.norm.weight, positions)
            low, high = sin[0].chunk(2, dim=-1)
            self._cos_LD, self._sin_LD = cos[0], torch.cat((-low, high), dim=-1)
        if not cache.padded:
            here = slice(cache.length - count, cache.length)
            return self._cos_LD[here].unsqueeze(1), self._sin_LD[here].unsqueeze(1)
        positions_S = torch.arange(cache.length - count, cache.length, device=cache.pad_B.device)
        positions_BS = (positions_S - cache.pad_B.unsqueeze(1)).clamp_(min=0)
        return self._cos_LD[positions_BS].unsqueeze(2), self._sin_LD[positions_BS].unsqueeze(2)

    def _attend_one(self, query_BSHD: Tensor, cache: KeyValueCache, layer: int) -> Tensor:
        """Attention of one new token: the query heads of a group stand where query positions usually do."""
        length = round_up_length(cache.length)
        keys_GLD, values_GLD = cache.keys[layer][:, :length], cache.values[layer][:, :length]
        bias_G1L = cache.bias_GL[:, :length].unsqueeze(1)
        query_GHD = query_BSHD.reshape(len(keys_GLD), -1, self.head_size)
        if query_GHD.dtype != torch.float32:
            return F.scaled_dot_product_attention(
                query_GHD, keys_GLD, values_GLD, bias_G1L.expand(len(keys_GLD), -1, -1), scale=self.attention_scale
            )
        # In float32 the plain products take two thirds of the time of the CPU kernel, which is made for many queries.
        scores = torch.baddbmm(bias_G1L, query_GHD, keys_GLD.transpose(1, 2), alpha=self.attention_scale)
        return torch.bmm(torch.softmax(scores, dim=-1), values_GLD)

    def _attend_prompt(self, query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention within the prompts, ``[B, S, heads, D]``."""
        group = self.heads // self.kv_heads
        attended = F.scaled_dot_product_attention(
            query_BSHD.transpose(1, 2),
            key_BSHD.repeat_interleave(group, dim=2).transpose(1, 2),
            value_BSHD.repeat_interleave(group, dim=2).transpose(1, 2),
            mask,
            is_causal=mask is None,
            scale=self.attention_scale,
        )
        return attended.transpose(1, 2)


def _prompt_mask(cache: KeyValueCache) -> Tensor:
    """``[B, 1, L, L]``: true where a prompt position may look.

    Padding looks at itself: kernels differ in what they return for a position that may look nowhere, and a NaN there
    would spread through the cache.
    """
    positions = torch.arange(cache.length, device=cache.pad_B.device)
    causal_LL = positions.unsqueeze(0) <= positions.unsqueeze(1)
    token_BL = positions >= cache.pad_B.unsqueeze(1)
    itself_LL = torch.eye(cache.length, dtype=torch.bool, device=cache.pad_B.device)
    return ((causal_LL & token_BL[:, None]) | itself_LL).unsqueeze(1)
