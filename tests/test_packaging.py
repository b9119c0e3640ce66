"""The promises of the packaging: a light import, pinned versions, a test run that names what failed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normalized(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def requirement_name(requirement: str) -> str:
    return normalized(re.split(r"[\[<>=!~; ]", requirement)[0])


def needed(names: set[str]) -> set[str]:
    """``names`` and everything they need, as far as it is installed (markers and extras decided by that)."""
    seen: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for requirement in importlib.metadata.requires(name) or []:
            other = requirement_name(requirement)
            # Ray puts copies of packages on the path that nobody asked for, so being importable proves nothing.
            marker = Requirement(requirement).marker
            if other in seen or (marker is not None and not marker.evaluate({"extra": ""})):
                continue
            try:
                importlib.metadata.version(other)
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting.add(other)
    return seen


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_import_is_light():
    script = (
        "import sys, opd_megatron, opd_megatron.config.options; print({'torch', 'ray', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_dependency_is_pinned_to_what_is_installed(project):
    pinned = pins()
    direct = {requirement_name(requirement) for requirement in project["dependencies"]}
    for name in sorted(needed(direct)):
        installed = importlib.metadata.version(name).split("+")[0]
        assert pinned.get(name) == installed, f"{name} {installed} in the environment, {pinned.get(name)} pinned"


def test_every_extra_is_pinned(project):
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            assert requirement_name(requirement) in pins(), f"{requirement} of extra {extra}"


def run_parts(*commands: str) -> tuple[int, list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "PARTS_FAILURES"}
    done = subprocess.run(
        [str(ROOT / ".ci" / "parts"), *commands], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, [re.sub(r"\d+ s\)", "N s)", line) for line in done.stdout.splitlines()]


def test_parts_run_all_and_the_last_lines_say_which_failed():
    code, lines = run_parts("echo one", "echo two; exit 3", "echo three")
    assert code == 1
    assert [line for line in lines if not line.startswith("==>")] == ["one", "two", "three"]
    assert lines[-3:] == [
        "==> passed: echo one (N s)",
        "==> FAILED: echo two; exit 3 (exit code 3, N s)",
        "==> passed: echo three (N s)",
    ]
    assert run_parts("true", "true")[0] == 0


def test_failures_inside_a_part_reach_the_last_lines():
    code, lines = run_parts(".ci/parts true 'exit 4'", "true")
    assert code == 1
    assert lines[-3:] == [
        "==> FAILED: .ci/parts true 'exit 4' (exit code 1, N s)",
        "==>     FAILED: exit 4 (exit code 4, N s)",
        "==> passed: true (N s)",
    ]


def test_an_old_python_is_refused_with_what_to_do(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/bash\n[[ $1 == --version ]] && echo "Python 3.9.1" || exit 1\n')
    old.chmod(0o755)
    venv = tmp_path / "venv"
    for python, message in ((str(old), "Python 3.9.1, but Python 3.11"), ("python-nowhere", "is not installed")):
        done = subprocess.run(
            [str(ROOT / "tools" / "setup_venv.sh"), str(venv)],
            env=os.environ | {"PYTHON": python}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert message in done.stderr
        assert "PYTHON=/path/to" in done.stderr
        assert not venv.exists()
