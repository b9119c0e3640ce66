"""The benchmark of the objectives on random models: its files, what it does not run again, its flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import objectives
from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from opd_megatron.data.column_arithmetic import sample_problems
from opd_megatron.data.rows import write_jsonl
from tests.e2e.support import make_model


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """What a finished quickstart leaves behind, with random weights."""
    folder = tmp_path / "models-7"
    make_model(folder / objectives.TEACHER, seed=1, hidden=48)
    make_model(folder / objectives.STUDENT, seed=2)
    problems = [{"prompt": p.prompt(), "label": p.answer()} for p in sample_problems(48, 3, held_out=False)]
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "prompts.jsonl", problems[:32])
    write_jsonl(folder / "data" / "dev.jsonl", problems[32:40])
    write_jsonl(folder / "heldout.jsonl", problems[40:])
    return folder


def test_rows_are_measured_drawn_and_not_run_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--models", str(models.with_name("models-{seed}")), "--seeds", "7"]
    sizes = ["--samples", "8", "--steps", "2"]
    objectives.main([*arguments, *sizes, "--only", "full"])
    found = json.loads((out / "objectives.json").read_text())["rows"]["full"]["7"]
    assert 0 <= found["greedy"] <= 1
    assert found["reverse_kl"] > 0
    assert [step for step, _ in found["curve"]] == [0, 1, 2]
    assert (out / "objectives.png").stat().st_size > 1000
    assert "| distribution, whole vocabulary |" in capsys.readouterr().out

    begun: list[object] = []
    monkeypatch.setattr(objectives, "child", lambda command, log: begun.append(command))
    objectives.main([*arguments, *sizes, "--only", "full"])
    assert not begun
    with pytest.raises(
        UserError, match="no such folder"
    ):  # another length: the child, which does nothing here, is asked
        objectives.main([*arguments, "--samples", "8", "--steps", "3", "--only", "full"])
    assert len(begun) == 1


def test_teacher_samples_are_as_many_as_a_row_has(models: Path, tmp_path: Path) -> None:
    options = objectives.BenchmarkOptions(out=str(tmp_path), steps=2, samples=8, models=str(models))
    path, _ = objectives.teacher_samples(options, objectives.start_of(options, 7))
    lines = path.read_text().splitlines()
    assert len(lines) <= 16
    assert all({"prompt", "response", "label"} <= json.loads(line).keys() for line in lines)


@pytest.mark.parametrize("name", objectives.ROWS)
def test_every_row_is_a_command_line_of_the_trainer(name: str, tmp_path: Path) -> None:
    options = objectives.BenchmarkOptions(out=str(tmp_path))
    start = objectives.Start(1, tmp_path, [])
    command = objectives.train_command(options, objectives.ROWS[name], start, tmp_path / "run", tmp_path / "data")
    parsed = parse_options(command[2:])
    assert parsed.samples_per_rollout == options.samples
    assert parsed.opd.use_opd == ("opd_teacher_load" in parsed.given)


def test_an_unknown_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only fulll: is no row: there are grpo"):
        objectives.main(["--out", str(tmp_path), "--only", "fulll"])
