"""Stands in the sandbox for the programs that the documentation calls, and checks how it calls them.

``train.py`` runs with ``--dry-run``. Of the tools the flags, what is required and what is read are checked; they run in
tests of their own. What would install, download or take minutes is checked as far as that goes without doing it.
Exit code 0 if the call is good; a call that nobody has thought of is not.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def check_tool(words: list[str]) -> str | None:
    from tests.docs.declared import tool_flags

    if not Path(words[0]).is_file():
        return f"{words[0]} does not exist"
    flags = tool_flags(Path(words[0]))
    used = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    unknown = [flag for flag in used if flag not in flags]
    missing = [flag for flag, required in flags.items() if required and flag not in used]
    absent = [
        value
        for flag, value in itertools.pairwise(words)
        if flag in ("--load", "--hf-checkpoint", "--input") and not Path(value).exists()
    ]
    return f"unknown {unknown}, missing {missing}, not there {absent}" if unknown or missing or absent else None


def check_pip(words: list[str]) -> str | None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = [f".[{name}]" for name in project["optional-dependencies"]]
    expected = [["-e", target, "-c", "constraints.txt"] for target in (".", *extras)]
    return None if words in expected else f"one of {expected} expected"


def check(name: str, words: list[str]) -> str | None:
    """What is wrong with the call, None if nothing is."""
    match name, words:
        case ("python", ["train.py", *arguments]):
            if "--dry-run" not in arguments:
                arguments.append("--dry-run")
            done = subprocess.run([sys.executable, "train.py", *arguments], stdout=subprocess.DEVNULL, check=False)
            return f"exit code {done.returncode}" if done.returncode else None
        case ("python", [tool, *_]) if tool.startswith("tools/"):
            return check_tool(words)
        case ("torchrun", ["--nproc-per-node", count, *rest]) if count.isdecimal():
            return check_tool(rest)
        case ("python3", ["-m", "venv", _]):
            return None
        case ("python", ["-m", "pip", "install", *rest]):
            return check_pip(rest)
        case ("hf", ["download", _, "--local-dir", _]):
            return None
        case ("make", _):
            environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
            command = ["/usr/bin/env", "make", "--dry-run", *words]
            environment["PATH"] = os.environ["PATH_OF_THE_MACHINE"]
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
            return f"exit code {done.returncode}" if done.returncode else None
    return "no rule for this call: write one in tests/docs/shim.py"


if __name__ == "__main__":
    _name, _words = sys.argv[1], sys.argv[2:]
    _fault = check(_name, _words)
    if _fault:
        print(f"{_name} {' '.join(_words)}: {_fault}", file=sys.stderr)
    raise SystemExit(1 if _fault else 0)
