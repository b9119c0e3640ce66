"""Tensors brought to the ranks that want them from whichever ranks hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.megatron import cpu

Key = tuple[int, int]


def exchange(held: Mapping[Key, Tensor], wanted: Sequence[Key]) -> dict[Key, Tensor]:
    """The ``wanted`` tensors by key, on the host. All ranks call it, each with what it holds and wants.

    The tensors have one dtype and one shape but for their first dimension, on all ranks. A key that several ranks hold
    comes from the rank itself if it can, else from the first of them. Raises ``ValueError`` for a key nobody holds.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    example = next(iter(held.values()), None)
    kind = None if example is None else (tuple(example.shape[1:]), example.dtype)
    listing: list[Any] = [None] * world_size
    dist.all_gather_object(listing, ({key: len(tensor) for key, tensor in held.items()}, list(wanted), kind))
    first_holder: dict[Key, int] = {}
    for holder, (keys, _, _) in enumerate(listing):
        for key in keys:
            first_holder.setdefault(key, holder)

    missing = [key for _, keys, _ in listing for key in keys if key not in first_holder]
    if missing:
        raise ValueError(f"no rank holds {missing[0]!r}")
    kinds = {kind for _, _, kind in listing if kind is not None}
    if len(kinds) > 1:
        raise ValueError(f"the ranks hold tensors of {len(kinds)} kinds")
    if not kinds:
        return {}
    ((shape, dtype),) = kinds
    plans = [
        {key: other if key in own else first_holder[key] for key in keys}
        for other, (own, keys, _) in enumerate(listing)
    ]
    sent = [
        [held[key] for key, giver in plan.items() if giver == rank and other != rank]
        for other, plan in enumerate(plans)
    ]
    empty = torch.empty((0, *shape), dtype=dtype)
    outgoing = [_as_bytes(torch.cat([empty, *(tensor.cpu() for tensor in part)])) for part in sent]
    arriving = [[key for key, giver in plans[rank].items() if giver == other != rank] for other in range(world_size)]
    rows = [[listing[other][0][key] for key in keys] for other, keys in enumerate(arriving)]
    row_bytes = empty.new_empty((1, *shape)).numel() * empty.element_size()
    counts = [sum(part) * row_bytes for part in rows]
    received = torch.empty(sum(counts), dtype=torch.uint8, device=cpu.device())
    dist.all_to_all_single(
        received,
        torch.cat(outgoing).to(cpu.device()),
        output_split_sizes=counts,
        input_split_sizes=[len(part) for part in outgoing],
    )
    found = {key: held[key].cpu() for key, giver in plans[rank].items() if giver == rank}
    for keys, lengths, part in zip(arriving, rows, received.cpu().split(counts), strict=True):
        tensors = part.clone().view(dtype).view(sum(lengths), *shape).split(lengths)
        found |= dict(zip(keys, tensors, strict=True))
    return found


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
