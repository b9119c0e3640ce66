"""Targets that several frozen models make, over ranks, against a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.support import assert_same_tensors, save_reference, tiny_config
from tests.parallel import target_work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import LAYOUTS, assert_same_metrics, reporting

pytestmark = pytest.mark.parallel

SPREAD: dict[str, dict[str, Any]] = {
    "tp2": LAYOUTS["tp2"] | {"offload_teacher": True},
    "cp2": LAYOUTS["cp2"],
    "student pp2, teachers tp2": LAYOUTS["pp2"]
    | {"opd_teacher_tensor_model_parallel_size": 2, "opd_teacher_pipeline_model_parallel_size": 1},
}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config = tiny_config("llama", hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    second = save_reference(tmp_path_factory.mktemp("second") / "model", config, seed=17)
    return {"teacher": folders["teacher"], "second": second}


@pytest.mark.parametrize("target", target_work.TARGETS)
@pytest.mark.parametrize("layout", SPREAD)
def test_ranks_do_what_one_process_does(
    two: WorkerPool,
    alone: Callable[..., Any],
    folders: dict[str, Path],
    models: dict[str, Path],
    layout: str,
    target: str,
) -> None:
    parts = two.run(target_work.gradients, folders["qwen3"], SPREAD[layout], target, models)
    metrics, expected = alone(target_work.gradients, folders["qwen3"], (), target, tuple(models.items()))
    assert_same_tensors(parts[0][1], expected, 2e-5)
    assert_same_metrics(reporting([[part[0]] for part in parts]), [metrics], 1e-5)
