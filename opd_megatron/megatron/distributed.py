"""Process groups: how a rank joins the run, and where it stands in it."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config.options import ParallelOptions
from opd_megatron.megatron import cpu


@dataclass(frozen=True)
class Rendezvous:
    """Place of one rank and where the ranks meet.

    World size 1 needs no network; without a ``port`` the ranks meet where ``torchrun``'s variables say.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int | None = None

    @classmethod
    def from_torchrun(cls) -> Rendezvous:
        """Read the variables that ``torchrun`` sets; without them, a single process."""
        if "RANK" not in os.environ:
            return cls()
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )


def initialize(rendezvous: Rendezvous, parallel: ParallelOptions, *, seed: int) -> None:
    """Join the process group, once, build Megatron's groups for the layout of ``parallel``, and seed this rank.

    May be repeated: groups of another layout are replaced, those of the same layout stay.
    """
    cpu.install()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if cpu.has_cuda():
        torch.cuda.set_device(rendezvous.local_rank % torch.cuda.device_count())
    if not dist.is_initialized():
        _join(rendezvous, datetime.timedelta(minutes=parallel.distributed_timeout_minutes))
    _build_groups(parallel)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _sizes(parallel: ParallelOptions) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }


Groups = dict[str, Any]
"""Megatron's process groups of one layout: the global variables of ``parallel_state`` by name."""

_others: dict[tuple[int, ...], Groups] = {}


def _groups_in_use() -> Groups:
    from megatron.core import parallel_state

    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and (name.isupper() or name == "_global_process_group_list")
    }


def other_groups(parallel: ParallelOptions) -> Groups:
    """Groups of another layout beside those in use, for :func:`using`; all ranks call it. Each layout is built once."""
    from megatron.core import parallel_state

    sizes = _sizes(parallel)
    key = tuple(sizes.values())
    if key not in _others:
        unset: Groups = {name: {} if isinstance(value, dict) else None for name, value in _groups_in_use().items()}
        with using(unset):
            parallel_state.initialize_model_parallel(
                **sizes, distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes))
            )
            _others[key] = _groups_in_use()
    return _others[key]


@contextlib.contextmanager
def using(groups: Groups | None) -> Iterator[None]:
    """Let Megatron see these groups instead of its own; None changes nothing."""
    from megatron.core import parallel_state

    before = _groups_in_use()
    vars(parallel_state).update(groups or {})
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def _build_groups(parallel: ParallelOptions) -> None:
    from megatron.core import parallel_state

    layout = _sizes(parallel)
    if parallel_state.model_parallel_is_initialized():
        present = {
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "context_parallel_size": parallel_state.get_context_parallel_world_size(),
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        }
        if present == layout:
            return
        _destroy_groups()
    parallel_state.initialize_model_parallel(
        **layout, distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes))
    )


def _destroy_groups() -> None:
    """Forget Megatron's groups and end them: it leaves most alive, each with threads and sockets of its own."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _others.clear()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _join(rendezvous: Rendezvous, timeout: datetime.timedelta) -> None:
    backend = cpu.collective_backend()
    rank, world_size = rendezvous.rank, rendezvous.world_size
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif rendezvous.port is None:
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    else:
        store = dist.TCPStore(rendezvous.address, rendezvous.port, world_size, rank == 0, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def shutdown() -> None:
    """Leave Megatron's groups and the process group; safe to repeat."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _others.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
