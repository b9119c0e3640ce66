"""Weights on their way to an engine: Hugging Face folders, of which the newest is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from opd_megatron.rollout.sglang_server import SGLangServer

NamedTensors = Iterable[tuple[str, Tensor]]
WriteFolder = Callable[[NamedTensors, Path], None]
"""Writes a Hugging Face folder, which appears whole or not at all."""


class WeightFolders:
    """Weights that servers read from disk: folders ``weights_000001``, ... under ``root``, written by ``write``.

    The newest one stays until the next is complete: an engine that is started again loads it.
    """

    def __init__(self, root: Path, write: WriteFolder) -> None:
        self._root = root.resolve()
        self._write = write
        self._count = 0
        self.newest: Path | None = None

    def take(self, named_tensors: NamedTensors) -> None:
        """Write the next folder; what an earlier process left under its name goes."""
        self._count += 1
        folder = self._root / f"weights_{self._count:06d}"
        self._root.mkdir(parents=True, exist_ok=True)
        self._write(named_tensors, folder)
        before, self.newest = self.newest, folder
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    async def load(self, server: SGLangServer, label: str) -> None:
        """See :class:`~opd_megatron.rollout.sglang_fleet.Weights`."""
        assert self.newest is not None
        await server.load(self.newest, label)

    def remove(self) -> None:
        """Remove the newest folder, too, and the root if it is empty."""
        if self.newest is not None:
            shutil.rmtree(self.newest, ignore_errors=True)
            self.newest = None
        if self._root.is_dir() and not any(self._root.iterdir()):
            self._root.rmdir()
