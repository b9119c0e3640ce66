"""Ranges of flattened tensors as rectangles, and pieces of any cut read into pieces of any other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ParallelOptions
from opd_megatron.megatron import distributed
from opd_megatron.megatron.chunks import Entries, Place, add_range, rectangles
from opd_megatron.megatron.safe_checkpoint import StepReader, write_step


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2, 3)])
def test_every_range_is_covered_once_and_in_order(shape: tuple[int, ...]) -> None:
    numbers = np.arange(prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for end in range(start, numbers.size + 1):
            boxes = list(rectangles(shape, start, end))
            parts = [
                numbers[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))].ravel()
                for offsets, sizes in boxes
            ]
            found = np.concatenate(parts) if parts else np.zeros(0)
            np.testing.assert_array_equal(found, np.arange(start, end))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


LAYERS, ROWS, COLUMNS = 3, 6, 5


def places(layer: int, halves: bool) -> list[Place]:
    """A parameter of one layer of a stack: whole, or two halves that lie apart, as gate and up rows do on two ranks."""
    shape = (LAYERS, 2 * ROWS, COLUMNS)
    if not halves:
        return [Place("stack", shape, (layer, 0, 0), shape[1:], 0, (0, 0, 0), False)]
    return [
        Place("stack", shape, (layer, row, 0), (ROWS // 2, COLUMNS), start, (0, 0, 0), False)
        for row, start in ((ROWS // 2, 0), (ROWS + ROWS // 2, ROWS // 2 * COLUMNS))
    ]


def cut(layer: int, flat: Tensor, bounds: Sequence[int], *, halves: bool) -> Entries:
    """The pieces of a flat parameter, cut into ranges as data-parallel ranks would."""
    entries: Entries = {}
    for start, end in pairwise(bounds):
        add_range(
            entries,
            places(layer, halves),
            lambda start=start, end=end: flat[start:end],  # type: ignore[misc]
            flat.dtype,
            flat_range=(start, end),
        )
    return entries


def test_pieces_of_one_cut_are_read_into_those_of_another(tmp_path: Path) -> None:
    distributed.initialize(distributed.Rendezvous(), ParallelOptions(), seed=0)
    numel = 2 * ROWS * COLUMNS
    stack = torch.randn(LAYERS, 2 * ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    whole: Entries = {}
    for layer in range(LAYERS):
        part = cut(layer, stack[layer].reshape(-1), (0, 7, 8, 33, 34, 41, numel), halves=False)
        whole.setdefault("stack", part["stack"]).pieces.update(part["stack"].pieces)
    write_step(tmp_path, whole, {})
    for layer in range(LAYERS):
        found = torch.zeros(numel)
        StepReader(tmp_path).read(cut(layer, found, (0, 1, 20, 59, numel), halves=False))
        assert torch.equal(found.view(2 * ROWS, COLUMNS), stack[layer])
        mine = torch.zeros(numel // 2)
        StepReader(tmp_path).read(cut(layer, mine, (0, 4, 17, 21, numel // 2), halves=True))
        half = ROWS // 2
        expected = torch.cat([stack[layer, half : 2 * half], stack[layer, ROWS + half :]])
        assert torch.equal(mine.view(-1, COLUMNS), expected)


def test_a_piece_that_two_parameters_claim_is_a_fault() -> None:
    entries = cut(0, torch.zeros(2 * ROWS * COLUMNS), (0, 60), halves=False)
    with pytest.raises(ValueError, match="two parameters of this rank"):
        add_range(entries, places(0, False), lambda: torch.zeros(60), torch.float32)
