"""Converting takes the memory of a few tensors, however large the model is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from opd_megatron.config.architecture import architecture_from_hf, read_hf_config
from opd_megatron.megatron.hf_weights import HFWeights, write_hf_weights
from opd_megatron.megatron.weight_map import parameter_maps
from tests.rollout.models import character_tokenizer, tiny_config

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 12
MULTIPLE = 10
"""Tensors of the largest size that a conversion may have in memory. The model is four times that."""


def write_large(folder: Path) -> tuple[int, int]:
    """A model of many layers in several files; bytes of its largest tensor and of all."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": LAYERS, "vocab_size": 300}
    tiny_config("qwen2", **sizes, tie_word_embeddings=False).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    architecture = architecture_from_hf(read_hf_config(folder))
    rows = parameter_maps(architecture, architecture.vocab_size)
    shapes = {name: shape for row in rows for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)}
    generator = torch.Generator().manual_seed(0)
    write_hf_weights(
        ((name, torch.rand(shape, generator=generator)) for name, shape in shapes.items()),
        folder,
        shard_bytes=100_000_000,
    )
    bytes_of = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    return max(bytes_of), sum(bytes_of)


def test_neither_direction_holds_the_model(tmp_path: Path) -> None:
    largest, total = write_large(tmp_path / "large")
    assert total > 4 * MULTIPLE * largest
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 3
    tiny = tmp_path / "tiny"
    config = tiny_config("qwen2", tie_word_embeddings=False)
    config.save_pretrained(tiny)
    character_tokenizer().save_pretrained(tiny)
    architecture = architecture_from_hf(read_hf_config(tiny))
    rows = parameter_maps(architecture, architecture.vocab_size)
    write_hf_weights(
        ((name, torch.ones(shape)) for row in rows for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)),
        tiny,
    )
    jobs: list[tuple[str, list[str]]] = []
    for name in ("tiny", "large"):
        source, torch_dist, back = (str(tmp_path / part) for part in (name, f"{name}_td", f"{name}_back"))
        jobs.append(("convert_hf_to_torch_dist", ["--hf-checkpoint", source, "--save", torch_dist]))
        jobs.append(("convert_torch_dist_to_hf", ["--load", torch_dist, "--save", back]))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "tools" / "peak_memory.py"), str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, to_torch_dist, to_hf = json.loads(done.stdout.splitlines()[-1])
    assert to_torch_dist < MULTIPLE * largest, f"{to_torch_dist / largest:.1f} times the largest tensor"
    assert to_hf < MULTIPLE * largest, f"{to_hf / largest:.1f} times the largest tensor"
    before, after = HFWeights(tmp_path / "large"), HFWeights(tmp_path / "large_back")
    assert before.headers() == after.headers()
    for name in before.files:
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    with safe_open(tmp_path / "large_back" / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
