"""A student that is its own teacher over ranks that share batches, sequences and layers, against a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parallel import work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import LAYOUTS, assert_same_metrics, reporting

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("cp2", "current"),
        ("dp2-dynamic", "current"),
        ("tp2-sp", "ema"),
        ("pp2", "current"),
        ("dp2-distributed-optimizer-overlap", "ema"),
    ],
)
def test_rows_find_their_place_in_the_response(
    two: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], layout: str, weights: str
) -> None:
    """Sequences of other lengths are shared out, and cut over context-parallel ranks, otherwise than the student's."""
    chosen = {"opd_self_weights": weights, "opd_self_ema_decay": 0.5}
    found = reporting(two.run(work.self_distillation, folders["qwen3"], LAYOUTS[layout] | chosen))
    assert_same_metrics(found, alone(work.self_distillation, folders["qwen3"], tuple(chosen.items())), 1e-5)


def test_a_student_in_virtual_stages_teaches_itself(
    two: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path]
) -> None:
    layout = LAYOUTS["pp2"] | {"num_layers_per_virtual_pipeline_stage": 1}
    found = reporting(two.run(work.self_distillation, folders["teacher"], layout))
    assert_same_metrics(found, alone(work.self_distillation, folders["teacher"], ()), 1e-5)
