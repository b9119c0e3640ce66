"""Which samples a rank works on, and in which micro-batches: pure arithmetic, the same on every rank.

All data-parallel ranks get the same number of micro-batches, because they meet in collectives of every one of them
(experts, overlapped reductions, pipelines); where a rank has fewer, empty ones fill up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_megatron.config.architecture import ModelArchitecture

MicroBatches = list[tuple[int, ...]]


@dataclass(frozen=True)
class BatchingRule:
    """Micro-batches of ``micro_batch_size`` samples, or, with ``max_tokens``, of as many as fit.

    ``max_tokens`` counts the tokens of one rank; ``length`` is what a sample of so many tokens takes of it (context
    parallelism shares a sequence). The number of micro-batches is a multiple of ``count_multiple`` (virtual pipelines).
    """

    micro_batch_size: int = 1
    max_tokens: int | None = None
    length: Callable[[int], int] = int
    count_multiple: int = 1


def sequence_cost(architecture: ModelArchitecture) -> Callable[[int], float]:
    """Multiplications of a layer for a sequence of so many tokens: linear ones, and attention's, which grow squared."""
    heads = architecture.num_attention_heads * architecture.kv_channels
    groups = architecture.num_query_groups * architecture.kv_channels
    linear = architecture.hidden_size * (2 * heads + 2 * groups + 3 * architecture.ffn_hidden_size)
    return lambda length: length * linear + length * length * heads


def balanced_shares(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Split places over ranks so that the dearest rank is cheap: each, dearest first, to the rank that has least.

    The dearest rank has at most 4/3 - 1/(3 ranks) of the least possible cost (Graham 1969).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        rank = min(range(ranks), key=lambda rank: (totals[rank], rank))
        shares[rank].append(place)
        totals[rank] += costs[place]
    return shares


def fill_by_tokens(places: Sequence[int], lengths: Sequence[int], max_tokens: int) -> MicroBatches:
    """Pack places, whose samples take ``lengths[place]`` tokens, into few micro-batches of at most ``max_tokens``.

    Longest first, each into the first that has room. A sample that is longer than ``max_tokens`` is alone in its own.
    """
    filled: list[list[int]] = []
    room: list[int] = []
    for place in sorted(places, key=lambda place: -lengths[place]):
        length = lengths[place]
        for number, left in enumerate(room):
            if length <= left:
                filled[number].append(place)
                room[number] -= length
                break
        else:
            filled.append([place])
            room.append(max_tokens - length)
    return [tuple(part) for part in filled]


def plan(lengths: Sequence[int], rule: BatchingRule, *, ranks: int, cost: Callable[[int], float]) -> list[MicroBatches]:
    """Micro-batches of each data-parallel rank for samples of ``lengths`` tokens; together they hold each place once.

    With a fixed size every rank gets the same number of samples (give or take one), dealt out by length; with
    ``max_tokens`` the ranks get samples of the same ``cost``.
    """
    if rule.max_tokens is None:
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        size = rule.micro_batch_size
        shares = [order[rank::ranks] for rank in range(ranks)]
        batches = [[tuple(share[start : start + size]) for start in range(0, len(share), size)] for share in shares]
    else:
        taken = [rule.length(length) for length in lengths]
        shares = balanced_shares([cost(length) for length in lengths], ranks)
        batches = [fill_by_tokens(share, taken, rule.max_tokens) for share in shares]
    most = max(map(len, batches))
    most = -(-most // rule.count_multiple) * rule.count_multiple
    return [part + [()] * (most - len(part)) for part in batches]


def plan_steps(
    lengths: Sequence[int], step_size: int, rule: BatchingRule, *, ranks: int, cost: Callable[[int], float]
) -> list[list[MicroBatches]]:
    """:func:`plan` for each optimizer step, that is for consecutive ``step_size`` samples; places are of the whole."""
    steps = []
    for start in range(0, len(lengths), step_size):
        shares = plan(lengths[start : start + step_size], rule, ranks=ranks, cost=cost)
        steps.append([[tuple(start + place for place in places) for places in share] for share in shares])
    return steps
