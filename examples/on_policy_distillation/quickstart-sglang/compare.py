"""Compare two quickstarts from one start: did the student learn the same? Exit code 1 if not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import RunError, UserError
from opd_megatron.config.parse import parse_groups

LEAST_FALL = 2.0
"""Both students' reverse KL to the teacher falls by this factor."""
LARGEST_GAP = 0.1
"""Their pass rates are this close. Of 512 problems a rate has a standard error of 0.02, a run about as much again."""


@dataclass(frozen=True)
class Arguments:
    """Comparison"""

    runs: tuple[str, ...] = option((), "folders of two quickstarts", metavar="DIR", required=True)


def read_summary(folder: str) -> dict[str, Any]:
    """``summary.json`` of a quickstart; raises ``UserError`` without one."""
    try:
        found: dict[str, Any] = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--runs {folder}: has no summary.json of a finished quickstart") from error
    return found


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The students before and after, side by side."""
    first = next(iter(summaries.values()))
    lines = [f"{'':>16}  {'pass@1':>6}  {'at T=1':>6}  {'reverse KL':>10}  {'steps':>5}  {'s':>5}"]
    lines.append(_line("before", first, "before", "first"))
    for name, found in summaries.items():
        cost = f"  {found['opd_steps']:5}  {found['opd_seconds']:5.0f}"
        lines.append(_line(name, found, "after", "last") + cost)
    return "\n".join(lines)


def _line(name: str, found: dict[str, Any], when: str, kl: str) -> str:
    greedy, sampled = found[f"student_pass@1_{when}"], found[f"student_pass@1_{when}_t1"]
    return f"{name:>16}  {greedy:6.3f}  {sampled:6.3f}  {found[f'reverse_kl_{kl}']:10.4f}"


def main(argv: Sequence[str]) -> None:
    """Print the table, and raise ``RunError`` naming what differs or was not learned."""
    parsed = parse_groups(argv, {"arguments": Arguments}, prog="compare.py", description=str(__doc__))
    summaries = {Path(folder).name: read_summary(folder) for folder in parsed[Arguments].runs}
    if len(summaries) != 2:
        raise UserError("--runs: name two folders that end differently")
    print(table(summaries))
    for name, found in summaries.items():
        if found["reverse_kl_first"] < LEAST_FALL * found["reverse_kl_last"]:
            raise RunError(f"{name}: the reverse KL fell by less than {LEAST_FALL:g}x")
    one, other = summaries.values()
    for key in ("student_pass@1_after", "student_pass@1_after_t1"):
        if abs(one[key] - other[key]) > LARGEST_GAP:
            raise RunError(f"{key} differs by more than {LARGEST_GAP:g}: {one[key]:.3f} and {other[key]:.3f}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
