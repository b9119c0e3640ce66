"""The example of docs/memory.md prints what the page shows."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.config.inputs import write_hf
from tests.docs.declared import ROOT, code_blocks
from tests.docs.test_readme_commands import published
from tools import estimate_memory


def test_the_example_prints_the_table_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "memory.md"
    for name in ("Qwen3-8B", "Qwen3-32B"):
        write_hf(tmp_path / "models" / name, weights=False, **published(f"Qwen/{name}"))
    monkeypatch.chdir(tmp_path)
    program, tool, *arguments = shlex.split(code_blocks(page, "bash")[0].replace("\\\n", " "))
    assert (program, tool) == ("python", "tools/estimate_memory.py")
    estimate_memory.main(arguments)
    assert capsys.readouterr().out.rstrip() == code_blocks(page, "text")[0].rstrip()
