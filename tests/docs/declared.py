"""What README and docs say, and what the programs declare, without importing a program (some import torch)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from opd_megatron.config import options
from opd_megatron.config.flags import collect_flags
from opd_megatron.config.parse import option_groups

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = {path.name: path for path in sorted((ROOT / "tools").glob("*.py"))}

GENERAL = {"--help", "--config"}
"""Every program of ours takes these."""


def code_blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def flag_text(name: str) -> str:
    return "--" + name.replace("_", "-")


def train_flags() -> set[str]:
    return {flag.text for flag in collect_flags(option_groups()).values()} | GENERAL


def _declared_options(group: ast.ClassDef) -> dict[str, bool]:
    """Flags of an option group's declaration, and whether each is required."""
    found = {}
    for item in group.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call)):
            continue
        if getattr(item.value.func, "id", None) == "option" and isinstance(item.target, ast.Name):
            keywords = {keyword.arg: keyword.value for keyword in item.value.keywords}
            required = keywords.get("required")
            found[flag_text(item.target.id)] = isinstance(required, ast.Constant) and required.value is True
    return found


def tool_flags(tool: Path) -> dict[str, bool]:
    """Flags of a tool and whether each is required: its own groups and those of ``train.py`` that it names."""
    tree = ast.parse(tool.read_text(encoding="utf-8"))
    groups = {item.name: item for item in tree.body if isinstance(item, ast.ClassDef)}
    flags: dict[str, bool] = dict.fromkeys(GENERAL, False)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if getattr(call.func, "id", None) != "parse_groups" or not isinstance(call.args[1], ast.Dict):
            continue
        for value in call.args[1].values:
            if isinstance(value, ast.Call) and getattr(value.func, "id", None) == "option_groups":
                flags |= dict.fromkeys(train_flags(), False)
                continue
            name = value.id if isinstance(value, ast.Name) else ""
            if name in groups:
                flags |= _declared_options(groups[name])
            else:
                shared = collect_flags({"shared": getattr(options, name)})
                flags |= {flag.text: bool(flag.metadata["required"]) for flag in shared.values()}
    return flags


def argparse_flags(program: Path) -> set[str]:
    """Flags of a program that uses argparse."""
    tree = ast.parse(program.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    added = [call.args[0] for call in calls if getattr(call.func, "attr", None) == "add_argument" and call.args]
    return {
        first.value
        for first in added
        if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.startswith("--")
    }


def named_tests(file: str) -> set[str]:
    """Names of the test functions of a file below ``tests``; none if there is no such file."""
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def source_texts() -> list[str]:
    """Every string of the package's and the tools' code; an f-string counts as its constant parts."""
    texts = []
    for path in [*(ROOT / "opd_megatron").rglob("*.py"), *TOOLS.values(), ROOT / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts
