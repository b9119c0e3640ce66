"""A run that is killed around a checkpoint, and one that begins anew in the folder of a killed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_megatron import loop
from opd_megatron.assembly import Parts
from opd_megatron.observe.run_folder import read_metrics
from tests.e2e.support import run_training


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("moment", ["before the checkpoint", "after the checkpoint"])
def test_a_resumed_run_has_one_line_a_step_wherever_it_was_killed(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save = loop.save

    def die(parts: Parts, step: int) -> None:
        if moment == "after the checkpoint" or step == 1:
            save(parts, step)
        if step == 2:
            raise Killed

    run = tmp_path / "run"
    common: dict[str, Any] = {"save_interval": 1, "load": run / "checkpoints"}
    monkeypatch.setattr(loop, "save", die)
    with pytest.raises(Killed):
        run_training(student, prompts, run, **common)
    monkeypatch.undo()
    lines = run_training(student, prompts, run, **common)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all("train/loss" in line for line in lines)


def test_a_run_that_begins_anew_leaves_nothing_of_the_one_before(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def die(parts: Parts, step: int) -> None:
        raise Killed

    run = tmp_path / "run"
    common: dict[str, Any] = {"load": run / "checkpoints", "no_tensorboard": None}
    monkeypatch.setattr(loop, "save", die)
    with pytest.raises(Killed):
        run_training(student, prompts, run, **common, num_rollout=3)
    monkeypatch.undo()
    assert len(read_metrics(run / "metrics.jsonl")) == 3
    (run / "summary.json").write_text(json.dumps({"rollouts": 3}))
    run_training(student, prompts, run, **common, num_rollout=1)
    assert [path.name for path in (run / "samples").iterdir()] == ["rollout_000000.jsonl"]
    assert json.loads((run / "summary.json").read_text())["rollouts"] == 1
    (events,) = (run / "tensorboard").iterdir()
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == [1]
