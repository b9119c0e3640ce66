"""Every layout of two ranks says and learns what a single process does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.megatron.support import (
    FAMILIES,
    assert_equal_tensors,
    assert_same_tensors,
    load_reference,
    make_samples,
    reference_log_probs,
    reference_logits,
    relative_error,
)
from tests.parallel import work
from tests.parallel.pool import WorkerPool

pytestmark = pytest.mark.parallel

TWO: dict[str, Any] = {"actor_num_gpus_per_node": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TWO | {"tensor_model_parallel_size": 2},
    "tp2-sp": TWO | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": TWO | {"pipeline_model_parallel_size": 2},
    "dp2": TWO,
    "dp2-overlap": TWO | {"overlap_grad_reduce": True},
    "dp2-distributed-optimizer-overlap": TWO
    | {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "cp2": TWO | {"context_parallel_size": 2},
    "dp2-dynamic": TWO | {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 60},
    "tp2-sp-padded": TWO | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "qkv_format": "bshd"},
    "dp2-distributed-optimizer": TWO | {"use_distributed_optimizer": True},
}
Alone = Callable[..., Any]


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Session scope keeps tests of one layout together: each change of it leaves process groups behind."""
    return str(request.param)


every_family = pytest.mark.parametrize("family", FAMILIES)


def merged(parts: list[dict[Any, Any]]) -> dict[Any, Any]:
    """One dictionary from those of all ranks; empty ones come from ranks that hold no results."""
    return {key: value for part in parts for key, value in part.items()}


def reporting(parts: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The metrics, which exactly one rank has."""
    (found,) = [part for part in parts if all(part)]
    return found


def assert_same_metrics(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    assert len(found) == len(expected)
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance), f"step {step}"


@cache
@torch.no_grad()
def _transformers_voice(folder: Path) -> list[tuple[np.ndarray, torch.Tensor]]:
    """Log-probabilities and logits of each sample; all layouts are compared with the same."""
    model = load_reference(folder)
    return [(reference_log_probs(model, sample).numpy(), reference_logits(model, sample)) for sample in make_samples(0)]


def check_voices(parts: list[dict[str, Any]], folder: Path) -> None:
    """Logits, log-probabilities and likeliest tokens are those of transformers, and the export is what was loaded."""
    log_probs, logits, top_ids = (merged([part[name] for part in parts]) for name in ("log_probs", "logits", "top_ids"))
    for place, (expected, expected_logits) in enumerate(_transformers_voice(folder)):
        np.testing.assert_allclose(log_probs[place], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(top_ids[place], expected_logits.topk(work.TOP).indices)
        if len(expected):
            assert relative_error(torch.from_numpy(logits[place]), expected_logits) <= 1e-5
    assert_equal_tensors(parts[0]["exported"], load_file(folder / "model.safetensors"))
    assert not any(part["exported"] for part in parts[1:])


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2-tied"])
def test_a_loaded_model_is_that_of_transformers(
    two: WorkerPool, folders: dict[str, Path], family: str, layout: str
) -> None:
    check_voices(two.run(work.voices, folders[family], LAYOUTS[layout]), folders[family])


@every_family
@pytest.mark.parametrize("loss", work.LOSSES)
def test_every_gradient_of_the_first_step_is_the_same(
    two: WorkerPool, alone: Alone, folders: dict[str, Path], family: str, layout: str, loss: str
) -> None:
    parts = two.run(work.gradients, folders[family], LAYOUTS[layout], loss)
    metrics, expected = alone(work.gradients, folders[family], (), loss)
    assert_same_tensors(parts[0][1], expected, 1e-5)
    assert_same_metrics(reporting([[part[0]] for part in parts]), [metrics], 1e-5)


@pytest.mark.parametrize("sharing", ["cp2", "dp2-dynamic"])
def test_a_loss_of_whole_responses_is_the_same(
    two: WorkerPool, alone: Alone, folders: dict[str, Path], sharing: str
) -> None:
    """Sequence ratios and sums over responses, where ranks hold a part of each or micro-batches several."""
    parts = two.run(work.whole_responses, folders["qwen3"], LAYOUTS[sharing])
    metrics, expected = alone(work.whole_responses, folders["qwen3"], ())
    assert 0 < metrics["train/opsm_masked_frac"] < 1
    assert 0 < metrics["train/tis_clipfrac"] < 1
    assert_same_tensors(parts[0][1], expected, 1e-5)
    assert_same_metrics(reporting([[part[0]] for part in parts]), [metrics], 1e-5)


@every_family
@pytest.mark.parametrize("loss", work.LOSSES)
def test_the_first_ten_losses_are_the_same(
    two: WorkerPool, alone: Alone, folders: dict[str, Path], family: str, layout: str, loss: str
) -> None:
    found = reporting(two.run(work.losses, folders[family], LAYOUTS[layout], loss))
    expected = alone(work.losses, folders[family], (), loss)
    assert len({round(metrics["train/loss"], 3) for metrics in expected}) > 5
    assert_same_metrics(found, expected, 1e-5)


def test_all_ranks_leave_out_a_step_with_nothing_to_learn(
    two: WorkerPool, alone: Alone, folders: dict[str, Path], layout: str
) -> None:
    parts = two.run(work.nothing_to_learn, folders["qwen3"], LAYOUTS[layout])
    expected, _ = alone(work.nothing_to_learn, folders["qwen3"], ())
    assert [metrics["train/skipped_steps"] for metrics in expected] == [0, 1, 0]
    assert_same_metrics(reporting([metrics for metrics, _ in parts]), expected, 1e-5)
    assert [moved for _, moved in parts] == [[], []]


def test_distillation_from_a_megatron_teacher_is_the_same(
    two: WorkerPool, alone: Alone, folders: dict[str, Path], layout: str
) -> None:
    """A larger teacher of another family in the student's layout, the exact KL, several optimizer steps."""
    found = reporting(two.run(work.distillation, folders["qwen3"], LAYOUTS[layout], folders["teacher"]))
    expected = alone(work.distillation, folders["qwen3"], (), folders["teacher"])
    assert all(metrics["opd/reverse_kl_exact"] > 0.1 for metrics in expected)
    assert_same_metrics(found, expected, 1e-5)


def test_bfloat16_runs_in_every_layout(two: WorkerPool, alone: Alone, folders: dict[str, Path], layout: str) -> None:
    flags = {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}
    found = reporting(two.run(work.losses, folders["qwen3"], LAYOUTS[layout] | flags, "sft", 3))
    expected = alone(work.losses, folders["qwen3"], tuple(flags.items()), "sft", 3)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-2)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=5e-2)
    parts = two.run(work.voices, folders["qwen3"], LAYOUTS[layout] | flags)
    stored = load_file(folders["qwen3"] / "model.safetensors")
    assert_equal_tensors(parts[0]["exported"], {name: tensor.bfloat16() for name, tensor in stored.items()})


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_run_resumes_bit_for_bit_in_its_layout(
    two: WorkerPool, tmp_path: Path, folders: dict[str, Path], layout: str, bf16: bool
) -> None:
    assert two.run(work.resume, folders["qwen3"], LAYOUTS[layout] | {"bf16": bf16}, tmp_path) == [[], []]


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_weights_pass_between_this_layout_and_a_single_process(
    two: WorkerPool, alone: Alone, tmp_path: Path, folders: dict[str, Path], family: str, layout: str
) -> None:
    folder, stored = folders[family], load_file(folders[family] / "model.safetensors")
    two.run(work.save_weights, folder, LAYOUTS[layout], tmp_path / "parallel")
    assert_equal_tensors(alone(work.load_and_export, folder, (), tmp_path / "parallel"), stored)
    alone(work.save_weights, folder, (), tmp_path / "single")
    assert_equal_tensors(two.run(work.load_and_export, folder, LAYOUTS[layout], tmp_path / "single")[0], stored)


def test_weights_written_in_one_layout_load_in_another(
    two: WorkerPool, tmp_path: Path, folders: dict[str, Path]
) -> None:
    folder = folders["qwen2-tied"]
    two.run(work.save_weights, folder, LAYOUTS["tp2-sp"], tmp_path)
    found = two.run(work.load_and_export, folder, LAYOUTS["pp2"], tmp_path)[0]
    assert_equal_tensors(found, load_file(folder / "model.safetensors"))


def test_random_weights_do_not_depend_on_the_layout(
    two: WorkerPool, alone: Alone, folders: dict[str, Path], layout: str
) -> None:
    found = two.run(work.random_start, folders["qwen2"], LAYOUTS[layout])[0]
    assert_equal_tensors(found, alone(work.random_start, folders["qwen2"], ()))


def test_virtual_pipeline_stages_say_learn_save_and_resume_the_same(
    two: WorkerPool, alone: Alone, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """Four layers on two ranks, which take turns layer by layer."""
    flags = TWO | {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    folder, stored = folders["teacher"], load_file(folders["teacher"] / "model.safetensors")
    check_voices(two.run(work.voices, folder, flags), folder)
    found = reporting(two.run(work.losses, folder, flags | {"overlap_grad_reduce": True}, "opd", 4))
    assert_same_metrics(found, alone(work.losses, folder, (), "opd", 4), 1e-5)
    assert two.run(work.resume, folder, flags | {"use_distributed_optimizer": True}, tmp_path / "run") == [[], []]
    two.run(work.save_weights, folder, flags, tmp_path / "virtual")
    assert_equal_tensors(alone(work.load_and_export, folder, (), tmp_path / "virtual"), stored)
    alone(work.save_weights, folder, (), tmp_path / "single")
    assert_equal_tensors(two.run(work.load_and_export, folder, flags, tmp_path / "single")[0], stored)
    found = reporting(two.run(work.distillation, folders["teacher"], flags, folders["qwen3"]))
    assert_same_metrics(found, alone(work.distillation, folders["teacher"], (), folders["qwen3"]), 1e-5)
