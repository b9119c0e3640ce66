"""Mixtures of experts say and learn the same wherever the experts are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.megatron.support import VOCAB_SIZE, assert_equal_tensors, assert_same_tensors, save_reference, tiny_config
from tests.parallel import work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import assert_same_metrics, check_voices, reporting
from tests.tools.models import largest_difference, read_log_probs, token_lines, write_lines
from tests.tools.models import reference_log_probs as reference_scores
from tools import convert_torch_dist_to_hf

pytestmark = pytest.mark.parallel

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, EP2),
    "tp2": (2, TP2),
    "tp2-ep2-etp1": (2, TP2 | EP2 | {"expert_tensor_parallel_size": 1}),
    "pp2": (2, PP2),
    "cp2-ep2": (2, {"context_parallel_size": 2} | EP2),
    "tp2-ep2": (4, TP2 | EP2),
    "ep2-dp2-dynamic": (
        4,
        EP2 | {"use_distributed_optimizer": True, "use_dynamic_batch_size": True, "max_tokens_per_gpu": 60},
    ),
    "pp2-ep2": (4, PP2 | EP2),
    "tp2-cp2-ep4-etp1": (
        4,
        TP2 | {"context_parallel_size": 2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
    ),
}
BALANCED = {"moe_aux_loss_coeff": 0.3, "moe_router_load_balancing_type": "seq_aux_loss"}
Alone = Callable[..., Any]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen3 mixture, and a Qwen2 one with a shared expert and a dense layer."""
    root = tmp_path_factory.mktemp("mixtures")
    return {family: save_reference(root / family, tiny_config(family)) for family in ("qwen3_moe", "qwen2_moe")}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ranks(layout: str, two: WorkerPool, four: WorkerPool) -> WorkerPool:
    return two if LAYOUTS[layout][0] == 2 else four


def sized(layout: dict[str, Any], ranks: int) -> dict[str, Any]:
    """With large micro-batches, since each costs the same at these sizes; a pipeline shall be filled."""
    keeps_small = "pipeline_model_parallel_size" in layout or "max_tokens_per_gpu" in layout
    large = {} if keeps_small else {"micro_batch_size": 6}
    return large | layout | {"actor_num_gpus_per_node": ranks}


@pytest.fixture
def flags(layout: str) -> dict[str, Any]:
    size, found = LAYOUTS[layout]
    return sized(found, size)


def test_a_loaded_mixture_is_that_of_transformers(
    ranks: WorkerPool, flags: dict[str, Any], mixtures: dict[str, Path]
) -> None:
    check_voices(ranks.run(work.voices, mixtures["qwen3_moe"], flags), mixtures["qwen3_moe"])


def assert_a_step_is_that_of_one_process(
    ranks: WorkerPool, alone: Alone, folder: Path, flags: dict[str, Any], settings: dict[str, Any]
) -> dict[str, float]:
    """Every gradient and metric; returns the metrics."""
    parts = ranks.run(work.gradients, folder, flags | settings, "opd")
    metrics, expected = alone(work.gradients, folder, tuple(settings.items()), "opd")
    assert_same_tensors(parts[0][1], expected, 1e-5)
    assert_same_metrics(reporting([[part[0]] for part in parts]), [metrics], 1e-5)
    return dict(metrics)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_every_gradient_and_metric_is_that_of_one_process(
    ranks: WorkerPool, alone: Alone, flags: dict[str, Any], mixtures: dict[str, Path], family: str
) -> None:
    found = assert_a_step_is_that_of_one_process(ranks, alone, mixtures[family], flags, BALANCED)
    assert found["train/load_balancing_loss"] > 0


def test_experts_need_not_be_balanced(two: WorkerPool, alone: Alone, mixtures: dict[str, Path]) -> None:
    flags = sized(LAYOUTS["tp2-ep2-etp1"][1], 2)
    found = assert_a_step_is_that_of_one_process(two, alone, mixtures["qwen3_moe"], flags, {})
    assert "train/router_entropy" in found
    assert "train/load_balancing_loss" not in found


def test_the_tools_spread_experts(two: WorkerPool, four: WorkerPool, tmp_path: Path, mixtures: dict[str, Path]) -> None:
    """Both conversions are bit-equal, and scores are those of transformers, also where ranks have unequal shares."""
    source, converted, back = mixtures["qwen2_moe"], tmp_path / "torch_dist", tmp_path / "hf"
    ep, tp = ["--expert-model-parallel-size", "2"], ["--tensor-model-parallel-size", "2"]
    two.run(work.run_tool, "convert_hf_to_torch_dist", ["--hf-checkpoint", str(source), "--save", str(converted), *ep])
    convert_torch_dist_to_hf.main(["--load", str(converted), "--save", str(back)])
    assert_equal_tensors(load_file(back / "model.safetensors"), load_file(source / "model.safetensors"))
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    lines = token_lines(VOCAB_SIZE, (9, 1, 30))
    expected = reference_scores(source, lines)
    arguments = ["--load", str(converted), "--input", str(write_lines(tmp_path / "tokens.jsonl", lines)), *ep]
    for pool, more in ((two, []), (four, tp), (four, [*tp, "--sequence-parallel"])):
        output = tmp_path / "scores.jsonl"
        pool.run(work.run_tool, "score", [*arguments, *more, "--output", str(output), "--micro-batch-size", "1"])
        assert largest_difference(read_log_probs(output), expected) <= 1e-5
        output.unlink()


@pytest.mark.parametrize("size", [2, 4])
def test_the_loss_over_micro_batches_depends_on_nothing_but_them(
    two: WorkerPool, four: WorkerPool, alone: Alone, mixtures: dict[str, Path], size: int
) -> None:
    """One data-parallel rank has the micro-batches of a single process; its tokens are split in all other ways."""
    settings = BALANCED | {"moe_router_load_balancing_type": "aux_loss", "micro_batch_size": 6}
    _, layout = LAYOUTS["cp2-ep2" if size == 2 else "tp2-cp2-ep4-etp1"]
    pool, flags = two if size == 2 else four, layout | {"actor_num_gpus_per_node": size}
    assert_a_step_is_that_of_one_process(pool, alone, mixtures["qwen3_moe"], flags, settings)


RESUMED = {
    "ep2-dp2-distributed-optimizer": (4, EP2 | {"use_distributed_optimizer": True}),
    "tp2-ep2-bf16": (4, TP2 | EP2 | {"bf16": True}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_with_experts_resumes_bit_for_bit(
    two: WorkerPool, four: WorkerPool, tmp_path: Path, mixtures: dict[str, Path], name: str
) -> None:
    size, layout = RESUMED[name]
    flags = sized(layout, size) | BALANCED
    assert (two if size == 2 else four).run(work.resume, mixtures["qwen3_moe"], flags, tmp_path) == [[]] * size


def test_a_run_with_experts_resumes_from_before_its_first_step(
    two: WorkerPool, tmp_path: Path, mixtures: dict[str, Path]
) -> None:
    flags = EP2 | {"actor_num_gpus_per_node": 2}
    for found, expected in two.run(work.first_step_after_resume, mixtures["qwen3_moe"], flags, tmp_path):
        assert found == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_weights_of_experts_pass_between_layouts(
    two: WorkerPool, four: WorkerPool, alone: Alone, tmp_path: Path, mixtures: dict[str, Path], family: str
) -> None:
    """Saved with experts cut and spread, loaded with them whole on other ranks, saved again, loaded by one process."""
    folder = mixtures[family]
    stored = load_file(folder / "model.safetensors")
    cut = TP2 | EP2 | {"actor_num_gpus_per_node": 4}
    four.run(work.save_weights, folder, cut, tmp_path / "cut")
    whole = TP2 | EP2 | {"expert_tensor_parallel_size": 1, "actor_num_gpus_per_node": 2}
    assert_equal_tensors(two.run(work.load_and_export, folder, whole, tmp_path / "cut")[0], stored)
    two.run(work.save_weights, folder, whole, tmp_path / "whole")
    assert_equal_tensors(alone(work.load_and_export, folder, (), tmp_path / "whole"), stored)
