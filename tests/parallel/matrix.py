"""Layouts as combinations of features, and a selection of them in which every pair of features meets.

``python -m tests.parallel.matrix`` compares every combination with the single process; ``--first N`` begins at the
N-th.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Layout = dict[str, str]
"""The chosen value of each feature."""

FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "world": {str(size): {"actor_num_gpus_per_node": size} for size in (1, 2, 4)},
    "tensor": {
        "1": {},
        "2": {"tensor_model_parallel_size": 2},
        "2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    "pipeline": {
        "1": {},
        "2": {"pipeline_model_parallel_size": 2},
        "2-virtual": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    },
    "context": {"1": {}, "2": {"context_parallel_size": 2}},
    "experts": {"dense": {}, "1": {}, "2": {"expert_model_parallel_size": 2}},
    "sequences": {"packed": {}, "padded": {"qkv_format": "bshd"}},
    "batches": {
        "of 1": {"micro_batch_size": 1},
        "of 5": {"micro_batch_size": 5},
        "dynamic": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 50},
    },
    "recompute": {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    },
    "optimizer": {
        "plain": {},
        "distributed": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    },
}
BALANCED: dict[str, Any] = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}


def flags(layout: Layout) -> dict[str, Any]:
    """The options of a layout."""
    found: dict[str, Any] = {} if layout["experts"] == "dense" else dict(BALANCED)
    for feature, value in layout.items():
        found |= FEATURES[feature][value]
    return found


def possible(layout: Layout) -> bool:
    """Whether the options go together."""
    chosen = flags(layout)
    ranks = chosen["actor_num_gpus_per_node"]
    tensor, pipeline, context = (
        chosen.get(f"{kind}_parallel_size", 1) for kind in ("tensor_model", "pipeline_model", "context")
    )
    if ranks % (tensor * pipeline * context):
        return False
    needs_packing = context > 1 or layout["batches"] == "dynamic" or layout["pipeline"] == "2-virtual"
    if layout["sequences"] == "padded" and needs_packing:
        return False
    if layout["experts"] == "dense":
        return True
    # tokens of tensor-parallel ranks reach the experts by the sequence; experts are spread over what is left of a stage
    expert_ranks = ranks // pipeline // tensor
    return layout["tensor"] != "2" and expert_ranks % chosen.get("expert_model_parallel_size", 1) == 0


def every_layout() -> list[Layout]:
    """All combinations that go together."""
    names = list(FEATURES)
    combinations = (dict(zip(names, values, strict=True)) for values in itertools.product(*FEATURES.values()))
    return [layout for layout in combinations if possible(layout)]


def _pairs(layout: Layout) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(layout.items(), 2)}


def pairwise(layouts: list[Layout], times: int) -> Iterator[Layout]:
    """Few of ``layouts`` in which each pair of values occurs ``times`` times, or as often as there are layouts with it.

    Always the one with most pairs that are still wanted.
    """
    remaining = {position: _pairs(layout) for position, layout in enumerate(layouts)}
    there_are = Counter(itertools.chain.from_iterable(remaining.values()))
    wanted = {pair: min(times, count) for pair, count in there_are.items()}
    while wanted:
        best = max(remaining, key=lambda position: len(remaining[position] & wanted.keys()))
        for pair in remaining.pop(best) & wanted.keys():
            wanted[pair] -= 1
            if not wanted[pair]:
                del wanted[pair]
        yield layouts[best]


def title(layout: Layout) -> str:
    """The layout in a line."""
    return " ".join(f"{feature}={value}" for feature, value in layout.items())


LAYOUTS_OF_A_POOL = 60
"""Processes are replaced after so many: gloo keeps the threads of groups that are no longer in use."""


def main() -> int:
    """Compare all combinations; the exit status says whether one differs."""
    from tests.parallel.pool import WorkerPool
    from tests.parallel.test_matrix import Expected, difference

    parser = argparse.ArgumentParser(description="compare every layout with the single process")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="begin at the N-th layout")
    first = parser.parse_args().first
    layouts = sorted(every_layout(), key=lambda layout: (layout["world"], title(layout)))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for start in range(first - 1, len(layouts), LAYOUTS_OF_A_POOL):
            pools = {size: WorkerPool(int(size)) for size in FEATURES["world"]}
            expected = Expected(Path(folder), pools["1"])
            for number, layout in enumerate(layouts[start : start + LAYOUTS_OF_A_POOL], start + 1):
                fault = difference(layout, pools[layout["world"]], expected)
                wrong += fault is not None
                print(f"{number}/{len(layouts)} {title(layout)}: {fault or 'equal'}", flush=True)
            for pool in pools.values():
                pool.close()
    print(f"{wrong} of {len(layouts) - first + 1} layouts differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
