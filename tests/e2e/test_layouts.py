"""The command line with ranks: a layout of its own for the teacher, a critic, and nothing on the device for no need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from opd_megatron.observe.run_folder import read_metrics
from tests.e2e.support import base_arguments, run_training
from tests.megatron.support import assert_same_tensors

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
AWAY = {"offload_teacher": True, "offload_optimizer": True, "offload_train": True}
TEACHER_SPLIT_OTHERWISE = {
    "actor_num_gpus_per_node": 2,
    "pipeline_model_parallel_size": 2,
    "opd_teacher_tensor_model_parallel_size": 2,
    "opd_teacher_pipeline_model_parallel_size": 1,
}


def test_two_ranks_with_everything_away_are_one_process_with_everything_there(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    """All metrics, and with plain descent the weights, whose change is the sum of the gradients."""
    common: dict[str, Any] = {
        "use_opd": True,
        "opd_type": "megatron",
        "opd_teacher_load": teacher,
        "opd_baseline": "optimal",
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "advantage_estimator": "ppo",
        "lambd": 0.9,
        "rm_type": None,
        "custom_rm_path": "tests.e2e.rewards:count_sevens",
        "optimizer": "sgd",
        "sgd_momentum": 0.5,
        "lr": 1e-2,
        "global_batch_size": 4,
        "num_rollout": 2,
        "make_vocab_size_divisible_by": 4,
    }
    expected = run_training(student, prompts, tmp_path / "one", **common, save_hf=tmp_path / "one_hf")
    flags = common | AWAY | TEACHER_SPLIT_OTHERWISE | {"offload_dir": tmp_path / "away", "save_hf": tmp_path / "two_hf"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *base_arguments(student, prompts, tmp_path / "two", **flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        names = [name for name in mine if name.startswith(("train/", "opd/", "rollout/", "reward/"))]
        assert {"train/grad_norm", "train/kl_loss", "train/value_loss", "opd/reverse_kl_exact"} <= set(names)
        known = [name for name in names if theirs[name] is not None]
        assert {name for name in names if mine[name] is not None} == set(known)
        assert {name: mine[name] for name in known} == pytest.approx(
            {name: theirs[name] for name in known}, rel=1e-4, abs=1e-5
        )
    before = load_file(student / "model.safetensors")
    changes = [
        {name: tensor - before[name] for name, tensor in load_file(tmp_path / folder / "model.safetensors").items()}
        for folder in ("two_hf", "one_hf")
    ]
    assert all(change.abs().max() > 0 for change in changes[1].values())
    assert_same_tensors(changes[0], changes[1], 1e-3)
    assert list((tmp_path / "away").iterdir()) == []
