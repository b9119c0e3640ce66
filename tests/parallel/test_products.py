"""Products of two kinds of parallelism on four ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.support import assert_same_tensors
from tests.parallel import work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import assert_same_metrics, check_voices, reporting

pytestmark = pytest.mark.parallel

FOUR: dict[str, Any] = {"actor_num_gpus_per_node": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp-pp2": FOUR
    | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    "tp2-dp2-distributed-optimizer": FOUR | {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True},
    "pp2-dp2": FOUR | {"pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_of_layouts_says_and_learns_the_same(
    four: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], layout: str
) -> None:
    flags = LAYOUTS[layout] | {"micro_batch_size": 2}
    for family in ("qwen2-tied", "qwen3"):
        check_voices(four.run(work.voices, folders[family], flags), folders[family])
    parts = four.run(work.gradients, folders["qwen3"], flags, "opd")
    metrics, expected = alone(work.gradients, folders["qwen3"], (), "opd")
    assert_same_tensors(parts[0][1], expected, 1e-5)
    assert_same_metrics(reporting([[part[0]] for part in parts]), [metrics], 1e-5)
    found = reporting(four.run(work.losses, folders["qwen3"], flags, "opd"))
    assert_same_metrics(found, alone(work.losses, folders["qwen3"], (), "opd"), 1e-4)


@pytest.mark.parametrize("layout", ["tp2-sp-pp2", "tp2-dp2-distributed-optimizer"])
def test_a_run_resumes_bit_for_bit_in_a_product_of_layouts(
    four: WorkerPool, tmp_path: Path, folders: dict[str, Path], layout: str
) -> None:
    assert four.run(work.resume, folders["qwen3"], LAYOUTS[layout], tmp_path) == [[]] * 4
