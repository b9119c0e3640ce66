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


def _teacher(tensor: int, pipeline: int = 1) -> dict[str, Any]:
    # With this multiple both halves of the vocabulary have tokens, and the halves of one layout are not another's.
    return {
        "opd_teacher_tensor_model_parallel_size": tensor,
        "opd_teacher_pipeline_model_parallel_size": pipeline,
        "make_vocab_size_divisible_by": 4,
    }


ON_TWO: dict[str, dict[str, Any]] = {
    "teacher tp2, student dp2": LAYOUTS["dp2"] | _teacher(2),
    "teacher dp2, student tp2": LAYOUTS["tp2"] | _teacher(1),
    "teacher pp2, student tp2": LAYOUTS["tp2-sp"] | _teacher(1, 2),
    "teacher tp2, student pp2": LAYOUTS["pp2"] | _teacher(2) | {"offload_teacher": True},
    "teacher pp2, student dp2 dynamic": LAYOUTS["dp2-dynamic"] | _teacher(1, 2) | {"opd_teacher_micro_batch_size": 2},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "teacher tp2 pp2, student dp4": _teacher(2, 2),
    "teacher tp2 dp2, student pp2 dp2": {"pipeline_model_parallel_size": 2} | _teacher(2),
    "teacher cp2 tp2, student cp2 dp2": {"context_parallel_size": 2} | _teacher(2),
}


@pytest.mark.parametrize("layouts", ON_TWO)
def test_a_teacher_in_a_layout_of_its_own(
    two: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], layouts: str
) -> None:
    """Two optimizer steps per rollout with the exact KL and the quietest baseline, against a single process."""
    found = reporting(two.run(work.distillation, folders["qwen3"], ON_TWO[layouts], folders["teacher"]))
    assert_same_metrics(found, alone(work.distillation, folders["qwen3"], (), folders["teacher"]), 1e-5)


@pytest.mark.parametrize("layouts", ON_FOUR)
def test_a_teacher_in_a_layout_of_its_own_on_four_ranks(
    four: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], layouts: str
) -> None:
    flags = ON_FOUR[layouts] | {"actor_num_gpus_per_node": 4}
    found = reporting(four.run(work.distillation, folders["qwen3"], flags, folders["teacher"]))
    assert_same_metrics(found, alone(work.distillation, folders["qwen3"], (), folders["teacher"]), 1e-5)


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
