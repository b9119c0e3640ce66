from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opd_megatron.observe.run_folder import RunFolder, read_metrics
from opd_megatron.system import replacing


def lines_of(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]


def test_one_line_a_step_readable_at_once(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    for step in range(3):
        folder.append_metrics(step, {"reward/mean": step / 2})
        assert lines_of(folder)[-1] == {"step": step, "reward/mean": step / 2}
    assert len(lines_of(folder)) == 3
    assert folder.read_metrics() == lines_of(folder)


def test_values_become_plain_numbers_and_non_finite_ones_null(tmp_path):
    folder = RunFolder(tmp_path)
    metrics = {
        "a": np.float32(0.5),
        "b": torch.tensor(2.5),
        "c": np.int64(7),
        "d": None,
        "e": math.nan,
        "f": torch.tensor(-math.inf),
    }
    folder.append_metrics(4, metrics)
    line = folder.metrics_file.read_text()
    assert json.loads(line) == {
        "step": 4, "a": 0.5, "b": 2.5, "c": 7, "d": None, "e": None, "f": None, "non_finite": ["e", "f"]
    }  # fmt: skip
    assert '"c": 7,' in line


def test_a_value_that_is_no_number_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(TypeError, match="metric train/note is a str"):
        folder.append_metrics(0, {"train/note": "fine"})
    with pytest.raises(ValueError, match="step: reserved"):
        folder.append_metrics(0, {"step": 1})
    assert not folder.metrics_file.exists()


def test_steps_increase_also_over_processes(tmp_path):
    RunFolder(tmp_path).append_metrics(5, {"a": 1})
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="step 5 comes after step 5"):
        folder.append_metrics(5, {"a": 2})
    folder.append_metrics(6, {"a": 2})


def test_truncate_forgets_later_steps_and_a_half_written_line(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(6):
        folder.append_metrics(step, {"a": step})
    with folder.metrics_file.open("a") as stream:
        stream.write('{"step": 6, "a"')
    resumed = RunFolder(tmp_path)
    resumed.truncate_after(3)
    assert [record["step"] for record in lines_of(resumed)] == [0, 1, 2, 3]
    resumed.append_metrics(4, {"a": 40})
    assert lines_of(resumed)[-1] == {"step": 4, "a": 40}


def test_truncate_forgets_samples_of_later_rollouts_and_a_new_start_all_of_them(tmp_path):
    folder = RunFolder(tmp_path)
    for rollout in range(4):
        folder.write_samples(rollout, [{"a": rollout}])
    folder.write_summary({"finished": True})
    for name in ("tensorboard", "plots"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    folder.truncate_after(2)  # step 2 follows rollout 1
    assert sorted(path.name for path in folder.samples.iterdir()) == ["rollout_000000.jsonl", "rollout_000001.jsonl"]
    assert not folder.summary_file.exists()
    assert (tmp_path / "tensorboard" / "old").exists()
    folder.truncate_after(-1)
    assert list(folder.samples.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples"]


@pytest.mark.parametrize("half", ['{"step": 1, "a"', '{"step": 1, "a": 2}'])
def test_append_after_a_crash_does_not_join_lines(tmp_path, half):
    folder = RunFolder(tmp_path)
    folder.append_metrics(0, {"a": 0})
    with folder.metrics_file.open("a") as stream:
        stream.write(half)
    assert [record["step"] for record in read_metrics(folder.metrics_file)] == [0]
    RunFolder(tmp_path).append_metrics(1, {"a": 1})
    assert lines_of(folder) == [{"step": 0, "a": 0}, {"step": 1, "a": 1}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(path)
    path.write_text('{"step": 0}\n[1]\n')
    with pytest.raises(ValueError, match="line 2: not an object"):
        read_metrics(path)


def test_summary_config_and_samples(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config("seed: 1")
    assert folder.config_file.read_text() == "seed: 1\n"
    folder.write_summary({"pass": np.float64(0.5), "bad": math.inf, "path": Path("x"), "steps": [np.int64(3)]})
    assert json.loads(folder.summary_file.read_text()) == {"pass": 0.5, "bad": None, "path": "x", "steps": [3]}
    path = folder.write_samples(12, [{"tokens": np.arange(3), "text": "größe\n"}, {"log_prob": -math.inf}])
    assert path == tmp_path / "samples" / "rollout_000012.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [{"tokens": [0, 1, 2], "text": "größe\n"}, {"log_prob": None}]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with contextlib.suppress(RuntimeError), replacing(path) as stream:
        stream.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_summary({"complete": 1})
    script = """
import os, signal, sys
from opd_megatron.observe.run_folder import RunFolder
def records():
    yield {"a": 1}
    os.kill(os.getpid(), signal.SIGKILL)
folder = RunFolder(sys.argv[1])
folder.write_samples(0, [{"a": 0}])
folder.write_samples(0, records())
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / "samples" / "rollout_000000.jsonl").read_text() == '{"a": 0}\n'
