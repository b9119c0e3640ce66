"""The benchmarks of the vocabulary head at a small size, and the memory that they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import vocab_head as benchmark
from benchmarks.gpu import vocab_head as gpu_benchmark
from opd_megatron.megatron import cpu_products
from opd_megatron.megatron.vocab_head import shard

SMALL = "--vocab-size 200 --hidden-sizes 8 --tokens 20 --repetitions 1 --threads 1 --curve-hidden-size 4"


@pytest.mark.parametrize("name", benchmark.PATHS)
def test_both_paths_compute_the_same(name: str) -> None:
    problem = benchmark.make_problem(12, 8, 100)
    found = []
    for path in benchmark.PATHS[name]:
        loss = path(problem)
        found.append([loss, *torch.autograd.grad(loss, (problem.hidden_Nh, problem.weight_Vh))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in benchmark.PATHS if "KL" not in name])
def test_extra_memory_is_below_three_chunks_and_does_not_grow_with_tokens(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # as in a run: these products have copies of their own
    cpu_products.install()
    vocab_size, chunk = 4000, 64
    monkeypatch.setattr(shard, "CHUNK_ELEMENTS", {"cpu": chunk * vocab_size})
    monkeypatch.setattr(shard, "LEAST_CHUNK_TOKENS", 1)
    monkeypatch.setattr(shard, "BLOCK_ELEMENTS", {"cpu": 4 * vocab_size})
    # bytes of a token's statistics, and with a record of as many numbers as it has ids a few times over
    kept = 4 * (16 + (8 * benchmark.TOP_K if "record" in name else 0))
    used = {}
    for tokens in (128, 512):
        problem = benchmark.make_problem(tokens, 8, vocab_size)
        path = benchmark.PATHS[name][1]
        benchmark.passes(path, problem)
        _, used[tokens] = benchmark.measured(path, problem)
        assert used[tokens] <= 3 * 4 * chunk * vocab_size + kept * tokens
    assert used[512] - used[128] <= kept * (512 - 128)


def test_the_benchmark_writes_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = " --curve-vocab-sizes 100 300 --curve-tokens 10 20"
    files = f" --json {tmp_path / 'found.json'} --picture {tmp_path / 'found.png'}"
    benchmark.main((SMALL + curves + files).split())
    result = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [row["objective"] for row in result["ratios"]] == list(benchmark.PATHS)
    assert [(point["vocab_size"], point["tokens"]) for point in result["curves"]] == [
        (100, 10),
        (100, 20),
        (300, 10),
        (300, 20),
    ]
    assert all(row["time_ratio"] > 0 for row in result["ratios"])
    assert (tmp_path / "found.png").stat().st_size > 0
    assert "| log-probability | 8 |" in capsys.readouterr().out


def test_a_plain_path_that_does_not_fit_is_left_out() -> None:
    options = benchmark.BenchmarkOptions(curve_hidden_size=4, curve_tokens=(10, 1000), plain_limit_gib=1e-3)
    small, large = benchmark.curve(100, options)
    assert "plain" in small
    assert "plain" not in large
    assert large["chunked"]["seconds"] > 0


def test_the_gpu_benchmark_runs_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    size = {"device": "cpu", "tokens": 10, "hidden-size": 4, "vocab-size": 50, "repetitions": 1}
    gpu_benchmark.main([part for name, value in size.items() for part in (f"--{name}", str(value))])
    output = capsys.readouterr().out
    for name in ("log-probability", "reverse KL", "JSD 0.5"):
        assert f"| {name} |" in output
