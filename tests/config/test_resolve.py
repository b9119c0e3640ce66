"""Defaults that depend on other options."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.parse import parse_options
from opd_megatron.config.resolve import needs_reference, reference_folder, schedule_steps
from opd_megatron.config.targets import (
    OPD_REFERENCE,
    REFERENCE,
    loads_reference,
    named_models,
    opd_reference_name,
)


def read(line: str) -> Options:
    return parse_options(line.split())


def test_lengths_and_folders() -> None:
    options = read("--rollout-batch-size 4 --n-samples-per-prompt 6 --run-dir runs/a --rollout-max-response-len 7")
    assert (options.samples_per_rollout, options.global_batch_size, options.steps_per_rollout) == (24, 24, 1)
    assert (options.save_folder, options.eval_max_response_len) == (Path("runs/a/checkpoints"), 7)
    assert options.label_key == "label"
    options = read(
        "--rollout-batch-size 4 --global-batch-size 2 --run-dir runs/a --save b --eval-max-response-len 9 "
        "--label-key answer --actor-num-nodes 2 --actor-num-gpus-per-node 6 --tensor-model-parallel-size 2 "
        "--pipeline-model-parallel-size 3"
    )
    assert (options.global_batch_size, options.steps_per_rollout) == (2, 2)
    assert (options.save_folder, options.eval_max_response_len, options.label_key) == (Path("b"), 9, "answer")
    assert (options.world_size, options.model_parallel_size, options.data_parallel_size) == (12, 6, 2)
    for name in ("save_folder", "samples_per_rollout"):
        with pytest.raises(ValueError, match="is not set"):
            getattr(Options(), name)


def test_schedule_in_optimizer_steps() -> None:
    two_steps = "--rollout-batch-size 4 --global-batch-size 2 "
    assert schedule_steps(read(two_steps + "--lr-warmup-iters 3"), 10) == (20, 3)
    assert schedule_steps(read(two_steps + "--lr-warmup-fraction 0.25"), 10) == (20, 5)
    assert schedule_steps(read(two_steps + "--lr-decay-iters 8 --lr-warmup-fraction 0.25"), 10) == (8, 2)
    with pytest.raises(UserError, match="--lr-warmup-iters 8 must be shorter than the decay of 8"):
        schedule_steps(read(two_steps + "--lr-decay-iters 8 --lr-warmup-iters 8"), 10)


def test_the_reference_is_where_the_run_began(folders: dict[str, Path]) -> None:
    student = f"--hf-checkpoint {folders['hf']} --load {folders['checkpoint']} "
    assert reference_folder(read(student)) == folders["hf"]
    assert reference_folder(read(student + f"--ref-load {folders['release']}")) == folders["release"] / "release"
    assert reference_folder(read(f"--hf-checkpoint {folders['config_only']}")) is None
    assert [needs_reference(read(line)) for line in ("", "--kl-coef 0.1", "--use-kl-loss")] == [False, True, True]


def test_a_target_beside_the_teacher_names_its_models() -> None:
    """Scale 1 is the teacher and needs no reference; the reference of the KL is not loaded twice."""
    opd = "--use-opd --opd-type sglang --hf-checkpoint start "
    assert (opd_reference_name(read(opd + "--opd-reward-scale 1")), loads_reference(read(opd))) == (None, False)
    for line in ("", "--opd-ref-load start", "--ref-load kept --opd-ref-load ./kept"):
        options = read(f"{opd}--opd-reward-scale 1.25 {line}")
        assert (opd_reference_name(options), loads_reference(options), named_models(options)) == (REFERENCE, True, [])
    other = read(opd + "--opd-reward-scale 1.25 --ref-load kept --opd-ref-load start")
    assert (opd_reference_name(other), loads_reference(other)) == (OPD_REFERENCE, False)
    assert named_models(other) == [(OPD_REFERENCE, "--opd-ref-load", "start")]
