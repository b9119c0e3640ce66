"""A teacher's rows of the output weight for the columns that the student's shard covers.

Both vocabularies are padded to multiples of their own before they are split, so the shards of one rank may start at
different columns. The few rows that lie on other ranks are sent over; the others stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron.vocab_head.shard import VocabShard, scaled_logits, statistics_dtype


@dataclass(frozen=True)
class AlignedWeight:
    """Pieces of a weight with the columns of another shard that they make, counted from its first."""

    pieces: tuple[tuple[slice, Tensor], ...]

    def scaled_logits(self, hidden_Ch: Tensor, temperature: float) -> Tensor:
        """``hidden @ weight^T / temperature`` for the columns of the other shard."""
        if len(self.pieces) == 1:
            return scaled_logits(hidden_Ch, self.pieces[0][1], temperature)
        tokens, columns = hidden_Ch.shape[0], sum(weight.shape[0] for _, weight in self.pieces)
        out_CV = hidden_Ch.new_empty((tokens, columns), dtype=statistics_dtype(hidden_Ch))
        # in two halves: each piece is made on its own and then put in its place
        for half in (slice(0, tokens // 2), slice(tokens // 2, tokens)):
            for place, weight in self.pieces:
                out_CV[half, place] = scaled_logits(hidden_Ch[half], weight, temperature)
        return out_CV


def _overlaps(wanted: VocabShard, rows: int, rank: int) -> Iterator[tuple[int, slice]]:
    """Tokens that the wanted shard of ``rank`` shares with the shards of ``rows`` rows: ``(their rank, tokens)``."""
    first = wanted.rows * rank
    end = min(first + wanted.rows, wanted.vocab_size)
    for other in range(wanted.ranks):
        start, stop = max(first, other * rows), min(end, (other + 1) * rows)
        if start < stop:
            yield other, slice(start, stop)


def align(weight_Vh: Tensor, shard: VocabShard) -> AlignedWeight:
    """The rows of a weight, split over the ranks of ``shard`` in shards of its own, that make the columns of ``shard``.

    Collective if the two split the vocabulary differently. Keeps copies of the rows that other ranks hold, no others.
    Raises ``ValueError`` if the ranks together hold fewer rows than the vocabulary has tokens.
    """
    weight_Vh = weight_Vh.detach()
    own = VocabShard.of(weight_Vh, shard.vocab_size, shard.group)
    rank = 0 if shard.group is None else dist.get_rank(shard.group)
    received = {}
    if own.rows != shard.rows and shard.ranks > 1:
        received = _exchange(weight_Vh, own, shard, rank)
    pieces = []
    for other, tokens in _overlaps(shard, own.rows, rank):
        here = weight_Vh[tokens.start - own.first : tokens.stop - own.first] if other == rank else received[other]
        pieces.append((slice(tokens.start - shard.first, tokens.stop - shard.first), here))
    return AlignedWeight(tuple(pieces))


def _exchange(weight_Vh: Tensor, own: VocabShard, shard: VocabShard, rank: int) -> dict[int, Tensor]:
    """Send every rank the rows it wants of ours, and get those that we want, by the rank that had them."""
    sent = [slice(0, 0)] * shard.ranks
    for other in range(shard.ranks):
        for owner, tokens in _overlaps(shard, own.rows, other):
            if owner == rank and other != rank:
                sent[other] = slice(tokens.start - own.first, tokens.stop - own.first)
    counts = [0] * shard.ranks
    for owner, tokens in _overlaps(shard, own.rows, rank):
        if owner != rank:
            counts[owner] = tokens.stop - tokens.start
    received = weight_Vh.new_empty((sum(counts), weight_Vh.shape[1]))
    dist.all_to_all_single(
        received,
        torch.cat([weight_Vh[rows] for rows in sent]),
        output_split_sizes=counts,
        input_split_sizes=[rows.stop - rows.start for rows in sent],
        group=shard.group,
    )
    return dict(enumerate(received.split(counts)))
