from __future__ import annotations

import json
import math
import sys

import pytest

from opd_megatron.observe.metrics import MetricLogger
from opd_megatron.observe.run_folder import RunFolder


def tensorboard_values(folder: RunFolder, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


def test_both_places_get_the_metrics_and_a_resume_replaces_later_steps(tmp_path):
    folder = RunFolder(tmp_path)
    with MetricLogger(folder) as logger:
        for step in range(5):
            logger.log(step, {"opd/reverse_kl": 1.0 / (step + 1), "gone": math.nan})
    assert tensorboard_values(folder, "opd/reverse_kl") == pytest.approx({step: 1 / (step + 1) for step in range(5)})
    assert tensorboard_values(folder, "gone") == {}
    with MetricLogger(RunFolder(tmp_path), first_step=3) as logger:
        record = logger.log(3, {"opd/reverse_kl": 9.0})
    assert record == {"step": 3, "opd/reverse_kl": 9.0}
    values = {line["step"]: line["opd/reverse_kl"] for line in folder.read_metrics()}
    assert values == pytest.approx({0: 1.0, 1: 0.5, 2: 1 / 3, 3: 9.0})
    assert tensorboard_values(folder, "opd/reverse_kl") == pytest.approx(values)


def test_a_fresh_run_in_an_old_folder_starts_anew(tmp_path):
    for value in (1.0, 2.0):
        with MetricLogger(RunFolder(tmp_path), tensorboard=False) as logger:
            logger.log(0, {"a": value})
    assert RunFolder(tmp_path).read_metrics() == [{"step": 0, "a": 2.0}]
    assert not RunFolder(tmp_path).tensorboard.exists()


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match=r"not installed: pip install 'opd_megatron\[wandb\]'"):
        MetricLogger(RunFolder(tmp_path), tensorboard=False, wandb={"project": "p"})


def test_wandb_needs_its_key_from_the_environment_and_resumes_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = RunFolder(tmp_path)
    with pytest.raises(RuntimeError, match="WANDB_API_KEY"):
        MetricLogger(folder, tensorboard=False, wandb={"project": "p"})
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for first_step in (0, 2, 0):
        with MetricLogger(folder, first_step=first_step, tensorboard=False, wandb={"project": "p"}) as logger:
            logger.log(first_step, {"a": 1.0})
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    assert json.loads(folder.metrics_file.read_text()) == {"step": 0, "a": 1.0}
