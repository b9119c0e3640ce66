"""Conversion between Hugging Face and torch_dist folders, tensor by tensor: neither direction holds a model.

The model is built without memory, to say where its parameters lie in a checkpoint. Towards torch_dist every rank of a
layout makes its own parts of a tensor when their turn to be written comes; towards Hugging Face one process reads one
parameter of the whole model after the other. What is in memory at a time are a few copies of the largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from opd_megatron.megatron.checkpoint import check_weights, read_entries
from opd_megatron.megatron.chunks import Entries, Place, add_range, model_entries, places_of
from opd_megatron.megatron.hf_weights import HFWeights, local_parameters, model_maps, shard_place
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.safe_checkpoint import StepReader
from opd_megatron.megatron.weight_map import ParameterMap


def entries_from_hf(model: HiddenStateModel, source: Path, dtype: torch.dtype) -> Entries:
    """What this rank writes of ``model``, which needs no memory; values come from a Hugging Face folder when asked for.

    Raises ``UserError`` if the folder holds another model's weights.
    """
    weights = HFWeights(source)
    weights.check(model.architecture)
    rows = {row.megatron_name: row for row in model_maps(model)}
    places = places_of([model])
    entries: Entries = {}
    for name, parameter in local_parameters(model).items():
        if name in rows:  # the output weight of a tied model is a copy of its embedding, which another rank writes
            add_range(entries, places[parameter], _shard_of(rows[name], weights, dtype), dtype, writer_axes=3)
    return entries


def _shard_of(row: ParameterMap, weights: HFWeights, dtype: torch.dtype) -> Callable[[], Tensor]:
    rank, size = shard_place(row)

    def read() -> Tensor:
        full = row.layout.merge([weights.tensor(name) for name in row.hf_names])
        part = row.layout.shard(full, rank, size) if size > 1 else full
        return part.to(dtype).contiguous()

    return read


def stream_to_hf(model: HiddenStateModel, source: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of a step folder as Hugging Face tensors; ``model`` is the whole one and needs no memory.

    Raises ``UserError`` if the folder holds another model's weights, or is damaged.
    """
    reader = StepReader(source)
    check_weights(reader, model_entries([model], to_write=False), model.architecture.vocab_size)
    places, parameters = places_of([model]), local_parameters(model)
    for row in model_maps(model):
        parameter = parameters[row.megatron_name]
        tensors = _read_row(reader, row, places[parameter], torch.empty(parameter.shape, dtype=dtype))
        yield from zip(row.hf_names, tensors, strict=True)
        del tensors  # before the next one is read


def _read_row(reader: StepReader, row: ParameterMap, places: list[Place], values: Tensor) -> list[Tensor]:
    entries: Entries = {}
    add_range(entries, places, lambda: values, values.dtype)
    read_entries(reader, entries)
    return row.layout.split(values)  # a rank that is alone has the whole parameter
