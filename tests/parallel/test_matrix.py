"""Layouts in which every pair of features meets, against the single process with padded sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.megatron.support import relative_error, save_reference, tiny_config
from tests.parallel import work
from tests.parallel.matrix import BALANCED, FEATURES, Layout, every_layout, flags, pairwise, title
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import merged

pytestmark = pytest.mark.parallel

TOLERANCE = 1e-5
LAYOUTS = sorted(pairwise(every_layout(), times=2), key=lambda layout: layout["world"])
PLAIN = {"qkv_format": "bshd", "micro_batch_size": 12}
FAMILIES = {"dense": "qwen3", "experts": "qwen3_moe"}


class Expected:
    """Models of the matrix, and what the single process makes of them."""

    def __init__(self, root: Path, one: WorkerPool) -> None:
        self.folders = {
            kind: save_reference(root / kind, tiny_config(family, num_hidden_layers=4))
            for kind, family in FAMILIES.items()
        }
        self._one = one

    @cache  # noqa: B019  an object of this class lives as long as the tests
    def of(self, kind: str) -> tuple[dict[str, float], dict[str, Any], dict[int, np.ndarray]]:
        """Metrics, gradients and log-probabilities."""
        settings = PLAIN if kind == "dense" else PLAIN | BALANCED
        (found,) = self._one.run(work.step_and_scores, self.folders[kind], settings)
        return found


def difference(layout: Layout, pool: WorkerPool, expected: Expected) -> str | None:
    """What of the step in ``layout`` is not what the single process finds, or None."""
    kind = "dense" if layout["experts"] == "dense" else "experts"
    metrics, gradients, log_probs = expected.of(kind)
    parts = pool.run(work.step_and_scores, expected.folders[kind], flags(layout))
    (found,) = [part[0] for part in parts if part[0]]
    if found != pytest.approx(metrics, rel=TOLERANCE, abs=TOLERANCE):
        return f"metrics: {found} instead of {metrics}"
    if parts[0][1].keys() != gradients.keys():
        return "gradients are missing"
    errors = {name: relative_error(parts[0][1][name], gradient) for name, gradient in gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        return f"gradient of {worst}: {errors[worst]:.1e}"
    scores = merged([part[2] for part in parts])
    if scores.keys() != log_probs.keys():
        return f"scores of {sorted(scores)}"
    if not all(np.allclose(scores[place], log_probs[place], rtol=0, atol=TOLERANCE) for place in log_probs):
        return "log-probabilities differ"
    return None


@pytest.fixture(scope="module")
def pools(two: WorkerPool, four: WorkerPool) -> Iterator[dict[str, WorkerPool]]:
    one = WorkerPool(1)
    yield {"1": one, "2": two, "4": four}
    one.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, pools: dict[str, WorkerPool]) -> Expected:
    return Expected(tmp_path_factory.mktemp("matrix"), pools["1"])


def test_the_selection_is_large_and_lets_every_pair_meet() -> None:
    assert len(LAYOUTS) >= 24

    def pairs(layouts: list[Layout]) -> set[frozenset[tuple[str, str]]]:
        return {frozenset(pair) for layout in layouts for pair in itertools.combinations(layout.items(), 2)}

    assert pairs(LAYOUTS) == pairs(every_layout())
    assert {value for layout in LAYOUTS for value in layout.items()} == {
        (feature, value) for feature, values in FEATURES.items() for value in values
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=title)
def test_a_layout_changes_nothing(layout: Layout, pools: dict[str, WorkerPool], expected: Expected) -> None:
    assert difference(layout, pools[layout["world"]], expected) is None
