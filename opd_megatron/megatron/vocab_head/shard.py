"""A rank's columns of the vocabulary: their logits in chunks of tokens, and sums over all ranks.

Shape legend of this package: ``N`` tokens, ``C`` tokens of a chunk, ``R`` tokens of a block within a chunk, ``h``
hidden size, ``V`` columns of this rank, ``K`` listed ids of a token, ``G`` ranks of the tensor-parallel group. Each
rank holds consecutive rows of the output weight, the same number on every rank; rows at or above the vocabulary's size
are padding and take no part in any sum.

A *chunk* bounds the memory: its logits are all that exists at a time. A *block* of a chunk is what elementwise
arithmetic works on: small enough that its temporaries stay in the processor's cache and count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opd_megatron.config.vocab_chunks import BLOCK_ELEMENTS, CHUNK_ELEMENTS, LEAST_CHUNK_TOKENS, tokens_of_chunk

MASKED = -1e30
"""Logit of a column that is left out: its exponential is 0, and unlike that of ``-inf`` so is its product with it."""


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds.

    ``first`` is the first of them, ``columns`` how many are real tokens, ``rows`` the rows of the weight, the same on
    every rank of ``group`` (``None`` for a single rank).
    """

    first: int
    columns: int
    rows: int
    vocab_size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight_Vh: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of ``weight_Vh``; raises ``ValueError`` if the ranks together have fewer than ``vocab_size``."""
        rows, rank, ranks = weight_Vh.shape[0], 0, 1
        if group is not None:
            rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        if rows * ranks < vocab_size:
            raise ValueError(f"{ranks} x {rows} rows of the output weight are too few for {vocab_size} tokens")
        first = rows * rank
        return cls(first, max(0, min(rows, vocab_size - first)), rows, vocab_size, group)

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def chunks(self, tokens: int, device: torch.device) -> list[slice]:
        """Slices of the tokens, of one size but for the last, the same on every rank."""
        size = chunk_tokens(self.rows, device)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def gather(self, values: Tensor) -> Tensor:
        """``[G, ...]``: the values of every rank, in the ranks' order."""
        if self.ranks == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values, group=self.group)
        return values


def chunk_tokens(rows: int, device: torch.device) -> int:
    """Tokens of a chunk for a shard of ``rows`` columns."""
    return tokens_of_chunk(rows, CHUNK_ELEMENTS[device.type], LEAST_CHUNK_TOKENS)


def blocks(logits_CV: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Tokens of each block, counted on from ``first``, and its logits; none where this rank has no columns."""
    tokens, columns = logits_CV.shape
    size = max(1, BLOCK_ELEMENTS[logits_CV.device.type] // max(1, columns))
    for start in range(0, tokens if columns else 0, size):
        stop = min(start + size, tokens)
        yield slice(first + start, first + stop), logits_CV[start:stop]


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(hidden.dtype, torch.float32)


def scaled_logits(hidden_Ch: Tensor, weight_Vh: Tensor, temperature: float) -> Tensor:
    """``hidden @ weight^T / temperature``, ``[C, V]`` in at least float32; multiplied in the inputs' precision.

    Who calls this chunk by chunk must drop one chunk's before asking for the next.
    """
    dtype = statistics_dtype(hidden_Ch)
    if hidden_Ch.dtype == dtype:
        return (hidden_Ch / temperature) @ weight_Vh.t()
    logits_CV = (hidden_Ch @ weight_Vh.t()).to(dtype)
    return logits_CV.div_(temperature) if temperature != 1.0 else logits_CV


def mask_columns(logits_RV: Tensor, column_RK: Tensor, held_RK: Tensor) -> None:
    """Mask the listed columns that this rank holds; the others' ``column_RK`` may be any column."""
    fill_RK = torch.where(held_RK, MASKED, -MASKED).to(logits_RV.dtype)
    logits_RV.scatter_reduce_(1, column_RK, fill_RK, "amin")


def log_sum_exp(logits_RV: Tensor) -> Tensor:
    """``[R]`` logarithm of the sum over this rank's columns that are not masked; ``-inf`` where all are."""
    maximum_R = logits_RV.amax(-1)
    sum_R = (logits_RV - maximum_R[:, None]).exp_().sum(-1)
    return torch.where(maximum_R > MASKED / 2, maximum_R + sum_R.log(), -torch.inf)


def log_sum_over_ranks(parts_GN: Tensor) -> Tensor:
    """``[N]`` from every rank's logarithm of a sum; ``-inf`` where no rank has any."""
    return torch.logsumexp(parts_GN, dim=0)


class HeadGradients:
    """Gradients of hidden rows and weight, added up chunk by chunk.

    The weight's is kept in at least float32 until it is read. Each chunk's part of it is made in slices of rows;
    neither a slice nor what goes into it, which oneDNN copies, takes more than a quarter of the chunk's logits.
    """

    def __init__(self, hidden_Nh: Tensor, weight_Vh: Tensor, columns: int, needed: tuple[bool, bool]) -> None:
        self._hidden_Nh, self._weight_Vh = hidden_Nh, weight_Vh[:columns]
        self.hidden_Nh = torch.zeros_like(hidden_Nh) if needed[0] else None
        self._sum_Vh = torch.zeros_like(weight_Vh, dtype=statistics_dtype(weight_Vh)) if needed[1] else None

    def add(self, part: slice, grad_logits_CV: Tensor) -> None:
        """Take in the gradient with respect to the products ``hidden @ weight^T`` of the tokens ``part``."""
        grad_CV = grad_logits_CV.to(self._hidden_Nh.dtype)
        if self.hidden_Nh is not None:
            self.hidden_Nh[part] = grad_CV @ self._weight_Vh
        if self._sum_Vh is None:
            return
        hidden_Ch = self._hidden_Nh[part]
        columns = grad_CV.shape[1]
        size = max(1, min(columns // 4, grad_CV.numel() // (4 * hidden_Ch.shape[1])))
        for start in range(0, columns, size):
            rows = slice(start, min(start + size, columns))
            self._sum_Vh[rows] += grad_CV[:, rows].t() @ hidden_Ch

    @property
    def weight_Vh(self) -> Tensor | None:
        """The weight's gradient in its own dtype; rows of padding have 0."""
        return None if self._sum_Vh is None else self._sum_Vh.to(self._weight_Vh.dtype)
