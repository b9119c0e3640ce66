"""What the ranks do in the tests of the vocabulary head: this rank's columns and tokens against dense arithmetic.

Context parallelism means to the head that its ranks have different tokens and that the weight's gradient is summed over
them; data-parallel ranks stand in for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from opd_megatron.config.options import ParallelOptions
from opd_megatron.megatron import distributed
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.vocab_head import top_k
from opd_megatron.megatron.vocab_head.align import align
from opd_megatron.megatron.vocab_head.shard import VocabShard
from tests.megatron.vocab_head_cases import (
    CASES,
    TOKENS,
    Problem,
    chunks_of,
    error,
    expected,
    make_problem,
    ours,
    weighted,
)


@contextmanager
def _place(
    rendezvous: Rendezvous, problem: Problem, tensor_parallel: int, first_tokens: int
) -> Iterator[tuple[Problem, slice, Any]]:
    """This rank's part of the problem, which tokens it has, and the tensor-parallel group.

    Of two ranks that split the tokens the first has ``first_tokens``.
    """
    distributed.initialize(rendezvous, ParallelOptions(tensor_model_parallel_size=tensor_parallel), seed=0)
    group = parallel_state.get_tensor_model_parallel_group()
    tokens = slice(0, TOKENS)
    if parallel_state.get_data_parallel_world_size() == 2:
        tokens = [slice(0, first_tokens), slice(first_tokens, TOKENS)][parallel_state.get_data_parallel_rank()]
    with chunks_of(2, block_elements=5):
        yield problem.tokens(tokens).shards(dist.get_rank(group), tensor_parallel), tokens, group


def _total(gradient: Tensor, group: Any) -> Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=group)
    return gradient


def errors(
    rendezvous: Rendezvous, settings: dict[str, Any], tensor_parallel: int, first_tokens: int, dtype: torch.dtype
) -> dict[str, float]:
    """Largest relative error of every kernel's outputs and gradients on this rank."""
    whole = make_problem(**settings)
    found: dict[str, float] = {}
    with _place(rendezvous, whole.to(dtype), tensor_parallel, first_tokens) as (problem, tokens, group):
        rank = dist.get_rank(group)
        for case in CASES:
            hidden, weight = problem.hidden_Nh.clone().requires_grad_(), problem.weight_Vh.clone().requires_grad_()
            outputs = ours(problem, case, hidden, weight, group)
            grads = torch.autograd.grad(weighted(problem, outputs), (hidden, weight))
            dense_outputs, dense_hidden, dense_weight = expected(whole, case)
            found[f"{case} outputs"] = error(outputs, dense_outputs[tokens])
            found[f"{case} hidden"] = error(_total(grads[0], group), dense_hidden[tokens])
            total = _total(grads[1], parallel_state.get_data_parallel_group())
            mine = dense_weight.chunk(tensor_parallel)[rank]
            found[f"{case} weight"] = float((total.double() - mine).abs().max() / dense_weight.abs().max())
    return found


def top_k_errors(
    rendezvous: Rendezvous, settings: dict[str, Any], tensor_parallel: int, first_tokens: int, k: int
) -> dict[str, float]:
    whole = make_problem(**settings)
    logits = whole.hidden_Nh @ whole.weight_Vh[: whole.vocab_size].t() / whole.temperature
    ordered, ids = torch.log_softmax(logits, dim=-1).sort(dim=-1, descending=True)
    with _place(rendezvous, whole, tensor_parallel, first_tokens) as (problem, tokens, group):
        record = top_k(
            problem.hidden_Nh,
            problem.weight_Vh,
            k,
            temperature=problem.temperature,
            vocab_size=problem.vocab_size,
            group=group,
        )
    tail = ordered[tokens, k:].exp().sum(-1)
    return {
        "ids": float((record.ids_NK != ids[tokens, :k]).sum()),
        "log_probs": error(record.log_probs_NK, ordered[tokens, :k]),
        "tail": error(record.tail_log_mass_N.exp(), tail),
    }


def shared_embedding_errors(rendezvous: Rendezvous, tensor_parallel: int) -> dict[str, float]:
    """The weight is the embedding too, behind Megatron's mappings."""
    whole = make_problem(3)
    inputs = torch.arange(TOKENS) % whole.vocab_size
    found = {}
    with _place(rendezvous, whole, tensor_parallel, 4) as (problem, tokens, group):
        rank = dist.get_rank(group)
        rows = problem.weight_Vh.shape[0]
        local = inputs[tokens] - rank * rows
        held = (local >= 0) & (local < rows)
        for case in CASES:
            weight = problem.weight_Vh.clone().requires_grad_()
            looked_up = weight[local.clamp(0, rows - 1)] * held[:, None]
            hidden = copy_to_tensor_model_parallel_region(
                torch.tanh(reduce_from_tensor_model_parallel_region(looked_up))
            )
            (mine,) = torch.autograd.grad(weighted(problem, ours(problem, case, hidden, weight, group)), weight)
            dense_weight = whole.weight_Vh.clone().requires_grad_()
            dense_hidden = torch.tanh(dense_weight[inputs])
            _, grad_hidden, grad_weight = expected(replace(whole, hidden_Nh=dense_hidden.detach()), case)
            loss = (dense_hidden * grad_hidden).sum() + (dense_weight * grad_weight).sum()
            (reference,) = torch.autograd.grad(loss, dense_weight)
            total = _total(mine, parallel_state.get_data_parallel_group())
            difference = (total - reference.chunk(tensor_parallel)[rank]).abs().max()
            found[case] = float(difference / reference.abs().max())
    return found


def foreign_rows(rendezvous: Rendezvous, settings: dict[str, Any], tensor_parallel: int) -> tuple[int, int]:
    """Rows of the teacher's weight that this rank had to get from others, and columns that its pieces make."""
    with _place(rendezvous, make_problem(**settings), tensor_parallel, 4) as (problem, _, group):
        weight = problem.teacher_weight_Vk
        pieces = align(weight, VocabShard.of(problem.weight_Vh, problem.vocab_size, group)).pieces
        own = weight.untyped_storage().data_ptr()
        foreign = sum(piece.shape[0] for _, piece in pieces if piece.untyped_storage().data_ptr() != own)
        return foreign, sum(piece.shape[0] for _, piece in pieces)
