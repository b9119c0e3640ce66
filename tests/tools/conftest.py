"""Models of every family as Hugging Face and torch_dist folders, and one start of two ranks for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.tools.models import CASES, token_lines, write_lines, write_model
from tools import convert_hf_to_torch_dist

ROOT = Path(__file__).resolve().parents[2]

LENGTHS = (40, 1, 2, 17, 65, 3, 24)
LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size", "2"),
    "tp2_sp": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "dp2": (),
}


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> Iterator[None]:
    """Threads of a library on small tensors cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Models:
    """Folders by case; ``lines`` are the token ids in ``input``."""

    root: Path
    hf: dict[str, Path]
    torch_dist: dict[str, Path]
    input: dict[str, Path]
    lines: dict[str, list[list[int]]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    hf = {name: write_model(root / "hf" / name, *case) for name, case in CASES.items()}
    torch_dist = {name: root / "torch_dist" / name for name in CASES}
    lines = {name: token_lines(case[2], LENGTHS) for name, case in CASES.items()}
    for name in CASES:
        convert_hf_to_torch_dist.main(["--hf-checkpoint", str(hf[name]), "--save", str(torch_dist[name])])
    inputs = {name: write_lines(root / f"{name}.jsonl", lines[name]) for name in CASES}
    return Models(root, hf, torch_dist, inputs, lines)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine; what they print."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


@pytest.fixture(scope="session")
def two_ranks(models: Models) -> Path:
    """What the tools write on two ranks.

    ``<layout>/<case>_<kind>.jsonl`` are scores, ``<layout>/<case>_torch_dist`` conversions of the Hugging Face folder.
    """
    out = models.root / "two_ranks"
    jobs: list[tuple[str, list[str]]] = []
    for layout, flags in LAYOUTS.items():
        for case in CASES:
            for kind, folder in (("hf", models.hf[case]), ("torch_dist", models.torch_dist[case])):
                target = out / layout / f"{case}_{kind}.jsonl"
                files = ["--load", str(folder), "--input", str(models.input[case]), "--output", str(target)]
                jobs.append(("score", [*files, "--micro-batch-size", "2", *flags]))
            source, target = models.hf[case], out / layout / f"{case}_torch_dist"
            jobs.append(("convert_hf_to_torch_dist", ["--hf-checkpoint", str(source), "--save", str(target), *flags]))
    file = models.root / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = torchrun(ROOT / "tests" / "tools" / "ranks.py", file)
    (models.root / "two_ranks.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out
