"""From samples to the tensors of a micro-batch: the one place that knows how sequences are laid out on a device.

Sequences are laid end to end (``packed``), or padded on the right to the longest of the micro-batch. The model reads
all tokens but the last, and only the positions that predict a response token reach the vocabulary head.

Shape legend: ``b`` rows and ``s`` tokens of each (packed: one row), ``n`` sequences, ``N`` response tokens that this
rank predicts, sample after sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron.packing import ContextSplit, PackedSequences, describe
from opd_megatron.objectives.sequences import Sequences
from opd_megatron.sample import Sample


@dataclass(frozen=True)
class SequenceLayout:
    """How the sequences of a micro-batch lie on the device.

    ``length_multiple`` is what the length of a row must divide by (sequence parallelism), ``split`` the share of this
    context-parallel rank, ``for_torch`` whether attention runs on plain torch. ``for_experts`` says that the model has
    routers, which must know what belongs to which sequence.
    """

    packed: bool = False
    length_multiple: int = 1
    split: ContextSplit = field(default_factory=ContextSplit)
    for_torch: bool = True
    for_experts: bool = False

    def response_offsets(self, sample: Sample, rank: int | None = None) -> np.ndarray:
        """Places in the response that this context-parallel rank (or ``rank``) predicts of a sample, ascending."""
        held = self.split.positions(self.split.padded(len(sample.tokens) - 1), rank)
        places: np.ndarray = held - (len(sample.prompt_tokens) - 1)
        return places[(places >= 0) & (places < sample.response_length)]

    def tokens_on_rank(self, length: int) -> int:
        """Tokens of this rank that a packed sample of ``length`` tokens, its last included, takes."""
        return self.split.padded(max(0, length - 1)) // self.split.size

    def row_length(self, tokens: int) -> int:
        """Length of a packed row of ``tokens`` on this rank with what fills it up; at least some must exist."""
        multiple = self.length_multiple
        if self.split.size > 1 and multiple % 2:
            multiple *= 2
        return max(multiple, -(-tokens // multiple) * multiple)


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs, the rows of its output that predict response tokens, and those tokens.

    ``indices`` are the samples' places in the list that was split, ``lengths`` their response lengths and ``offsets``
    the places within each response that the ``N`` entries belong to: all of them, unless context parallelism splits the
    sequences. ``packed`` is None where rows are padded.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: tuple[np.ndarray, ...]
    tokens_bs: Tensor
    position_ids_bs: Tensor
    rows_N: Tensor
    targets_N: Tensor
    packed: PackedSequences | None = None
    sequences_bsn: Tensor | None = None
    """Which of the ``n`` sequences each position is of; padding is of none. For routers alone, which balance by it."""

    def split(self, values_N: Tensor) -> dict[int, np.ndarray]:
        """One array of the response's length per sample, by its place; 0 where another rank predicts the token."""
        found: dict[int, np.ndarray] = {}
        values = values_N.detach().cpu().numpy()
        ends = np.cumsum([len(offsets) for offsets in self.offsets])
        for index, length, offsets, end in zip(self.indices, self.lengths, self.offsets, ends, strict=True):
            part = values[end - len(offsets) : end]
            if len(offsets) < length:
                whole = np.zeros((length, *values.shape[1:]), dtype=values.dtype)
                whole[offsets] = part
                part = whole
            found[index] = part
        return found

    def rows_by_place(self, values_Nh: Tensor) -> dict[int, Tensor]:
        """``[N, ...]`` values cut into this rank's part of each sample, by its place."""
        parts = values_Nh.split([len(offsets) for offsets in self.offsets])
        return dict(zip(self.indices, parts, strict=True))

    def sequences(self, context_group: dist.ProcessGroup) -> Sequences:
        """Which of the samples each of the ``N`` positions is of; sums over a sample are completed in the group."""
        held = torch.tensor([len(offsets) for offsets in self.offsets], dtype=torch.int64)
        of_N = torch.arange(len(self.indices)).repeat_interleave(held).to(self.tokens_bs.device)

        def add_up(sums_n: Tensor) -> Tensor:
            if context_group.size() > 1 and len(sums_n):
                dist.all_reduce(sums_n, group=context_group)
            return sums_n

        return Sequences(of_N, len(self.indices), add_up)

    def join(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """Per-sample arrays, given for the whole split list, at this rank's positions: ``[N, ...]`` on its device."""
        chosen = [np.asarray(arrays[index]) for index in self.indices]
        for array, length in zip(chosen, self.lengths, strict=True):
            if len(array) != length:
                raise ValueError(f"{len(array)} values for a response of {length} tokens")
        parts = [array[offsets] for array, offsets in zip(chosen, self.offsets, strict=True)]
        empty = np.asarray(arrays[0])[:0] if len(arrays) else np.zeros(0, dtype=np.float32)
        return torch.from_numpy(np.concatenate([empty, *parts])).to(self.tokens_bs.device)


def build(
    samples: Sequence[Sample],
    places: Sequence[int],
    *,
    device: torch.device,
    layout: SequenceLayout,
    row_length: int | None = None,
) -> MicroBatch:
    """Tensors of the samples at ``places``, of which there may be none; ``row_length`` fills a packed row up to it.

    Raises ``ValueError`` for a sample without a prompt token: nothing would predict its first response token.
    """
    chosen = [samples[place] for place in places]
    for sample in chosen:
        if len(sample.prompt_tokens) == 0:
            raise ValueError(f"sample {sample.index} has an empty prompt")
    if layout.packed:
        tokens_bs, position_ids_bs, sequence_bs, rows, offsets, packed = _end_to_end(chosen, layout, row_length)
    else:
        tokens_bs, position_ids_bs, sequence_bs, rows, offsets = _padded(chosen, layout)
        packed = None
    targets = [sample.response_tokens[held] for sample, held in zip(chosen, offsets, strict=True)]
    return MicroBatch(
        indices=tuple(places),
        lengths=tuple(sample.response_length for sample in chosen),
        offsets=tuple(offsets),
        tokens_bs=torch.from_numpy(tokens_bs).to(device),
        position_ids_bs=torch.from_numpy(position_ids_bs).to(device),
        rows_N=torch.from_numpy(_concatenate(rows, np.dtype(np.int64))).to(device),
        targets_N=torch.from_numpy(_concatenate(targets, np.dtype(np.int64))).to(device),
        packed=None if packed is None else packed.to(device),
        sequences_bsn=_membership(sequence_bs, len(chosen), device) if layout.for_experts else None,
    )


def _padded(
    chosen: Sequence[Sample], layout: SequenceLayout
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Tokens, positions, numbers of their sequences (-1: padding), rows of response tokens, places in the responses."""
    count = max(1, len(chosen))
    longest = max([1, *(len(sample.tokens) - 1 for sample in chosen)])
    length = -(-longest // layout.length_multiple) * layout.length_multiple
    tokens_bs = np.zeros((count, length), dtype=np.int64)
    sequence_bs = np.full((count, length), -1)
    rows: list[np.ndarray] = []
    for row, sample in enumerate(chosen):
        inputs = sample.tokens[:-1]
        tokens_bs[row, : len(inputs)] = inputs
        sequence_bs[row, : len(inputs)] = row
        first = len(sample.prompt_tokens) - 1
        # Megatron's hidden states are [s, b, h], so position p of sample `row` is flat row p * b + row.
        rows.append((first + np.arange(sample.response_length)) * count + row)
    offsets = [np.arange(sample.response_length) for sample in chosen]
    return tokens_bs, np.tile(np.arange(length), (count, 1)), sequence_bs, rows, offsets


def _end_to_end(
    chosen: Sequence[Sample], layout: SequenceLayout, row_length: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray], PackedSequences]:
    """As :func:`_padded` for one row of all sequences, with its description."""
    split = layout.split
    padded_lengths = [split.padded(len(sample.tokens) - 1) for sample in chosen]
    taken = sum(padded_lengths) // split.size
    # what fills the row up is a sequence of its own
    filling = (row_length or layout.row_length(taken)) - taken
    if filling:
        padded_lengths.append(filling * split.size)
    total = sum(padded_lengths) // split.size
    tokens_1s, position_ids_1s = np.zeros((2, 1, total), dtype=np.int64)
    sequence_1s = np.full((1, total), -1)
    rows: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    start = 0
    for number, padded in enumerate(padded_lengths):
        held = split.positions(padded)
        here = slice(start, start + len(held))
        position_ids_1s[0, here] = held
        if number < len(chosen):
            sample = chosen[number]
            inputs = sample.tokens[:-1]
            real = held < len(inputs)
            tokens_1s[0, here][real] = inputs[held[real]]
            sequence_1s[0, here][real] = number
            in_response = held - (len(sample.prompt_tokens) - 1)
            predicts = (in_response >= 0) & (in_response < sample.response_length)
            rows.append(start + np.flatnonzero(predicts))
            offsets.append(in_response[predicts])
        start += len(held)
    packed = describe(padded_lengths, split, for_torch=layout.for_torch)
    return tokens_1s, position_ids_1s, sequence_1s, rows, offsets, packed


def _membership(sequence_bs: np.ndarray, count: int, device: torch.device) -> Tensor:
    """``[b, s, n]`` bool; a micro-batch without samples counts as one sequence of padding."""
    return torch.from_numpy(sequence_bs[..., None] == np.arange(max(1, count))).to(device)


def _concatenate(parts: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
