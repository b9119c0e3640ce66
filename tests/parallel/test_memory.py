"""Predicted bytes of a rank are those that it allocates, in every kind of layout of two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.support import save_reference, tiny_config
from tests.parallel import memory_work
from tests.parallel.pool import WorkerPool

pytestmark = pytest.mark.parallel

WORK: dict[str, Any] = {
    "rollout_max_prompt_len": 28,
    "rollout_max_response_len": 100,
    "rollout_batch_size": 4,
    "micro_batch_size": 4,
    "actor_num_gpus_per_node": 2,
}
BF16: dict[str, Any] = {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp-bf16": BF16 | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2-distributed-bf16": BF16 | {"use_distributed_optimizer": True, "micro_batch_size": 2},
    "dp2-distributed-float32": {"use_distributed_optimizer": True, "micro_batch_size": 2},
}
SIZES: dict[str, Any] = {"hidden_size": 128, "vocab_size": 3001, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that are large enough for the padding of buffers not to count."""
    root = tmp_path_factory.mktemp("sized")
    dense = tiny_config("qwen3", intermediate_size=384, head_dim=32, **SIZES)
    mixture = tiny_config("qwen3_moe", moe_intermediate_size=96, **SIZES)
    return {
        "qwen3": save_reference(root / "qwen3", dense),
        "qwen3_moe": save_reference(root / "qwen3_moe", mixture),
    }


def check(parts: list[dict[str, tuple[int, int]]]) -> None:
    """Within 10 %, activations within a factor of 1.25."""
    for rank, found in enumerate(parts):
        assert {"weights", "gradients", "optimizer", "activations"} <= found.keys()
        for name, (predicted, measured) in found.items():
            factor = 1.25 if name == "activations" else 1.1
            assert measured / factor <= predicted <= measured * factor, f"{name} of rank {rank}"
    assert any("head" in found for found in parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_takes_what_is_predicted(two: WorkerPool, sized: dict[str, Path], layout: str) -> None:
    check(two.run(memory_work.predicted_and_measured, sized["qwen3"], WORK | LAYOUTS[layout]))


def test_experts_on_two_ranks(two: WorkerPool, sized: dict[str, Path]) -> None:
    """With the state of the experts on the rank that has them, and that of everything else shared out."""
    flags = BF16 | {"expert_model_parallel_size": 2, "use_distributed_optimizer": True, "micro_batch_size": 2}
    check(two.run(memory_work.predicted_and_measured, sized["qwen3_moe"], WORK | flags))
