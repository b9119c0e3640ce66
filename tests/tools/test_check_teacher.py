"""tools/check_teacher.py as far as it goes without a server; tests/sglang has the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opd_megatron.config.cli import run_cli
from opd_megatron.config.errors import UserError
from opd_megatron.system import free_port
from opd_megatron.teacher.preflight import Finding
from tests.tools.models import reference_log_probs, write_model
from tools import check_teacher


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(check_teacher.main, []) == 2
    error = capsys.readouterr().err
    assert "--opd-teacher-url is missing" in error
    assert "--hf-checkpoint is missing" in error
    assert run_cli(check_teacher.main, ["--opd-type", "megatron", "--hf-checkpoint", "x"]) == 2
    assert "a teacher in the trainer is checked by the run itself" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "student")
    capsys.readouterr()
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ["--opd-teacher-url", url, "--hf-checkpoint", str(folder), "--opd-teacher-max-retries", "0"]
    assert run_cli(check_teacher.main, arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: teacher server {url}: GET /model_info: connection failed (")
    assert "start the server" in captured.err
    assert captured.err.count("\n") == 1


def test_the_students_log_probs_are_those_of_its_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "student")
    texts = [np.arange(3, 20), np.array([5, 4, 3, 2])]
    found = check_teacher._load_student(folder)(texts)
    expected = reference_log_probs(folder, [text.tolist() for text in texts])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"--with-student: .* has no weights"):
        check_teacher._load_student(folder)


def test_the_report_is_a_table_with_the_warnings_marked() -> None:
    findings = [Finding("server", "fine"), Finding("chat template", "another", warning=True)]
    assert check_teacher.report(findings).splitlines() == [
        "ok       server         fine",
        "warning  chat template  another",
        "2 findings, 1 of them warnings",
    ]
