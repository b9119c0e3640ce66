"""The files of one torch_dist step folder: written by every rank at once, read without unpickling arbitrary objects.

The format is Megatron's: ``__<rank>_<n>.distcp`` and ``.metadata`` of ``torch.distributed.checkpoint``, ``common.pt``
for what is not sharded, ``metadata.json``. Megatron's own strategies start helper processes to write, read the metadata
with a plain ``pickle.load`` and objects with ``weights_only=False``; none of that happens here. Pieces are fetched one
at a time when they are written, and read into their place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from opd_megatron.config.checkpoint_paths import alternatives
from opd_megatron.config.errors import UserError
from opd_megatron.megatron.chunks import ChunkedTensor, Entries, piece

COMMON = "common.pt"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED_NAMES = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


_DAMAGE = (
    AttributeError,
    EOFError,
    KeyError,
    IndexError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
)
"""What pickles and archives with other bytes than were written raise."""


class UnsafeCheckpointError(UserError):
    """A checkpoint file asks for objects that no checkpoint of ours contains."""


def damaged(folder: Path, file: str, error: BaseException) -> UserError:
    """The error that names a file that cannot be read, and the checkpoints that stand beside it."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(f"{folder / file} is damaged ({reason}){alternatives(folder)}")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A dotted name would reach through a class or module to anything, so only whole names are compared.
        allowed = (module, name) in _ALLOWED_NAMES
        if not allowed and module == "torch":
            allowed = isinstance(getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format))
        if not allowed:
            raise UnsafeCheckpointError(f"checkpoint metadata asks for {module}.{name}; refusing to load it")
        return super().find_class(module, name)


class _SavePlanner(DefaultSavePlanner):
    """Fetches a piece when its turn to be written comes. Each piece is given to one rank only, so none is looked for
    twice."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return piece(self.state_dict, index)


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into the memory of the pieces."""

    def __init__(self, entries: Entries) -> None:
        super().__init__()
        self._entries = entries

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return piece(self._entries, index)


def _beside(stored: TensorStorageMetadata, entry: ChunkedTensor) -> TensorStorageMetadata:
    """Only those stored pieces that share rows of the first axis (a layer, mostly) with the wanted ones.

    The search for common parts takes each stored with each wanted piece.
    """
    first = min(offsets[0] for offsets in entry.pieces)
    last = max(offsets[0] + sizes[0] for offsets, (sizes, _) in entry.pieces.items())
    chunks = [chunk for chunk in stored.chunks if chunk.offsets[0] < last and first < chunk.offsets[0] + chunk.sizes[0]]
    return dataclasses.replace(stored, chunks=chunks)


class StepReader(dcp.FileSystemReader):
    """Reader of one step folder whose metadata may hold nothing but the metadata classes of torch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata: dcp.Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """What the folder says about its tensors; raises :class:`UnsafeCheckpointError` or another ``UserError``."""
        if self._metadata is None:
            try:
                with (self.folder / ".metadata").open("rb") as stream:
                    metadata = _MetadataUnpickler(stream).load()
                if not isinstance(metadata, dcp.Metadata):
                    raise TypeError("it holds something else")
            except UnsafeCheckpointError:
                raise
            except _DAMAGE as error:
                raise damaged(self.folder, ".metadata", error) from error
            self._metadata = metadata
        return self._metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape, data type and pieces of every tensor in the folder."""
        entries = self.read_metadata().state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def read(self, entries: Entries) -> None:
        """Read the pieces of ``entries`` into their place, on this rank alone.

        Where a tensor is longer than the one in the folder, what the folder lacks is left as it is.
        """
        stored = self.tensors()
        self.set_up_storage_reader(self.read_metadata(), is_coordinator=True)
        items: list[ReadItem] = []
        for name, entry in entries.items():
            beside = _beside(stored[name], entry)
            items += create_read_items_for_chunk_list(name, beside, entry.__create_chunk_list__())
        try:
            self.read_data(LoadPlan(items), _LoadPlanner(entries)).wait()
        except _DAMAGE as error:
            raise damaged(self.folder, "*.distcp", error) from error


def write_step(folder: Path, entries: Entries, common: Mapping[str, Any]) -> None:
    """Write this rank's pieces and sync them to disk; all ranks call it, and the first writes ``common`` as well."""
    if dist.get_rank() == 0:
        with (folder / COMMON).open("wb") as stream:
            torch.save(dict(common), stream)
            stream.flush()
            os.fsync(stream.fileno())
        (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    dcp.save(dict(entries), storage_writer=writer, planner=_SavePlanner())


def read_common(folder: Path) -> dict[str, Any]:
    """What is not sharded: run state, schedule, random state.

    Raises ``UserError`` if it is damaged, or more than plain data and tensors.
    """
    try:
        common: dict[str, Any] = torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise damaged(folder, COMMON, error) from error
    return common
