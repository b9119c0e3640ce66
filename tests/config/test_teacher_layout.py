"""The layout of a Megatron teacher: whose it is, and whose flags a fault names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.architecture import architecture_from_hf
from opd_megatron.config.options import Options
from opd_megatron.config.parse import parse_options
from opd_megatron.config.resolve import has_megatron_teacher, has_own_layout, teacher_folder, teacher_parallel
from opd_megatron.config.validate_opd import idle_opd_options, opd_faults
from opd_megatron.config.validate_run import run_faults
from tests.config.inputs import hf_config, write_hf
from tests.config.test_mixture import QWEN3

TP, PP = "--opd-teacher-tensor-model-parallel-size", "--opd-teacher-pipeline-model-parallel-size"
EP, ETP = "--opd-teacher-expert-model-parallel-size", "--opd-teacher-expert-tensor-parallel-size"
SPREAD = "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 "


def read(line: str) -> Options:
    return parse_options(line.split())


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("", False),
        (f"{TP} 1 {PP} 1 {EP} 1 {ETP} 1", False),
        (f"--tensor-model-parallel-size 2 {TP} 2", False),
        (f"--pipeline-model-parallel-size 2 {PP} 2 {TP} 1", False),
        (SPREAD + f"{TP} 2 {EP} 4 {ETP} 1", False),
        (f"--tensor-model-parallel-size 2 {TP} 1", True),
        (f"{PP} 2", True),
        (f"{EP} 2", True),
        (SPREAD + f"{ETP} 2", True),
    ],
)
def test_sizes_decide_whether_the_teacher_has_a_layout_of_its_own(line: str, own: bool) -> None:
    assert has_own_layout(read(line)) == own


def test_experts_are_those_of_a_mixture_alone() -> None:
    dense, mixture = architecture_from_hf(hf_config()), architecture_from_hf(hf_config(**QWEN3))

    def sizes(line: str, model: Any) -> tuple[int, int, int, bool]:
        parallel = teacher_parallel(read(line), model)
        tensor, experts = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        return tensor, experts, parallel.expert_tensor_size, parallel.sequence_parallel

    assert sizes(SPREAD, mixture) == (2, 4, 1, True)
    assert sizes(SPREAD, dense) == (2, 1, 2, False)
    assert sizes(SPREAD + f"{TP} 4 {EP} 1", mixture) == (4, 1, 4, True)
    assert sizes(SPREAD + f"{TP} 1 {EP} 2 {ETP} 2", mixture) == (1, 2, 2, False)
    assert sizes("--num-layers-per-virtual-pipeline-stage 1", dense) == (1, 1, 1, False)


def faults(tmp_path: Path, line: str, teacher: dict[str, Any]) -> list[str]:
    student, folder = tmp_path / "student", tmp_path / "teacher"
    write_hf(student, **QWEN3)
    write_hf(folder, **teacher)
    base = f"--hf-checkpoint {student} --rollout-batch-size 12 --num-rollout 2 --use-opd --opd-type megatron "
    return run_faults(read(base + f"--opd-teacher-load {folder} {line}"))


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (
            f"--actor-num-gpus-per-node 4 {EP} 4",
            {"num_experts": 6},
            f"{EP} 4 does not divide the teacher's 6 experts",
        ),
        (
            "--actor-num-gpus-per-node 4 --expert-model-parallel-size 4",
            {"num_experts": 6},
            f"{EP} 4 (as of the student) does not divide the teacher's 6 experts",
        ),
        (
            f"--actor-num-gpus-per-node 2 {TP} 2",
            {"moe_intermediate_size": 25},
            f"{TP} 2 does not divide the teacher's 25 feed-forward channels of an expert",
        ),
        (
            f"--actor-num-gpus-per-node 4 {EP} 4 {ETP} 2",
            {},
            f"{EP} 4 x {PP} 1 (as of the student) x 2 tensor-parallel ranks of an expert does not divide the 4 ranks",
        ),
        (f"--actor-num-gpus-per-node 2 {TP} 2 {ETP} 1", {}, f"{ETP} 1 is not {TP} 2, which needs {EP} 2"),
        (
            f"--actor-num-gpus-per-node 2 {EP} 2",
            {"model_type": "qwen3"},
            f"{EP} is for a mixture of experts, which the teacher is not: leave it out",
        ),
    ],
)
def test_faults_of_the_teachers_layout_name_its_flags(
    tmp_path: Path, line: str, changes: dict[str, Any], message: str
) -> None:
    found = faults(tmp_path, line, QWEN3 | changes)
    assert any(message in fault for fault in found), found
    assert not any("model's" in fault for fault in found)


def test_layouts_of_a_teacher_that_fit(tmp_path: Path) -> None:
    line = f"--actor-num-gpus-per-node 4 --expert-model-parallel-size 4 {TP} 2 {EP} 4 {ETP} 1"
    assert faults(tmp_path, line, QWEN3) == []


def test_a_recording_needs_no_teacher(tmp_path: Path) -> None:
    """What the command line says of one is refused; what a file says of one has no effect, and is told."""
    recorded = "--use-opd --opd-type megatron --load-debug-rollout-data recorded.jsonl "
    assert opd_faults(read(recorded)) == []
    file = tmp_path / "run.yaml"
    file.write_text("opd:\n  opd_teacher_load: nowhere\n  opd_teacher_tensor_model_parallel_size: 3\n")
    of_file = read(recorded + f"--config {file}")
    assert opd_faults(of_file) == []
    assert idle_opd_options(of_file) == ["opd_teacher_load", "opd_teacher_tensor_model_parallel_size"]
    assert (has_megatron_teacher(of_file), teacher_folder(of_file)) == (False, None)
    assert not any("teacher" in fault for fault in run_faults(of_file))
    (typed,) = opd_faults(read(recorded + f"{PP} 2"))
    assert typed.startswith(f"{PP} has no effect with --load-debug-rollout-data")
