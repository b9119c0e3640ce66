from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from opd_megatron.observe.plots import plot_quickstart, plot_run, read_series
from opd_megatron.observe.run_folder import RunFolder


def ink(path: Path) -> float:
    """Fraction of pixels that are not white."""
    return float((imread(path)[..., :3] < 0.99).any(axis=-1).mean())


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    rng = np.random.default_rng(0)
    for step in range(40):
        metrics = {}
        if step:
            metrics["opd/reverse_kl"] = 0.4 * np.exp(-step / 10) + 0.02 * rng.normal()
            metrics["opd/reverse_kl_se"] = 0.02
            metrics["opd/reverse_kl_exact"] = 0.4 * np.exp(-step / 10)
        if step % 10 == 0:
            metrics |= {"eval/held/out/pass@1": step / 50, "eval/held/out/pass@1_se": 0.05, "eval/other/pass@1": 0.5}
            metrics["eval/other/pass@4"] = 0.9
        folder.append_metrics(step, metrics)
    return folder


def test_series_skip_missing_and_null_values(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics(0, {"a": 1.0, "a_se": 0.1})
    folder.append_metrics(1, {"a": float("nan")})
    folder.append_metrics(2, {"b": 1.0})
    folder.append_metrics(3, {"a": 2.0})
    series = read_series(folder.read_metrics(), "a")
    assert (series.steps, series.values) == ([0, 3], [1.0, 2.0])
    np.testing.assert_equal(series.errors, [0.1, np.nan])


def test_both_pictures_of_a_run(folder):
    written = plot_run(folder.metrics_file, folder.plots)
    assert [path.name for path in written] == ["pass_at_1.png", "reverse_kl.png"]
    assert all(ink(path) > 0.02 for path in written)
    assert sorted(path.name for path in folder.plots.iterdir()) == ["pass_at_1.png", "reverse_kl.png"]


def test_every_evaluation_set_is_a_line_with_its_own_colour(folder):
    path = plot_run(folder.metrics_file, folder.plots)[0]
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for color in ((0x1F, 0x6F, 0xB4), (0xD1, 0x55, 0x2C)):
        assert (np.abs(pixels - color).max(axis=1) < 3).sum() > 200


def test_a_picture_without_data_is_not_drawn(tmp_path):
    folder = RunFolder(tmp_path)
    assert plot_run(folder.metrics_file, folder.plots) == []
    folder.append_metrics(0, {"opd/reverse_kl": -0.01})
    assert [path.name for path in plot_run(folder.metrics_file, folder.plots)] == ["reverse_kl.png"]


def test_quickstart_picture(folder):
    picture = folder.plots / "learning.png"
    written = plot_quickstart(folder.metrics_file, picture, eval_set="held/out", teacher=0.99, student_before=0.3)
    assert written == picture
    assert ink(picture) > 0.02
    height, width = imread(picture).shape[:2]
    assert width > 2 * height
    with pytest.raises(ValueError, match="no eval/absent/pass@1"):
        plot_quickstart(folder.metrics_file, picture, eval_set="absent", teacher=0.99, student_before=0.3)
