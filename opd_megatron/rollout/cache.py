"""Keys and values of the sequences that are being decoded.

Shape legend: ``B`` sequences, ``G`` sequences times key/value heads, ``L`` positions, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LENGTH_UNIT = 16
"""Positions are kept and attended to in multiples of this: short odd rows take slow paths in matmul and softmax."""


def round_up_length(length: int) -> int:
    """The smallest multiple of the length unit that holds ``length`` positions."""
    return -(-length // _LENGTH_UNIT) * _LENGTH_UNIT


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a cache: layers, key/value heads, and the size of one head."""

    layers: int
    heads: int
    head_size: int


class KeyValueCache:
    """Keys and values of ``B`` left-padded sequences, and which positions may be attended to.

    ``keys[layer]`` and ``values[layer]`` are ``[G, capacity, D]``; ``length`` positions are filled. ``bias_GL`` is 0
    where a position holds a token and minus infinity elsewhere; it has one row when no sequence is padded.
    ``pad_B`` counts the padding of each sequence.
    """

    def __init__(self, pad_B: Tensor, padded: bool, capacity: int, shape: CacheShape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.pad_B = pad_B
        self.padded = padded
        self.length = 0
        rows, device = len(pad_B) * shape.heads, pad_B.device
        size = (rows, round_up_length(capacity), shape.head_size)
        # Zeros, not empty: positions that are masked out still enter a product with a probability of zero.
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.bias_GL = torch.full((rows if padded else 1, size[1]), -torch.inf, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.bias_GL.shape[1]

    def advance(self, count: int) -> None:
        """Open the next ``count`` positions, growing by half when they do not fit."""
        start, self.length = self.length, self.length + count
        if self.length > self.capacity:
            self._grow(round_up_length(max(self.length, self.capacity * 3 // 2)) - self.capacity)
        opened = self.bias_GL[:, start : self.length]
        if not self.padded or count == 1:
            # A sequence that is being decoded has all its padding behind it.
            opened.zero_()
            return
        positions = torch.arange(start, self.length, device=self.pad_B.device)
        behind_GL = positions < self.pad_B.repeat_interleave(self.shape.heads).unsqueeze(1)
        opened.zero_().masked_fill_(behind_GL, -torch.inf)

    def _grow(self, extra: int) -> None:
        for layer in range(self.shape.layers):
            self.keys[layer] = F.pad(self.keys[layer], (0, 0, 0, extra))
            self.values[layer] = F.pad(self.values[layer], (0, 0, 0, extra))
        self.bias_GL = F.pad(self.bias_GL, (0, extra), value=-torch.inf)

    def write(self, layer: int, keys_BSHD: Tensor, values_BSHD: Tensor) -> None:
        """Store keys and values ``[B, S, heads, D]`` at the ``S`` positions opened last."""
        batch, count = keys_BSHD.shape[:2]
        here = slice(self.length - count, self.length)
        size = (batch, self.shape.heads, self.capacity, self.shape.head_size)
        self.keys[layer].view(size)[:, :, here] = keys_BSHD.transpose(1, 2)
        self.values[layer].view(size)[:, :, here] = values_BSHD.transpose(1, 2)

    def take(self, rows_B: Tensor) -> None:
        """Keep (or repeat) the sequences ``rows_B``, in that order."""
        heads = torch.arange(self.shape.heads, device=rows_B.device)
        rows_G = (rows_B.unsqueeze(1) * self.shape.heads + heads).flatten()
        for layer in range(self.shape.layers):
            self.keys[layer] = self.keys[layer].index_select(0, rows_G)
            self.values[layer] = self.values[layer].index_select(0, rows_G)
        self.pad_B = self.pad_B.index_select(0, rows_B)
        if self.padded:
            self.bias_GL = self.bias_GL.index_select(0, rows_G)


def join_caches(caches: Sequence[KeyValueCache]) -> KeyValueCache:
    """One cache of all sequences, in order; the parts (of equal length and capacity) are emptied."""
    if len(caches) == 1:
        return caches[0]
    joined = caches[0]
    for layer in range(joined.shape.layers):
        for name in ("keys", "values"):
            parts = [getattr(cache, name)[layer] for cache in caches]
            for cache in caches:
                getattr(cache, name)[layer] = parts[0][:0]
            getattr(joined, name)[layer] = torch.cat(parts)
    if joined.padded:
        joined.bias_GL = torch.cat([cache.bias_GL for cache in caches])
    joined.pad_B = torch.cat([cache.pad_B for cache in caches])
    return joined
