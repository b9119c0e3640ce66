"""Teachers that are laid out or shared out otherwise than the student, against a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parallel import work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import LAYOUTS, assert_same_metrics, reporting

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("layout", ["dp2", "cp2"])
def test_hidden_states_follow_their_samples_to_the_rank_that_trains_them(
    two: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], layout: str
) -> None:
    """Micro-batches by tokens deal the samples out otherwise than the student's by number."""
    flags = LAYOUTS[layout] | {"opd_teacher_max_tokens_per_gpu": 40}
    found = reporting(two.run(work.distillation, folders["qwen3"], flags, folders["teacher"]))
    assert_same_metrics(found, alone(work.distillation, folders["qwen3"], (), folders["teacher"]), 1e-5)


@pytest.mark.parametrize("layout", ["dp2-distributed-optimizer", "pp2", "tp2-sp"])
def test_offloading_changes_no_bit_in_a_layout(
    two: WorkerPool, tmp_path: Path, folders: dict[str, Path], layout: str
) -> None:
    """Distillation with all models, optimizer and gradients leaving, and a resume from a checkpoint."""
    away = {"offload_teacher": True, "offload_optimizer": True, "offload_train": True, "offload_dir": str(tmp_path)}
    arguments = folders["qwen3"], LAYOUTS[layout] | {"bf16": True}
    expected = reporting(two.run(work.distillation, *arguments, folders["teacher"]))
    found = reporting(two.run(work.distillation, arguments[0], arguments[1] | away, folders["teacher"]))
    assert found == expected
    assert two.run(work.resume, arguments[0], arguments[1] | away, tmp_path / "checkpoints") == [[], []]
