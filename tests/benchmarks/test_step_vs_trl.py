"""The parts of the benchmark against TRL that need no TRL: this project's side, the turns and the summary."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import step_vs_trl as benchmark
from opd_megatron.config.errors import UserError

PROMPTS, NEW_TOKENS = 4, 5


def step(seconds: float, tokens: int = 20) -> benchmark.Step:
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "tokens": tokens, "peak_memory_bytes": 2**20}


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[benchmark.Side]:
    folder = tmp_path_factory.mktemp("step_vs_trl")
    benchmark.write_inputs(folder, benchmark.BenchmarkOptions(prompts=PROMPTS, new_tokens=NEW_TOKENS))
    command = [sys.executable, str(benchmark.HERE / "opd_side.py"), str(folder), "1"]
    side = benchmark.Side("opd_megatron", command, 1, folder / "log")
    yield side
    side.close()


def test_this_projects_side_makes_whole_steps_of_the_asked_length(side: benchmark.Side) -> None:
    assert set(side.answer()["versions"]) == {"torch", "transformers", "megatron-core"}
    steps = benchmark.measure([side], warmup=1, steps=2)["opd_megatron"]
    assert len(steps) == 2
    for found in steps:
        assert found["tokens"] == PROMPTS * NEW_TOKENS
        assert set(found["phases"]) == {"weight sync", "rollout", "teacher", "train"}
        assert min(found["phases"].values()) > 0
        assert sum(found["phases"].values()) <= found["seconds"]
    summary = benchmark.summarize(steps)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens_per_step"] / summary["seconds_per_step"])


def test_a_side_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    dead = benchmark.Side("TRL", command, 1, tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"TRL ended with code 1:\nno such model"):
        dead.answer()
    dead.close()


def test_the_sides_take_turns_at_going_first() -> None:
    order: list[str] = []

    class Counter:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self) -> benchmark.Step:
            order.append(self.name)
            return step(float(len(order)))

    sides: Any = [Counter("a"), Counter("b")]
    found = benchmark.measure(sides, warmup=1, steps=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [item["seconds"] for item in found["a"]] == [4.0, 5.0]
    assert [item["seconds"] for item in found["b"]] == [3.0, 6.0]


def test_the_ratio_is_the_median_over_the_turns() -> None:
    ours, theirs = [step(1.0), step(9.0), step(3.0)], [step(2.0), step(10.0), step(4.0)]
    assert benchmark.median_ratio(ours, theirs, "seconds") == pytest.approx(0.75)
    summary = benchmark.summarize(ours)
    assert summary["seconds_per_step"] == 3.0
    assert summary["seconds_quartiles"] == [1.0, 9.0]
    assert summary["cpu_seconds_per_step"] == 6.0
    assert summary["peak_memory_mib"] == 1.0


def test_steps_of_different_lengths_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="too many values"):
        benchmark.summarize([step(1.0), step(1.0, tokens=19)])


def test_a_missing_environment_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--trl-venv .*pip install -r benchmarks/requirements-trl\.txt"):
        benchmark.main(["--trl-venv", str(tmp_path / "none")])


def test_an_odd_number_of_prompts_is_refused() -> None:
    with pytest.raises(UserError, match=r"--prompts .*even"):
        benchmark.main(["--prompts", "3"])
