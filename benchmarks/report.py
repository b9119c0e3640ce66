"""What the benchmarks do around their measurement: the command line, the printed tables and the files."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opd_megatron.config.declare import option
from opd_megatron.config.parse import parse_groups


@dataclass(frozen=True)
class Output:
    """Options of a benchmark whose numbers can be kept."""

    json: str | None = option(None, "also write the result here", metavar="FILE")


@dataclass(frozen=True)
class DrawnOutput(Output):
    """Options of a benchmark whose numbers can be drawn as well."""

    picture: str | None = option(None, "also draw it here", metavar="FILE")


Options = TypeVar("Options", bound=Output)
Result = dict[str, Any]


def publish(
    argv: Sequence[str],
    kind: type[Options],
    *,
    program: str,
    about: str,
    run: Callable[[Options], Result],
    render: Callable[[Result], str],
    draw: Callable[[Result, Path], None] | None = None,
) -> None:
    """Run a benchmark with the options ``kind`` of a command line and print its result; write the files asked for.

    ``about`` is the program's docstring, whose first paragraph is its help. A ``kind`` with ``--picture`` has ``draw``.
    """
    description = about.split("\n\n")[0]
    options = parse_groups(argv, {"benchmark": kind}, prog=program, description=description)[kind]
    result = run(options)
    print(render(result))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if draw is not None and isinstance(options, DrawnOutput) and options.picture is not None:
        draw(result, Path(options.picture))


def processor() -> str:
    """The processor's name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
