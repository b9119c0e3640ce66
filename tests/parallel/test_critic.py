"""The critic in every layout: it expects, learns, saves and resumes what a single process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.megatron.critic_support import without_padding
from tests.megatron.support import (
    assert_equal_tensors,
    assert_same_tensors,
    save_reference,
    stored_tensors,
    tiny_config,
)
from tests.parallel import critic_work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import LAYOUTS, TWO, merged

pytestmark = pytest.mark.parallel

Alone = Callable[..., Any]
CHOSEN = ("tp2", "tp2-sp", "pp2", "dp2", "cp2", "tp2-sp-padded", "dp2-dynamic", "dp2-distributed-optimizer-overlap")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("qwen2", LAYOUTS[name]) for name in CHOSEN},
    # the last stage of a tied model's pipeline has a copy of the embedding; the critic's has none
    **{f"{name} tied": ("qwen3", LAYOUTS[name]) for name in ("pp2", "tp2-sp")},
    "virtual stages": ("teacher", LAYOUTS["pp2"] | {"num_layers_per_virtual_pipeline_stage": 1}),
    "experts": ("experts", TWO | {"expert_model_parallel_size": 2, "moe_aux_loss_coeff": 0.1}),
    "experts tp2-sp": ("experts", LAYOUTS["tp2-sp"] | {"moe_aux_loss_coeff": 0.1}),
}
BALANCED = {"moe_router_load_balancing_type": "seq_aux_loss"}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return folders | {"experts": save_reference(root / "model", tiny_config("qwen3_moe"))}


@pytest.fixture(scope="module")
def expected(
    alone: Alone, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, ...]]:
    """What the single process finds for each model."""
    root = tmp_path_factory.mktemp("alone")

    def of(model: str) -> tuple[Any, ...]:
        flags = tuple((BALANCED | {"moe_aux_loss_coeff": 0.1}).items()) if model == "experts" else ()
        found: tuple[Any, ...] = alone(critic_work.critic_step, models[model], flags, root / model)
        return found

    return of


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_same(
    two: WorkerPool, models: dict[str, Path], expected: Callable[[str], tuple[Any, ...]], tmp_path: Path, case: str
) -> None:
    model, flags = CASES[case]
    if model == "experts":
        flags = flags | BALANCED
    parts = two.run(critic_work.critic_step, models[model], flags, tmp_path)
    values, metrics, gradients = expected(model)
    found = merged([part[0] for part in parts])
    assert found.keys() == values.keys()
    for place, array in values.items():
        np.testing.assert_allclose(found[place], array, rtol=0, atol=1e-5)
        assert array.any() or not len(array)
    assert [part[1] for part in parts if part[1]] == [pytest.approx(metrics, rel=1e-5)]
    assert_same_tensors(parts[0][2], gradients, 1e-5)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "bf16"), [("tp2-sp", True), ("pp2", False), ("cp2", True), ("dp2-distributed-optimizer", False)]
)
def test_a_run_resumes_bit_for_bit(
    two: WorkerPool, folders: dict[str, Path], tmp_path: Path, name: str, bf16: bool
) -> None:
    flags, folder = LAYOUTS[name] | {"bf16": bf16}, folders["qwen2"]
    straight = two.run(critic_work.critic_run, folder, flags, range(3), tmp_path / "straight", None)
    source = tmp_path / "straight" / "iter_0000002"
    resumed = two.run(critic_work.critic_run, folder, flags, range(2, 3), tmp_path / "resumed", source)
    assert [part[2:] for part in straight] == resumed
    steps = [stored_tensors(tmp_path / run / "iter_0000003") for run in ("straight", "resumed")]
    assert any(name.startswith("critic.optimizer.") for name in steps[0])
    assert_equal_tensors(steps[1], steps[0])


@pytest.mark.parametrize(("one", "other"), [("pp2", "tp2-sp"), ("dp2-distributed-optimizer", "pp2")])
def test_a_critic_goes_on_in_another_layout(
    two: WorkerPool, folders: dict[str, Path], tmp_path: Path, one: str, other: str
) -> None:
    folder, run = folders["qwen3"], critic_work.critic_run
    two.run(run, folder, LAYOUTS[one], range(3), tmp_path / "straight", None)
    source = tmp_path / "straight" / "iter_0000002"
    two.run(run, folder, LAYOUTS[other], range(2, 3), tmp_path / "moved", source)
    expected, found = (
        without_padding(stored_tensors(tmp_path / name / "iter_0000003")) for name in ("straight", "moved")
    )
    # second moments of gradients that are 0 but for rounding differ in all their digits
    kept = [name for name in expected if "exp_avg_sq" not in name]
    assert_same_tensors({name: found[name] for name in kept}, {name: expected[name] for name in kept}, 1e-4)
