"""Teachers that are laid out or shared out otherwise than the student, against a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.megatron.support import assert_equal_tensors, save_reference, tiny_config
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


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student, and a teacher of another family and size with a shared expert and a dense layer."""
    root = tmp_path_factory.mktemp("mixtures")
    larger = tiny_config("qwen2_moe", hidden_size=48, num_attention_heads=6)
    return {
        "mixture": save_reference(root / "student", tiny_config("qwen3_moe")),
        "mixture teacher": save_reference(root / "teacher", larger, seed=9),
    }


EXPERTS_OVER_TWO = {"expert_model_parallel_size": 2}
WITH_EXPERTS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "a dense teacher tp2 beside experts": ("mixture", "teacher", 4, EXPERTS_OVER_TWO | _teacher(2)),
    "a dense teacher pp2 beside experts": (
        "mixture",
        "teacher",
        4,
        LAYOUTS["tp2-sp"] | EXPERTS_OVER_TWO | {"expert_tensor_parallel_size": 1} | _teacher(1, 2),
    ),
    "experts of the teacher alone": (
        "qwen3",
        "mixture teacher",
        4,
        LAYOUTS["pp2"] | _teacher(2) | {"opd_teacher_expert_model_parallel_size": 2},
    ),
    "experts of both, spread otherwise": (
        "mixture",
        "mixture teacher",
        4,
        EXPERTS_OVER_TWO
        | _teacher(2)
        | {"opd_teacher_expert_model_parallel_size": 4, "opd_teacher_expert_tensor_parallel_size": 1},
    ),
    "the student's layout": ("qwen3", "mixture teacher", 2, LAYOUTS["tp2"]),
}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_teachers_and_students_with_experts(
    two: WorkerPool,
    four: WorkerPool,
    alone: Callable[..., Any],
    folders: dict[str, Path],
    mixtures: dict[str, Path],
    name: str,
) -> None:
    student, teacher, size, flags = WITH_EXPERTS[name]
    models = folders | mixtures
    pool = two if size == 2 else four
    arguments = flags | {"actor_num_gpus_per_node": size}
    found = reporting(pool.run(work.distillation, models[student], arguments, models[teacher]))
    assert_same_metrics(found, alone(work.distillation, models[student], (), models[teacher]), 1e-5)


def test_sizes_that_are_the_students_build_no_second_groups(two: WorkerPool, folders: dict[str, Path]) -> None:
    named = LAYOUTS["tp2"] | _teacher(2)
    assert two.run(work.own_groups, folders["qwen3"], named, folders["teacher"]) == [False, False]
    assert two.run(work.own_groups, folders["qwen3"], named | _teacher(1), folders["teacher"]) == [True, True]


@pytest.mark.parametrize(("layout", "holders"), [("pp2", [1]), ("tp2", [0, 1])])
def test_an_output_weight_from_another_layout_lies_on_the_host_once(
    two: WorkerPool, folders: dict[str, Path], layout: str, holders: list[int]
) -> None:
    """With the teacher leaving the device, too; a stage without the head holds nothing."""
    flags = LAYOUTS[layout] | _teacher(2 if layout == "pp2" else 1) | {"offload_teacher": True}
    rows = 56 // len(holders)
    held = two.run(work.brought_head_bytes, folders["qwen3"], flags, folders["teacher"])
    assert held == [rows * 48 * 4 if rank in holders else 0 for rank in range(2)]


@pytest.mark.parametrize("layouts", ["tp2-sp", "teacher pp2, student tp2", "teacher tp2, student pp2"])
def test_a_teacher_is_given_away_as_it_was_stored(two: WorkerPool, folders: dict[str, Path], layouts: str) -> None:
    """For the engine in which it answers: whole tensors on the first rank, whatever its layout, also from the host."""
    flags = ON_TWO.get(layouts) or LAYOUTS[layouts]
    found, nothing = two.run(work.exported_teacher, folders["qwen3"], flags, folders["teacher"])
    assert_equal_tensors(found, load_file(folders["teacher"] / "model.safetensors"))
    assert not nothing


@pytest.mark.parametrize("held", [{}, {(0, 0): 2}, {(0, 0): 2, (1, 0): 3}], ids=len)
def test_what_nobody_holds_is_an_error_on_every_rank(two: WorkerPool, held: dict[tuple[int, int], int]) -> None:
    assert two.run(work.exchange_of_missing, held) == ["no rank holds (7, 0)"] * 2


@pytest.mark.parametrize("layout", ["dp2", "cp2"])
def test_hidden_states_follow_their_samples_to_the_rank_that_trains_them(
    two: WorkerPool, alone: Callable[..., Any], folders: dict[str, Path], layout: str
) -> None:
    """Micro-batches by tokens deal the samples out otherwise than the student's by number."""
    flags = LAYOUTS[layout] | {"opd_teacher_max_tokens_per_gpu": 40}
    found = reporting(two.run(work.distillation, folders["qwen3"], flags, folders["teacher"]))
    assert_same_metrics(found, alone(work.distillation, folders["qwen3"], (), folders["teacher"]), 1e-5)


AWAY: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        name: ("qwen3", "teacher", LAYOUTS[name] | {"bf16": True})
        for name in ("dp2-distributed-optimizer", "pp2", "tp2-sp")
    },
    "virtual stages": ("teacher", "qwen3", LAYOUTS["pp2"] | {"num_layers_per_virtual_pipeline_stage": 1, "bf16": True}),
}


@pytest.mark.parametrize("layout", AWAY)
def test_offloading_changes_no_bit_in_a_layout(
    two: WorkerPool, tmp_path: Path, folders: dict[str, Path], layout: str
) -> None:
    """Distillation with all models, optimizer and gradients leaving, and a resume from a checkpoint."""
    away = {"offload_teacher": True, "offload_optimizer": True, "offload_train": True, "offload_dir": str(tmp_path)}
    student, teacher, flags = AWAY[layout]
    arguments = folders[student], flags
    expected = reporting(two.run(work.distillation, *arguments, folders[teacher]))
    found = reporting(two.run(work.distillation, arguments[0], arguments[1] | away, folders[teacher]))
    assert found == expected
    assert two.run(work.resume, arguments[0], arguments[1] | away, tmp_path / "checkpoints") == [[], []]
