"""Weights between a Hugging Face folder, a parallel Megatron model, and a stream of full tensors.

Nothing here holds a model twice: loading reads one parameter at a time, and exporting yields one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.errors import UserError
from opd_megatron.megatron.model import HiddenStateModel, Models, chunks_of
from opd_megatron.megatron.safetensors_writer import DTYPES, SafetensorsWriter
from opd_megatron.megatron.weight_map import ParameterMap, global_name, parameter_maps

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"
"""Old Llama checkpoints store these frequencies, which follow from the config."""
_SHOWN_FAULTS = 3


class HFWeights:
    """Lazy reader of the safetensors files of a Hugging Face folder; raises ``UserError`` on what is missing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX_NAME
        if index.exists():
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (self.folder / SINGLE_NAME).exists():
            with safe_open(self.folder / SINGLE_NAME, framework="pt") as reader:
                files = dict.fromkeys(reader.keys(), SINGLE_NAME)
        else:
            raise UserError(f"{folder} holds no safetensors weights ({SINGLE_NAME} or {INDEX_NAME})")
        self.files = files

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``."""
        with safe_open(self.folder / self.files[name], framework="pt") as reader:
            tensor: Tensor = reader.get_tensor(name)
        return tensor

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Data type, as safetensors names it, and shape of each weight; only the heads of the files are read."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in sorted(set(self.files.values())):
            with safe_open(self.folder / file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118  the reader is no mapping
                    part = reader.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        return {name: header for name, header in found.items() if not name.endswith(_COMPUTED)}

    def check(self, architecture: ModelArchitecture) -> None:
        """Raise ``UserError`` unless the folder holds the weights of ``architecture`` and nothing else.

        Every rank finds the same faults, although each reads only its own part of the model afterwards.
        """
        headers = self.headers()
        rows = parameter_maps(architecture, architecture.vocab_size)
        expected = {name: shape for row in rows for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)}
        faults = [f"weight {name} is missing" for name in expected if name not in headers]
        faults += [
            f"weight {name} has shape {headers[name][1]}, the config says {shape}"
            for name, shape in expected.items()
            if name in headers and headers[name][1] != shape
        ]
        unknown = [name for name in headers if name not in expected]
        if not faults and unknown == [_HEAD] and torch.equal(self.tensor(_HEAD), self.tensor(_EMBEDDING)):
            return  # some checkpoints with tied weights store them under both names
        faults += [f"weight {name} has no place in the model of the config" for name in unknown]
        if faults:
            more = f" and {len(faults) - _SHOWN_FAULTS} more such faults" if len(faults) > _SHOWN_FAULTS else ""
            raise UserError(f"{self.folder}: {', '.join(faults[:_SHOWN_FAULTS])}{more}")


def hf_weights_dtype(folder: str | Path) -> torch.dtype:
    """Data type of the weights in a Hugging Face folder, whatever its config says: the smallest that holds them all."""
    names = {dtype for dtype, _ in HFWeights(folder).headers().values()}
    unsupported = sorted(names - set(DTYPES))
    if unsupported or not names:
        raise UserError(
            f"{folder}: weights of the type {', '.join(unsupported) or 'nothing'} are not supported: take a checkpoint "
            f"in {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES.values())}"
        )
    return reduce(torch.promote_types, [DTYPES[name] for name in sorted(names)])


def model_maps(models: Models) -> list[ParameterMap]:
    """The table of the whole model that ``models`` are a part of."""
    chunk = chunks_of(models)[0]
    return parameter_maps(chunk.architecture, chunk.vocab_size)


def local_parameters(models: Models) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global Megatron name."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks_of(models):
        config = chunk.config
        layers = get_transformer_layer_offset(config, chunk.vp_stage, stage)
        experts = (config.num_moe_experts or 0) // config.expert_model_parallel_size
        experts *= parallel_state.get_expert_model_parallel_rank()
        found |= {global_name(name, layers, experts): parameter for name, parameter in chunk.named_parameters()}
    return found


def shard_place(row: ParameterMap) -> tuple[int, int]:
    """This rank's shard of a parameter that it holds, and the number of shards."""
    if row.is_expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


@torch.no_grad()
def _fill(models: Models, source: HFWeights | None, seed: int) -> None:
    remaining = local_parameters(models)
    model = chunks_of(models)[0]
    tied = not model.architecture.untie_embeddings_and_output_weights
    for row in model_maps(models):
        targets = [remaining.pop(row.megatron_name, None)]
        if tied and row.megatron_name == "embedding.word_embeddings.weight":
            # With tied weights the last pipeline stage holds a copy of the embedding as its output weight.
            targets.append(remaining.pop("output_layer.weight", None))
        if not any(target is not None for target in targets):
            continue
        if source is None:
            tensors = row.random(model.architecture, seed, model.config.params_dtype)
        else:
            tensors = [source.tensor(name) for name in row.hf_names]
        shard = row.layout.shard(row.layout.merge(tensors), *shard_place(row))
        for target in targets:
            if target is not None:
                if target.shape != shard.shape:
                    raise ValueError(f"{row.megatron_name}: {tuple(target.shape)} in the model, {tuple(shard.shape)}")
                target.copy_(shard)
    if remaining:
        raise ValueError(f"the weight table does not know {', '.join(sorted(remaining))}")


def load_hf_weights(models: Models, folder: str | Path) -> None:
    """Fill this rank's parameters from a Hugging Face folder; raises ``UserError`` if it holds another model's."""
    source = HFWeights(folder)
    source.check(chunks_of(models)[0].architecture)
    _fill(models, source, seed=0)


def initialize_weights(models: Models, seed: int) -> None:
    """Fill this rank's parameters with seeded random weights that do not depend on the layout."""
    _fill(models, None, seed)


@dataclass(frozen=True)
class _Shard:
    """Where one shard of a parameter is, on the first rank that has it."""

    rank: int
    shape: tuple[int, ...]


def _shards(models: Models, parameters: dict[str, torch.nn.Parameter]) -> dict[str, list[_Shard]]:
    """The shards of every global parameter in their order, on every rank."""
    mine = {
        row.megatron_name: (shard_place(row), tuple(parameters[row.megatron_name].shape))
        for row in model_maps(models)
        if row.megatron_name in parameters
    }
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[str, dict[int, _Shard]] = {}
    for rank, theirs in enumerate(everyone):
        for name, ((place, _), shape) in theirs.items():
            found.setdefault(name, {}).setdefault(place, _Shard(rank, shape))
    return {name: [shards[place] for place in sorted(shards)] for name, shards in found.items()}


@torch.no_grad()
def export_hf_weights(models: Models) -> Iterator[tuple[str, Tensor]]:
    """Stream ``(Hugging Face name, full tensor on the CPU)`` on global rank 0; other ranks get nothing.

    All ranks must iterate to the end. Tensors are clones, in the model's dtype.
    """
    parameters, rank = local_parameters(models), dist.get_rank()
    shards = _shards(models, parameters)
    for row in model_maps(models):
        places = shards[row.megatron_name]
        if rank == 0:
            parts = [_receive(shard, parameters.get(row.megatron_name), chunks_of(models)[0]) for shard in places]
            full = row.layout.unshard(parts)
            for name, part in zip(row.hf_names, row.layout.split(full), strict=True):
                yield name, part.to("cpu", copy=True)
        elif any(shard.rank == rank for shard in places):
            dist.send(parameters[row.megatron_name].detach().contiguous(), 0)


def _receive(shard: _Shard, own: Tensor | None, model: HiddenStateModel) -> Tensor:
    """A shard on the first rank: its own, or sent by the rank that has it."""
    if shard.rank == 0:
        assert own is not None  # the list of shards says so
        return own.detach()
    part = torch.empty(shard.shape, dtype=model.config.params_dtype, device=next(model.parameters()).device)
    dist.recv(part, shard.rank)
    return part


def write_hf_weights(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = 4 * 2**30
) -> torch.dtype:
    """Write a stream of tensors as safetensors files of at most about ``shard_bytes`` with an index.

    No more than one tensor of the stream is held. Returns the smallest data type that holds them all; raises
    ``ValueError`` if there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    writer: SafetensorsWriter | None = None
    dtype: torch.dtype | None = None
    total = 0
    for name, tensor in tensors:
        if writer is not None and (writer.data_bytes + tensor.nbytes > shard_bytes or not writer.has_room(name)):
            shards.append(writer.close())
            writer = None
        if writer is None:
            writer = SafetensorsWriter(folder / f"part-{len(shards):05d}.safetensors")
        writer.add(name, tensor)
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
        total += tensor.nbytes
        del tensor  # before the stream makes the next one
    if writer is None or dtype is None:
        raise ValueError("there are no weights to write")
    shards.append(writer.close())
    if len(shards) == 1:
        (folder / "part-00000.safetensors").replace(folder / SINGLE_NAME)
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number:05d}.safetensors").replace(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dtype
