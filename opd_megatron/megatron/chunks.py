"""Where a rank's parameters lie in the tensors of a checkpoint, so that any layout can read what another one wrote.

A checkpoint names each tensor of the whole model once; the layers of a kind are stacked along a first axis. A rank
writes and reads rectangular pieces of it. Megatron's ``sharded_state_dict`` says which pieces a model's parameters
are. What is cut finer than a parameter, as the distributed optimizer cuts its state, is a range of the flattened
parameter and becomes a few rectangles, so that no rank has to gather anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from opd_megatron.megatron.model import HiddenStateModel

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a rectangle, one entry per axis."""

_EXTRA_STATE = "_extra_state"
"""Ending of what Transformer Engine's layers store beside parameters; without fp8 there is nothing in it."""


@dataclass
class ChunkedTensor:
    """This rank's pieces of one tensor of a checkpoint, as ``torch.distributed.checkpoint`` asks for them.

    ``pieces`` maps the offsets of a piece to its sizes and to a function that returns it: the data to write, fetched
    when its turn comes, or the memory to read into. ``padded`` says that the first axis may have another length in the
    file (a vocabulary padded for another layout).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    padded: bool = False
    pieces: dict[tuple[int, ...], tuple[tuple[int, ...], Callable[[], Tensor]]] = field(default_factory=dict)

    def add(self, box: Box, tensor: Callable[[], Tensor]) -> None:
        """Add a piece; raises ``ValueError`` if this rank has it already."""
        offsets, sizes = box
        if offsets in self.pieces:
            raise ValueError(f"two parameters of this rank are the piece at {offsets}")
        self.pieces[offsets] = sizes, tensor

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, (sizes, _) in self.pieces.items()
        ]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(self.shape)),
            )
            for chunk in self.__create_chunk_list__()
        ]


Entries = dict[str, ChunkedTensor]
"""Pieces by the name of the tensor in the checkpoint."""


def piece(entries: Entries, index: MetadataIndex) -> Tensor:
    """The piece that ``torch.distributed.checkpoint`` means by ``index``."""
    assert index.offset is not None
    _, tensor = entries[index.fqn].pieces[tuple(index.offset)]
    return tensor()


@dataclass(frozen=True)
class Place:
    """A part of a parameter in a checkpoint: elements ``[start, start + prod(local_shape))`` of the flat parameter.

    They are the box of ``local_shape`` at ``offset`` in the tensor ``key`` of ``shape``; ``replica`` is
    (pipeline, tensor, data), all zero on the rank that writes it.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    start: int
    replica: tuple[int, ...]
    padded: bool


Places = dict[torch.nn.Parameter, list[Place]]


def places_of(models: Iterable[HiddenStateModel]) -> Places:
    """Where the parameters of this rank's model chunks lie."""
    found: Places = {}
    for model in models:
        for name, value in model.sharded_state_dict().items():
            if name.endswith(_EXTRA_STATE):
                continue
            if not isinstance(value, (ShardedTensor, ShardedTensorFactory)):
                raise ValueError(f"{name} is no tensor that a checkpoint can hold")
            found[value.data] = [_place(part, value.data) for part in _parts(value)]
    return found


def _parts(value: ShardedTensor | ShardedTensorFactory) -> Sequence[ShardedTensor]:
    """The tensors of the checkpoint that a parameter is cut into: gate and up rows of ``linear_fc1``, else itself."""
    if isinstance(value, ShardedTensor):
        return [value]
    built: Sequence[ShardedTensor] = value.build()
    return built


def _place(part: ShardedTensor, parameter: Tensor) -> Place:
    if not part.data.is_contiguous():
        raise ValueError(f"{part.key} is no contiguous part of its parameter")
    return Place(
        key=part.key,
        shape=tuple(part.global_shape),
        offset=tuple(part.global_offset),
        local_shape=tuple(part.local_shape),
        start=part.data.storage_offset() - parameter.storage_offset(),
        replica=part.replica_id if isinstance(part.replica_id, tuple) else (0, 0, part.replica_id),
        padded=part.allow_shape_mismatch,
    )


def add_range(
    entries: Entries,
    places: Sequence[Place],
    tensor: Callable[[], Tensor],
    dtype: torch.dtype,
    *,
    prefix: str = "",
    flat_range: tuple[int, int] | None = None,
    writer_axes: int | None = None,
) -> None:
    """Add to ``entries`` the pieces that a tensor beside (or of) a parameter is.

    ``tensor`` returns the values of elements ``[start, end)`` of the flattened parameter (all without ``flat_range``),
    contiguous. ``prefix`` stands before the parameter's name. ``writer_axes`` keeps only what this rank writes:
    it is the number of leading replica coordinates that must be zero (3, or 2 where every data-parallel rank has a
    range of its own).
    """
    begin, end = flat_range or (0, sum(prod(place.local_shape) for place in places))
    for place in places:
        if writer_axes is not None and not is_main_replica(place.replica[:writer_axes]):
            continue
        first, last = max(begin, place.start), min(end, place.start + prod(place.local_shape))
        if first >= last:
            continue
        entry = entries.setdefault(prefix + place.key, ChunkedTensor(place.shape, dtype, place.padded))
        position = first - begin
        for offsets, sizes in rectangles(place.local_shape, first - place.start, last - place.start):
            entry.add(_global_box(place, offsets, sizes), _view(tensor, position, _stacked(place, sizes)))
            position += prod(sizes)


def _stacked(place: Place, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (len(place.shape) - len(sizes)) + sizes


def _global_box(place: Place, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    """A box of the local tensor in the whole one, whose first axes (layers, experts) the local one lacks."""
    stacked = len(place.shape) - len(sizes)
    within = (0,) * stacked + offsets
    return tuple(start + more for start, more in zip(place.offset, within, strict=True)), _stacked(place, sizes)


def _view(tensor: Callable[[], Tensor], start: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: tensor().detach().view(-1)[start : start + prod(shape)].view(shape)


def rectangles(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Elements ``[start, end)`` of a row-major tensor of ``shape`` as boxes, in their order: at most ``2 dims - 1``.

    A range of a matrix is the rest of a row, whole rows, and the beginning of a row.
    """
    if start >= end:
        return
    if len(shape) < 2:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    whole = -(-start // row), end // row
    if start // row == (end - 1) // row and end - start < row:
        yield from _in_row(shape, start // row, start % row, (end - 1) % row + 1)
        return
    if start % row:
        yield from _in_row(shape, start // row, start % row, row)
    if whole[0] < whole[1]:
        yield (whole[0], *[0] * (len(shape) - 1)), (whole[1] - whole[0], *shape[1:])
    if end % row:
        yield from _in_row(shape, end // row, 0, end % row)


def _in_row(shape: Sequence[int], number: int, start: int, end: int) -> Iterator[Box]:
    for offsets, sizes in rectangles(shape[1:], start, end):
        yield (number, *offsets), (1, *sizes)


def model_entries(models: Iterable[HiddenStateModel], *, to_write: bool) -> Entries:
    """The weights of this rank's model chunks: all, to read into them, or those that this rank writes."""
    entries: Entries = {}
    for parameter, places in places_of(models).items():
        add_range(entries, places, _itself(parameter), parameter.dtype, writer_axes=3 if to_write else None)
    return entries


def _itself(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
