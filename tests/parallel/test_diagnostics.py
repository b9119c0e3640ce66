"""Diagnostics in layouts of two ranks are those of a single process, and change no training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.megatron.support import save_reference, tiny_config
from tests.parallel.diagnostics_work import diagnostics
from tests.parallel.matrix import BALANCED
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import LAYOUTS, TWO, merged

pytestmark = pytest.mark.parallel

MIXTURES: dict[str, dict[str, Any]] = {
    "experts-ep2": TWO | {"expert_model_parallel_size": 2},
    "experts-ep2-distributed": TWO | {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
}
CHOSEN = ("tp2-sp", "pp2", "cp2", "dp2-overlap", "dp2-distributed-optimizer-overlap")


def compare(found: list[Any], expected: Any) -> None:
    tokens, gradient, step = expected
    mine = merged([part[0] for part in found])
    assert mine.keys() == tokens.keys()
    for place, columns in tokens.items():
        assert mine[place].keys() == columns.keys()
        for name, values in columns.items():
            np.testing.assert_allclose(mine[place][name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    for part in found:  # every rank has all of it
        assert part[1] == pytest.approx(gradient, rel=1e-3)
    (trained,) = [part[2] for part in found if part[2]]
    assert trained["train/grad_norm"] == pytest.approx(step["train/grad_norm"], rel=1e-4)


def whole_norm(gradient: dict[str, float]) -> float:
    task, opd = gradient["train/task_grad_norm"], gradient["train/opd_grad_norm"]
    return math.sqrt(task**2 + opd**2 + 2 * gradient["train/grad_cosine"] * task * opd)


@pytest.mark.parametrize("layout", CHOSEN)
def test_a_layout_measures_what_one_process_does(
    two: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], layout: str
) -> None:
    expected = alone(diagnostics, folders["qwen3"], (), folders["teacher"])
    assert whole_norm(expected[1]) == pytest.approx(expected[2]["train/grad_norm"], rel=1e-4)
    compare(two.run(diagnostics, folders["qwen3"], LAYOUTS[layout], folders["teacher"]), expected)


@pytest.mark.parametrize("layout", MIXTURES)
def test_a_mixture_leaves_out_its_auxiliary_loss(
    two: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory,
    layout: str,
) -> None:  # fmt: skip
    """Measured with the loss is what is measured without it; the step itself has it, and its routers' metrics."""
    folder = save_reference(tmp_path_factory.mktemp("mixture"), tiny_config("qwen3_moe"))
    plain = alone(diagnostics, folder, (), folders["teacher"])
    balanced = alone(diagnostics, folder, tuple(BALANCED.items()), folders["teacher"])
    assert plain[1] == pytest.approx(balanced[1], rel=1e-6)
    assert whole_norm(plain[1]) == pytest.approx(plain[2]["train/grad_norm"], rel=1e-4)
    assert balanced[2]["train/load_balancing_loss"] > 0
    compare(two.run(diagnostics, folder, MIXTURES[layout] | BALANCED, folders["teacher"]), balanced)
