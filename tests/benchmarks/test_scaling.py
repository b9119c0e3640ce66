"""The benchmark of a step's cost over its sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scaling

TINY = ["--tokens", "64", "--vocabulary", "64", "--hidden", "64", "--repeats", "1"]


def test_it_measures_fits_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([*TINY, "--json", str(tmp_path / "found.json"), "--picture", str(tmp_path / "found.png")])
    printed = capsys.readouterr().out
    curves = json.loads((tmp_path / "found.json").read_text())["curves"]
    for name in ("tokens", "vocabulary", "layers"):
        assert len(curves[name]["points"]) == len(scaling.FACTORS)
        assert f"{name}: the straight line is off by" in printed
    assert (tmp_path / "found.png").stat().st_size > 1000
    # what is kept is exactly proportional to the layers and the tokens, and no logits are among it
    for name in ("tokens", "layers"):
        assert curves[name]["lines"]["kept_mib"]["largest_deviation"] < 0.02
    least, *_, most = curves["vocabulary"]["points"]
    assert most["kept_mib"] - least["kept_mib"] < 0.01


def test_a_bent_curve_is_seen() -> None:
    straight = scaling.straight_line([1, 2, 4, 8], [3, 5, 9, 17])
    assert straight == pytest.approx({"start": 1.0, "slope": 2.0, "largest_deviation": 0.0}, abs=1e-9)
    assert scaling.straight_line([1, 2, 4, 8], [1, 4, 16, 64])["largest_deviation"] > 0.5
