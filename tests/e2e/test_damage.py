"""Weights that are damaged and disks that are full end in one line."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_megatron.config.cli import run_cli
from opd_megatron.config.errors import UserError
from opd_megatron.observe.run_folder import read_metrics
from tests.e2e.processes import ROOT
from tests.e2e.support import base_arguments, make_model, run_training


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("kind", [{}, {"loss_type": "sft_loss", "n_samples_per_prompt": 1, "rm_type": None}])
def test_weights_that_are_no_numbers_are_named(
    prompts: Path, tmp_path: Path, value: float, kind: dict[str, Any]
) -> None:
    folder = make_model(tmp_path / "student", seed=1)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"student: parameter model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"):
        run_training(folder, prompts, tmp_path / "run", **kind)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_in_the_middle_of_a_run_is_one_line(student: Path, prompts: Path, tmp_path: Path) -> None:
    """A limit on the length of a file stands for the disk; its error comes from the same writes."""
    run = tmp_path / "run"
    most = 2 * (student / "model.safetensors").stat().st_size
    arguments = base_arguments(student, prompts, run, num_rollout=2, save_interval=1)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {run / 'checkpoints'} cannot be written (")
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1]


def test_a_full_disk_is_one_line_in_every_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "metrics.jsonl"))

    assert run_cli(main, []) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/metrics.jsonl cannot be written (No space left on device)\n"
