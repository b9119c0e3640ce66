"""Parts of the trainer that leave the device while they are not needed, and come back where they were.

A part is a set of tensors. What leaves is the memory behind them: each storage is copied to the host and resized to 0,
so that every view of it (Megatron's flat buffers, the shards of the distributed optimizer) is valid again when it is
back. The host's side is pinned memory, or files mapped into memory.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.config.options import OffloadOptions
from opd_megatron.megatron import cpu


class HostStore:
    """Room on the host: pinned memory (plain without CUDA), or files in ``folder`` that vanish with the process."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._free: dict[int, list[Tensor]] = {}

    def take(self, size: int) -> Tensor:
        """Room for ``size`` bytes, ``[size]`` uint8; raises :class:`RunError` if the folder has no space for it."""
        if self._free.get(size):
            return self._free[size].pop()
        if self._folder is None:
            return torch.empty(size, dtype=torch.uint8, pin_memory=cpu.has_cuda())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(suffix=".offload.tmp", dir=self._folder)
            try:
                # A mapping of a file without blocks would end the process at the first write to a full disk.
                os.posix_fallocate(descriptor, 0, size)
                return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except OSError as error:
            raise RunError(
                f"--offload-dir {self._folder}: no room for {size} bytes ({error.strerror}): choose another folder"
            ) from error

    def give_back(self, room: Tensor) -> None:
        """Let the room be taken again."""
        self._free.setdefault(room.numel(), []).append(room)


class Part:
    """Tensors that are on the device or on the host as a whole. ``tensors`` lists them anew at each departure.

    With ``constant`` the contents never change: they are written to the host once and stay there. With ``discarded``
    they are not kept at all, and the tensors are 0 when they come back. Storages of the parts ``but_not`` are theirs.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[Tensor]],
        store: HostStore,
        *,
        constant: bool = False,
        discarded: bool = False,
        but_not: Iterable[Part] = (),
    ) -> None:
        self._tensors, self._store = tensors, store
        self._constant, self._discarded = constant, discarded
        self._but_not = tuple(but_not)
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] | None = None
        self._written: dict[int, Tensor] = {}

    @property
    def is_away(self) -> bool:
        return self._away is not None

    def storages(self) -> dict[int, torch.UntypedStorage]:
        """The storages behind the tensors that are on the device, by identity; sizes are 0 while they are away."""
        device = cpu.device()
        # Numbers, such as a step count of Adam, are not worth the way, and may be on the host anyway.
        found = [tensor.untyped_storage() for tensor in self._tensors() if tensor.dim() and tensor.device == device]
        others = {key for part in self._but_not for key in part.storages()}
        return {storage._cdata: storage for storage in found if storage._cdata not in others}

    def leave(self) -> None:
        """Give the memory on the device back."""
        if self.is_away:
            return
        away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        for key, storage in self.storages().items():
            size = storage.nbytes()
            if size == 0:
                continue
            away.append((storage, size, None if self._discarded else self._write(key, storage)))
            storage.resize_(0)
        self._away = away
        torch.cuda.empty_cache()  # the rollout engine may be another process

    def _write(self, key: int, storage: torch.UntypedStorage) -> Tensor:
        if self._constant and key in self._written:
            return self._written[key]
        room = self._store.take(storage.nbytes())
        room.copy_(_bytes_of(storage))
        if self._constant:
            self._written[key] = room
        return room

    def come_back(self) -> None:
        """Be on the device again, at other addresses."""
        for storage, size, room in self._away or ():
            storage.resize_(size)
            if room is None:
                _bytes_of(storage).zero_()
                continue
            _bytes_of(storage).copy_(room)
            if not self._constant:
                self._store.give_back(room)
        self._away = None


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """``[bytes]`` uint8 view of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class DeviceMemory:
    """The parts that may leave, by name. Names that are not among them are always on the device."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def add(self, name: str, part: Part) -> None:
        """Let a part that is on the device leave from here on; it goes at once."""
        self._parts[name] = part
        part.leave()

    @contextlib.contextmanager
    def holding(self, *names: str) -> Iterator[None]:
        """Have the named parts on the device; those that were away leave again afterwards."""
        brought = [part for name, part in self._parts.items() if name in names and part.is_away]
        for part in brought:
            part.come_back()
        try:
            yield
        finally:
            for part in brought:
                part.leave()


def weights_of(models: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for model in models:
        yield from (parameter.data for parameter in model.parameters())
        yield from model.buffers()


def gradients_of(models: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Where Megatron's data-parallel wrapper adds up the gradients: views of its flat buffers."""
    for model in models:
        yield from (parameter.main_grad for parameter in model.parameters() if hasattr(parameter, "main_grad"))


def tensors_of(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """The weights that an optimizer steps (the model's, or its own float32 copies) and their state."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                yield weight.data
                yield from (value for value in part.optimizer.state.get(weight, {}).values() if torch.is_tensor(value))


def let_leave(
    memory: DeviceMemory,
    store: HostStore,
    offload: OffloadOptions,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    prefix: str = "",
) -> None:
    """Tell ``memory`` which parts of a model in training may leave, as the ``--offload-*`` options want it.

    They are ``gradients``, ``optimizer`` and ``weights`` with ``prefix`` before them.
    """
    weights = Part(partial(weights_of, models), store)
    gradients = Part(partial(gradients_of, models), store, discarded=True)
    state = Part(partial(tensors_of, optimizer), store, but_not=(weights, gradients))
    if offload.offload_train:
        memory.add(f"{prefix}gradients", gradients)
    if offload.offload_train or offload.offload_optimizer:
        memory.add(f"{prefix}optimizer", state)
    if offload.offload_train:
        memory.add(f"{prefix}weights", weights)
