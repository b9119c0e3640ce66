"""The comparison that ends the quickstart with SGLang servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMPARE = REPOSITORY / "examples" / "on_policy_distillation" / "quickstart-sglang" / "compare.py"
LEARNED = {
    "student_pass@1_before": 0.34,
    "student_pass@1_before_t1": 0.13,
    "student_pass@1_after": 0.81,
    "student_pass@1_after_t1": 0.44,
    "reverse_kl_first": 0.4,
    "reverse_kl_last": 0.18,
    "opd_steps": 60,
    "opd_seconds": 60.0,
}


@pytest.mark.parametrize(
    ("other", "code", "message"),
    [
        ({"student_pass@1_after": 0.75}, 0, ""),
        ({"student_pass@1_after": 0.70}, 1, "student_pass@1_after differs by more than 0.1: 0.810 and 0.700"),
        ({"reverse_kl_last": 0.21}, 1, "local: the reverse KL fell by less than 2x"),
        (None, 2, "has no summary.json"),
    ],
)
def test_two_runs_that_learned_the_same(
    tmp_path: Path, other: dict[str, float] | None, code: int, message: str
) -> None:
    for name, changed in (("servers", {}), ("local", other)):
        (tmp_path / name).mkdir()
        if changed is not None:
            (tmp_path / name / "summary.json").write_text(json.dumps(LEARNED | changed), encoding="utf-8")
    command = [sys.executable, str(COMPARE), "--runs", str(tmp_path / "servers"), str(tmp_path / "local")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert ended.returncode == code, ended.stderr
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == (code > 0)
    if code == 0:
        assert "local   0.750" in ended.stdout
