"""Small checkpoint folders and prompt files, and the real command line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def hf_config(**changes: Any) -> dict[str, Any]:
    """A config.json as transformers 5 writes it for a tiny Qwen3."""
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    }
    return config | changes


def write_safetensors(file: Path, size: int = 16, name: str = "w") -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def write_hf(folder: Path, weights: bool = True, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(**changes)))
    (folder / "tokenizer.json").write_text("{}")
    if weights:
        write_safetensors(folder / "model.safetensors")
    return folder


def write_step(folder: Path, manifest: bool = True) -> Path:
    """One step of a torch_dist checkpoint: the files' names and sizes, which is all that is looked at."""
    folder.mkdir(parents=True)
    sizes = {".metadata": 10, "metadata.json": 4, "common.pt": 7, "__0_0.distcp": 64}
    for name, size in sizes.items():
        (folder / name).write_bytes(bytes(size))
    if manifest:
        (folder / "opd_megatron.json").write_text(json.dumps({"files": sizes}))
    return folder


def write_torch_dist(folder: Path, steps: Sequence[int | str] = (5, 10), **changes: Any) -> Path:
    for step in steps:
        write_step(folder / (step if isinstance(step, str) else f"iter_{step:07d}"))
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{steps[-1]}\n")
    write_hf(folder / "hf", weights=False, **changes)
    return folder


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.rstrip("\n").rpartition("\n")[2]


def run_train(arguments: Sequence[str], cwd: Path) -> Result:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return Result(done.returncode, done.stdout, done.stderr)
