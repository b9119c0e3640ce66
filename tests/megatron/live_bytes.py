"""What tensors take: those alive at once during a piece of work, and those that autograd keeps for backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from opd_megatron.megatron.trainer import MegatronTrainer


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages that operators make while it is active, until they are freed.

    ``peak`` is the most that lived at once. Memory that an operator takes and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass
class SavedBytes:
    """Storages that autograd keeps, each counted once."""

    sizes: dict[int, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@contextmanager
def saved_for_backward(without: set[int]) -> Iterator[SavedBytes]:
    """Bytes that the forward passes inside keep, apart from the storages ``without`` (the weights)."""
    found = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in without:
            found.sizes[key] = tensor.untyped_storage().nbytes()
            found.held.append(tensor)  # or its address could be given out again
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield found


def _bytes(tensors: Iterator[Tensor]) -> int:
    """Of all storages, each counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _optimizer_tensors(trainer: MegatronTrainer, weights: set[int]) -> Iterator[Tensor]:
    """Moments, and the main weights and gradients that are no views of the model's or of the gradient buffers."""
    buffers = {buffer.grad_data.untyped_storage().data_ptr() for buffer in _buffers(trainer)}
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                held = [weight, *([] if weight.grad is None else [weight.grad])]
                state = [value for value in part.optimizer.state[weight].values() if torch.is_tensor(value)]
                for tensor in [*held, *state]:
                    if tensor.untyped_storage().data_ptr() not in weights | buffers:
                        yield tensor


def _buffers(trainer: MegatronTrainer) -> list[Any]:
    return [*trainer.wrapped.buffers, *trainer.wrapped.expert_parallel_buffers]


def held_bytes(trainer: MegatronTrainer) -> dict[str, int]:
    """What this rank holds after an optimizer step, by the names of an estimate."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.student.parameters()}
    return {
        "weights": _bytes(iter(trainer.student.parameters())),
        "gradients": _bytes(buffer.grad_data for buffer in _buffers(trainer)),
        "optimizer": _bytes(_optimizer_tensors(trainer, weights)),
        "teacher": sum(_bytes(model.parameters()) for name, model in trainer.frozen.items() if name == "teacher"),
        "reference": sum(_bytes(model.parameters()) for name, model in trainer.frozen.items() if name == "reference"),
    }
