"""torch_dist strategies that write without helper processes and never unpickle arbitrary objects.

Megatron's own save strategy starts a server process and forks writers, which is slow for small models and unsafe in a
threaded process; its load strategy reads the metadata with a plain ``pickle.load`` and objects with
``weights_only=False``. The file format is the same.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.strategies import torch as strategies
from torch.distributed.checkpoint._traverse import set_element

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


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint file asks for objects that no checkpoint of ours contains."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A dotted name would reach through a class or module to anything, so only whole names are compared.
        allowed = (module, name) in _ALLOWED_NAMES
        if not allowed and module == "torch":
            allowed = isinstance(getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format))
        if not allowed:
            raise UnsafeCheckpointError(f"checkpoint metadata asks for {module}.{name}; refusing to load it")
        return super().find_class(module, name)


class _SafeReader(dcp.FileSystemReader):
    """File reader whose metadata may hold nothing but the metadata classes of torch."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        if not hasattr(self, "_metadata"):
            with (Path(self.path) / ".metadata").open("rb") as stream:
                self._metadata = _MetadataUnpickler(stream).load()
        metadata: dcp.Metadata = self._metadata
        return metadata


def read_metadata(folder: Path) -> dcp.Metadata:
    """What a step folder says about its tensors; raises :class:`UnsafeCheckpointError`."""
    return _SafeReader(folder).read_metadata()


class _SafePlanner(strategies.MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        loaded = torch.load(value, weights_only=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


@contextlib.contextmanager
def _safe_parts() -> Iterator[None]:
    """Hand Megatron's load strategy our reader and planner while it runs."""
    module: Any = strategies
    saved = module.MCoreLoadPlanner, module._get_filesystem_reader
    module.MCoreLoadPlanner = _SafePlanner
    module._get_filesystem_reader = lambda folder, cache_metadata=False: _SafeReader(folder)
    try:
        yield
    finally:
        module.MCoreLoadPlanner, module._get_filesystem_reader = saved


class SafeLoad(strategies.TorchDistLoadShardedStrategy):
    """Megatron's load strategy with restricted unpickling; raises :class:`UnsafeCheckpointError`."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        # The load itself would wrap what the reader raises in an error about missing metadata.
        read_metadata(Path(checkpoint_dir))
        with _safe_parts():
            return super().load(sharded_state_dict, checkpoint_dir)

    def load_tensors_metadata(self, checkpoint_dir: Path, metadata: Any = None) -> Any:
        with _safe_parts():
            return super().load_tensors_metadata(checkpoint_dir, metadata)

    def load_sharded_metadata(self, checkpoint_dir: Path) -> Any:
        with _safe_parts():
            return super().load_sharded_metadata(checkpoint_dir)


class SynchronousSave(strategies.TorchDistSaveShardedStrategy):
    """Write this rank's shards in this process and sync them to disk."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        flat, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        planner = strategies.MCoreSavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
        )
        dcp.save(
            strategies.mcore_to_pyt_state_dict(flat, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=planner,
        )
