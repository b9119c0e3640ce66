"""What the exact KL and whole distributions need of a frozen model in training: hidden rows and output weight.

The rows lie on the host between scoring and training, with the rank that trains on their sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.megatron import cpu
from opd_megatron.megatron.batching import MicroBatches
from opd_megatron.megatron.exchange import exchange
from opd_megatron.megatron.micro_batch import MicroBatch, SequenceLayout
from opd_megatron.megatron.vocab_head import Side
from opd_megatron.sample import Sample

Shares = Sequence[Sequence[MicroBatches]]
"""Micro-batches of every data-parallel rank for each optimizer step, as ``batching.plan_steps`` makes them."""


@dataclass(frozen=True)
class OtherPrompts:
    """The ``samples`` and how they lie on the context-parallel ranks where the teacher sees other prompts.

    A response that begins elsewhere in its sequence is cut over these ranks at other places; ``layout`` is that of the
    sequences on either side.
    """

    samples: Sequence[Sample]
    layout: SequenceLayout

    def given(self, place: int, part: int) -> np.ndarray:
        """Places in the response whose rows the teacher's rank ``part`` has."""
        return self.layout.response_offsets(self.samples[place].seen_by_teacher(), part)

    def wanted(self, place: int, part: int) -> np.ndarray:
        """Places in the response that the student's rank ``part`` trains."""
        return self.layout.response_offsets(self.samples[place], part)


class TeacherRows:
    """Hidden rows of a frozen model of ``vocab_size`` tokens by place of their sample.

    They are in ``dtype`` (None: that of the model).
    """

    def __init__(self, dtype: torch.dtype | None, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._dtype = dtype
        self._rows: dict[int, Tensor] = {}
        self._weight_Vh: Tensor | None = None
        self._part = 0

    def keep(self, batch: MicroBatch, rows_Nh: Tensor) -> None:
        """Take the rows ``[N, h]`` of a micro-batch to the host; the model's process groups are in use."""
        self._part = parallel_state.get_context_parallel_rank()
        self._rows.update(batch.rows_by_place(rows_Nh.to("cpu", self._dtype)))

    def take_weight(self, weight_Vh: Tensor | None, *, leaves: bool) -> None:
        """Remember this rank's rows of the output weight, as a copy if the tensor itself ``leaves`` the device."""
        if weight_Vh is None:
            return
        self._weight_Vh = weight_Vh.detach().to("cpu", copy=True) if leaves else weight_Vh.detach()

    def bring(self, given: Shares, wanted: Shares, *, other_ranks: bool) -> None:
        """Pass the rows of shares ``given`` on to the ranks that train shares ``wanted``; all ranks call it.

        ``other_ranks`` says that the shares are numbered by ranks of another layout.
        """
        if not other_ranks and _places(given) == _places(wanted):
            return
        part, rank = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
        brought: dict[int, Tensor] = {}
        for before, after in zip(given, wanted, strict=True):
            held = {(place, self._part): self._rows.pop(place) for place in _all_places(before) if place in self._rows}
            places = _all_places([after[rank]]) if _trains() else []
            found = exchange(held, [(place, part) for place in places])
            brought |= {place: found[place, part] for place in places}
        self._rows = brought

    def bring_by_offset(self, given: Shares, wanted: Shares, prompts: OtherPrompts) -> None:
        """As :meth:`bring` where context-parallel ranks have other parts of a response than those that train them.

        Every part travels in pieces, one for each rank that wants something of it, and is put together again by the
        place in the response.
        """
        ranks, rank = prompts.layout.split.size, parallel_state.get_data_parallel_rank()
        me = parallel_state.get_context_parallel_rank()
        brought: dict[int, Tensor] = {}
        for before, after in zip(given, wanted, strict=True):
            held: dict[tuple[int, int], Tensor] = {}
            for place in (place for place in _all_places(before) if place in self._rows):
                rows, offsets = self._rows.pop(place), prompts.given(place, self._part)
                for part in range(ranks):
                    chosen = np.flatnonzero(np.isin(offsets, prompts.wanted(place, part)))
                    held[place, self._part * ranks + part] = rows[torch.from_numpy(chosen)]
            places = _all_places([after[rank]]) if _trains() else []
            keys = [(place, part * ranks + me) for place in places for part in range(ranks)]
            found = exchange(held, keys)
            for place in places:
                mine = prompts.wanted(place, me)
                offsets = np.concatenate([np.intersect1d(prompts.given(place, part), mine) for part in range(ranks)])
                rows = torch.cat([found[place, part * ranks + me] for part in range(ranks)])
                brought[place] = rows[torch.from_numpy(np.argsort(offsets))]
        self._rows = brought

    def of(self, batch: MicroBatch) -> Side:
        """On the device: the rows ``[N, h]`` of a micro-batch in the data type of the output weight, and that."""
        assert self._weight_Vh is not None
        self._weight_Vh = weight_Vh = self._weight_Vh.to(cpu.device())
        empty = weight_Vh.new_zeros((0, weight_Vh.shape[1]))
        return Side(torch.cat([empty, *(self._rows[place].to(weight_Vh) for place in batch.indices)]), weight_Vh)


def _trains() -> bool:
    """Whether this rank makes the loss."""
    return bool(parallel_state.is_pipeline_last_stage())


def _all_places(shares: Iterable[MicroBatches]) -> list[int]:
    return [place for share in shares for places in share for place in places]


def _places(shares: Shares) -> list[list[set[int]]]:
    return [[set(_all_places([share])) for share in step] for step in shares]
