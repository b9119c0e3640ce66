"""Messages that the code can give, read from its source: what is raised, warned of, or returned as a fault."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

VARIES = "..."
"""Stands for what is filled in."""
_RAISED = {
    "UserError", "RunError", "TeacherError", "TeacherFailure", "AnswerError", "UnusableAnswerError", "HttpError",
    "BrokenWeightsError", "failure", "_unscorable",
}  # fmt: skip
"""Exceptions, and the functions that make one of a reason."""
_FAULTS = ("str | None", "list[str]")
"""Functions that return one of these return faults or warnings."""
_LEAST_WORDS = 3
"""A text of fewer words only joins others that are messages themselves."""


Assigned = dict[str, list[ast.expr]]
"""What a function assigns to each name."""


def text_of(node: ast.AST, assigned: Assigned) -> str | None:
    """The text of a string or an f-string with :data:`VARIES` for its values; None for anything else.

    A value that is a name for a text stands for that text.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d)?[sdf]", VARIES, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, assigned) or VARIES for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        (source, *others) = assigned.get(node.value.id) or [None]
        return text_of(source, {}) if isinstance(source, ast.JoinedStr) and not others else None
    return None


def _told(node: ast.AST) -> list[ast.expr]:
    """The expressions of ``node`` that are messages."""
    if not isinstance(node, ast.Call):
        return []
    name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
    if name in ("warning", "error") or name in _RAISED:
        return node.args
    warns = name == "Finding" and any(keyword.arg == "warning" for keyword in node.keywords)
    return node.args[1:2] if warns else []


def _returned(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.expr]:
    if function.returns is None or ast.unparse(function.returns) not in _FAULTS:
        return
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            yield from node.value.elts if isinstance(node.value, ast.List) else [node.value]


def messages(path: Path) -> list[str]:
    """The messages of a module. A name that stands for one is followed to the assignments of its function."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        assigned: Assigned = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned.setdefault(node.targets[0].id, []).append(node.value)
        expressions = [told for node in ast.walk(function) for told in _told(node)] + list(_returned(function))
        for expression in expressions:
            sources = assigned.get(expression.id, []) if isinstance(expression, ast.Name) else [expression]
            texts = [text_of(source, assigned) for source in sources]
            found += [text for text in texts if text and _words(text) >= _LEAST_WORDS]
    return list(dict.fromkeys(found))


def _words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


def says(message: str, entry: str) -> bool:
    """Whether the fragments of ``entry``, between :data:`VARIES`, stand in ``message`` in this order."""
    place = 0
    for fragment in (part.strip() for part in entry.split(VARIES)):
        place = message.find(fragment, place)
        if place < 0:
            return False
        place += len(fragment)
    return True
