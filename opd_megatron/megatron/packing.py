"""Sequences laid end to end: where each token lies, also over context-parallel ranks, and which tokens attend to which.

A sequence is padded only as far as the split over context-parallel ranks demands. Megatron's split is a zigzag: of a
sequence cut into ``2 * size`` pieces, rank r holds pieces r and ``2 * size - 1 - r``, so that under a causal mask every
rank has the same work. :class:`ContextSplit` is the one place that knows it.

Shape legend: ``T`` tokens of this rank, ``R`` context-parallel ranks, ``b`` sequences, ``q`` queries and ``k`` keys of
each in a bucket.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

SIMILAR = 0.8
"""Sequences attend in one batch if the shortest has at least this part of the longest one's length."""


@dataclass(frozen=True)
class ContextSplit:
    """How one sequence is shared by ``size`` context-parallel ranks, of which this is ``rank``."""

    size: int = 1
    rank: int = 0

    def padded(self, length: int) -> int:
        """``length`` rounded up to what can be split."""
        return length if self.size == 1 else -(-length // (2 * self.size)) * 2 * self.size

    def positions(self, padded: int, rank: int | None = None) -> np.ndarray:
        """Positions that this rank (or ``rank``) holds of a sequence of ``padded`` tokens, ascending."""
        if self.size == 1:
            return np.arange(padded)
        rank = self.rank if rank is None else rank
        piece = padded // (2 * self.size)
        early = np.arange(rank * piece, (rank + 1) * piece)
        return np.concatenate([early, padded - (rank + 1) * piece + np.arange(piece)])


@dataclass(frozen=True)
class AttentionBucket:
    """Sequences of similar length that attend in one call.

    ``queries_bq`` are rows of this rank's tokens, ``keys_bk`` rows of the tokens of all context-parallel ranks, rank
    after rank. ``mask_b1qk`` is True where a query may look; None stands for the causal mask.
    """

    queries_bq: Tensor
    keys_bk: Tensor
    mask_b1qk: Tensor | None


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed batch, with what attention on plain torch needs beside it.

    ``rows_T`` are the places of this rank's tokens in the outputs of the buckets, one bucket after the other; None
    stands for a single bucket that has all tokens, none of another rank, in their order.
    """

    buckets: tuple[AttentionBucket, ...] = ()
    rows_T: Tensor | None = None

    def to(self, device: torch.device) -> PackedSequences:
        """The same with its tensors on ``device``."""
        moved = copy.copy(self)
        moved.cu_seqlens_q = moved.cu_seqlens_kv = self.cu_seqlens_q.to(device)
        moved.rows_T = None if self.rows_T is None else self.rows_T.to(device)
        moved.buckets = tuple(
            AttentionBucket(
                bucket.queries_bq.to(device),
                bucket.keys_bk.to(device),
                None if bucket.mask_b1qk is None else bucket.mask_b1qk.to(device),
            )
            for bucket in self.buckets
        )
        return moved


def describe(padded_lengths: Sequence[int], split: ContextSplit, *, for_torch: bool) -> PackedSequences:
    """The packed batch of sequences of ``padded_lengths`` tokens (over all ranks of ``split``), in their order.

    Transformer Engine's kernels need the lengths alone; ``for_torch`` adds the rows for ``layers.CausalAttention``,
    which takes rotary frequencies by position and therefore another ``qkv_format``.
    """
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(padded_lengths)])).to(torch.int32)
    longest = max(padded_lengths, default=0)
    packed = PackedSequences(
        qkv_format="rows" if for_torch else "thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if for_torch:
        packed.buckets, packed.rows_T = _buckets(padded_lengths, split)
    return packed


def _buckets(padded_lengths: Sequence[int], split: ContextSplit) -> tuple[tuple[AttentionBucket, ...], Tensor | None]:
    padded = np.asarray(padded_lengths, dtype=np.int64)
    local = padded // split.size
    starts = np.cumsum(local) - local
    total = int(local.sum())
    rows_T = np.zeros(total, dtype=np.int64)
    buckets: list[AttentionBucket] = []
    filled = 0
    for members in _similar(padded_lengths):
        columns = np.arange(local[members].max())
        real_bq = columns < local[members][:, None]
        queries_bq = np.where(real_bq, starts[members][:, None] + columns, 0)
        rows_T[queries_bq[real_bq]] = filled + np.flatnonzero(real_bq)
        filled += queries_bq.size
        queries = torch.from_numpy(queries_bq)
        if split.size == 1:
            # What fills a row up lies behind its tokens, where the causal mask hides it from them.
            buckets.append(AttentionBucket(queries, queries, None))
            continue
        keys_bk = np.zeros((len(members), padded[members].max()), dtype=np.int64)
        positions_bq = np.zeros_like(queries_bq)
        for row, place in enumerate(members):
            positions_bq[row, : local[place]] = split.positions(padded[place])
            for rank in range(split.size):
                mine = rank * total + starts[place] + np.arange(local[place])
                keys_bk[row, split.positions(padded[place], rank)] = mine
        mask_bqk = np.arange(keys_bk.shape[1]) <= positions_bq[:, :, None]
        buckets.append(AttentionBucket(queries, torch.from_numpy(keys_bk), torch.from_numpy(mask_bqk)[:, None]))
    in_order = split.size == 1 and len(buckets) == 1 and filled == total
    return tuple(buckets), None if in_order else torch.from_numpy(rows_T)


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Places of the sequences that have tokens, in groups of similar length, longest first."""
    groups: list[list[int]] = []
    for place in sorted((place for place, length in enumerate(lengths) if length), key=lambda place: -lengths[place]):
        if groups and lengths[place] >= SIMILAR * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
