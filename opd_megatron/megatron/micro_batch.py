"""From samples to the tensors of a micro-batch: the one place that knows how sequences are laid out on a device.

Sequences are padded on the right to the longest of the micro-batch. The model reads all tokens but the last, and only
the positions that predict a response token reach the vocabulary head.

Shape legend: ``b`` samples, ``s`` padded length, ``n`` sequences (here the samples), ``N`` response tokens of the
micro-batch, sample after sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd_megatron.sample import Sample


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs, the rows of its output that predict response tokens, and those tokens.

    ``indices`` are the samples' places in the list that was split and ``lengths`` their response lengths, in the order
    of the ``N`` entries.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens_bs: Tensor
    position_ids_bs: Tensor
    rows_N: Tensor
    targets_N: Tensor
    sequences_bsn: Tensor
    """Which of the ``n`` sequences each position is of; padding is of none. The routers of experts balance by it."""

    def split(self, values_N: Tensor) -> dict[int, np.ndarray]:
        """Cut ``[N, ...]`` values into one array per sample, by the sample's place."""
        parts = values_N.detach().cpu().split(list(self.lengths))
        return {index: part.numpy() for index, part in zip(self.indices, parts, strict=True)}

    def join(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """Concatenate per-sample arrays, given for the whole split list, to ``[N]`` on this micro-batch's device."""
        chosen = [np.asarray(arrays[index]) for index in self.indices]
        for array, length in zip(chosen, self.lengths, strict=True):
            if len(array) != length:
                raise ValueError(f"{len(array)} values for a response of {length} tokens")
        return torch.from_numpy(np.concatenate(chosen)).to(self.tokens_bs.device)


def rank_share(samples: Sequence[Sample], rank: int, size: int) -> list[int]:
    """Places of the samples that data-parallel rank ``rank`` of ``size`` works on: every ``size``-th, longest first.

    Dealing out by length keeps the ranks' work alike and the padding small.
    """
    order = sorted(range(len(samples)), key=lambda place: -len(samples[place].tokens))
    return order[rank::size]


def plan(places: Sequence[int], micro_batch_size: int) -> list[tuple[int, ...]]:
    """Cut a rank's share into micro-batches of ``micro_batch_size`` samples (the last may be smaller)."""
    return [tuple(places[start : start + micro_batch_size]) for start in range(0, len(places), micro_batch_size)]


def build(
    samples: Sequence[Sample], places: Sequence[int], *, device: torch.device, length_multiple: int = 1
) -> MicroBatch:
    """Tensors of the samples at ``places``; lengths are rounded up to ``length_multiple`` (sequence parallelism).

    Raises ``ValueError`` for a sample without a prompt token: nothing would predict its first response token.
    """
    chosen = [samples[place] for place in places]
    for sample in chosen:
        if len(sample.prompt_tokens) == 0:
            raise ValueError(f"sample {sample.index} has an empty prompt")
    longest = max(max(1, len(sample.tokens) - 1) for sample in chosen)
    padded = -(-longest // length_multiple) * length_multiple
    tokens_bs = np.zeros((len(chosen), padded), dtype=np.int64)
    member_bsn = np.zeros((len(chosen), padded, len(chosen)), dtype=np.bool_)
    rows: list[np.ndarray] = []
    for row, sample in enumerate(chosen):
        inputs = sample.tokens[:-1]
        tokens_bs[row, : len(inputs)] = inputs
        member_bsn[row, : len(inputs), row] = True
        first = len(sample.prompt_tokens) - 1
        # Megatron's hidden states are [s, b, h], so position p of sample `row` is flat row p * b + row.
        rows.append((first + np.arange(sample.response_length)) * len(chosen) + row)
    return MicroBatch(
        indices=tuple(places),
        lengths=tuple(sample.response_length for sample in chosen),
        tokens_bs=torch.from_numpy(tokens_bs).to(device),
        position_ids_bs=torch.arange(padded, device=device).expand(len(chosen), padded),
        rows_N=torch.from_numpy(np.concatenate(rows)).to(device),
        targets_N=torch.from_numpy(np.concatenate([sample.response_tokens for sample in chosen])).to(device),
        sequences_bsn=torch.from_numpy(member_bsn).to(device),
    )
