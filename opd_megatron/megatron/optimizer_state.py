"""The optimizer's state in a checkpoint, by parameter of the whole model: it loads in every layout.

Each tensor that an optimizer keeps beside a parameter (Adam's moments, SGD's momentum, the float32 weights of a
bfloat16 model) is stored under ``optimizer.state.<what>.<parameter>`` in the shape of the whole parameter, as Megatron
stores the state of its plain optimizer. The distributed optimizer holds ranges of flattened parameters: every rank
writes and reads its own ranges, so the two kinds read each other's checkpoints and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

from opd_megatron.megatron.chunks import Entries, add_range, places_of
from opd_megatron.megatron.model import HiddenStateModel

PREFIX = "optimizer.state."
_MAIN = "fp32_param"


@dataclass(frozen=True)
class _Share:
    """What one rank's optimizer steps of one parameter: ``main`` are its elements from ``start`` on.

    ``alone`` says that other data-parallel ranks hold other elements; else they hold the same.
    """

    parameter: torch.nn.Parameter
    main: Tensor
    start: int
    alone: bool

    @property
    def is_copy(self) -> bool:
        """Whether ``main`` has memory of its own, as float32 weights beside bfloat16 ones."""
        mine: int = self.main.untyped_storage().data_ptr()
        return mine != self.parameter.untyped_storage().data_ptr()


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron chains one optimizer per kind of parameter or model chunk; a rank without parameters has empty ones."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def _shares(part: Any) -> Iterator[_Share]:
    groups = part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            start = part._get_model_param_range_map(parameter)["param"].start
            yield _Share(parameter, groups[group]["params"][order], start, alone=True)
        return
    parameters: dict[Tensor, torch.nn.Parameter] = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for models, mains in pairs:
            parameters.update(zip(mains, models, strict=True))
    for group in groups:
        for main in group["params"]:
            yield _Share(parameters.get(main, main), main, 0, alone=False)


def _allocate(inner: torch.optim.Optimizer, part: Any) -> None:
    """Give an optimizer that has not stepped yet its zero state, so that there is something to save or load."""
    if inner.state:
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if isinstance(inner, torch.optim.SGD):
                if group["momentum"]:
                    inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            elif isinstance(inner, torch.optim.AdamW):
                inner.state[parameter]["step"] = torch.tensor(0.0)
                inner.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                inner.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
    if not inner.state and part.init_state_fn is not None:
        part.init_state_fn(inner, part.config)


def optimizer_entries(optimizer: MegatronOptimizer, models: Iterable[HiddenStateModel], *, to_write: bool) -> Entries:
    """This rank's part of the optimizer's state: what it reads, or what it writes."""
    places = places_of(models)
    entries: Entries = {}
    for part in _parts(optimizer):
        _allocate(part.optimizer, part)
        for share in _shares(part):
            tensors = {
                name: value
                for name, value in part.optimizer.state[share.main].items()
                if isinstance(value, Tensor) and value.shape == share.main.shape
            }
            if share.is_copy:
                tensors[_MAIN] = share.main
            for name, value in tensors.items():
                add_range(
                    entries,
                    places[share.parameter],
                    _fetch(value),
                    value.dtype,
                    prefix=f"{PREFIX}{name}.",
                    flat_range=(share.start, share.start + share.main.numel()),
                    writer_axes=(2 if share.alone else 3) if to_write else None,
                )
    return entries


def _fetch(tensor: Tensor) -> Any:
    return lambda: tensor


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Steps that the optimizer has taken, by which Adam corrects its moments; 0 for one that does not count."""
    for part in _parts(optimizer):
        counted = [*part.optimizer.state.values(), *part.optimizer.param_groups]
        for holder in counted:
            if "step" in holder:
                return int(holder["step"])
    return 0


def set_steps_taken(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set what :func:`steps_taken` returns: torch's Adam counts per parameter, Transformer Engine's per group."""
    for part in _parts(optimizer):
        per_parameter = [state for state in part.optimizer.state.values() if "step" in state]
        for state in per_parameter:
            state["step"] = torch.full_like(state["step"], float(steps))
        if not per_parameter and not isinstance(part.optimizer, torch.optim.SGD):
            for group in part.optimizer.param_groups:
                group["step"] = steps
