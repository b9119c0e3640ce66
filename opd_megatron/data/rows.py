"""Rows of a prompt file: JSONL or Parquet, with an optional slice in its name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.system import replacing

SHOWN_FAULTS = 3
"""Bad rows that are spelled out; the others are only counted."""

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\]", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One mapping of the file; ``where`` is its place in words (``data.jsonl, line 3``)."""

    where: str
    fields: Mapping[str, Any]


def split_slice(name: str) -> tuple[str, slice]:
    """Split ``PATH@[a:b]`` into the path and a Python slice (either bound may be missing or negative).

    A name without ``@[`` means the whole file. Raises ``ValueError`` for anything else after ``@[``.
    """
    match = _SLICE.fullmatch(name)
    if match is None:
        if "@[" in name:
            raise ValueError(f"{name}: a slice is written PATH@[a:b] with whole numbers a and b, both optional")
        return name, slice(None)
    start, stop = (None if match[bound] is None else int(match[bound]) for bound in ("start", "stop"))
    return match["path"], slice(start, stop)


def read_rows(name: str) -> tuple[list[Row], list[str]]:
    """Read the rows of ``PATH`` or ``PATH@[a:b]``; a name that ends in ``.parquet`` is Parquet, any other JSONL.

    Returns the rows that could be read and the faults as phrases. Blank lines of a JSONL file are not rows, and lines
    outside the slice are not parsed.
    """
    try:
        path, part = split_slice(name)
    except ValueError as error:
        return [], [str(error)]
    if not Path(path).exists():
        return [], [f"{path}: no such file"]
    if not Path(path).is_file():
        return [], [f"{path}: not a file"]
    rows, faults, total = _read_parquet(path, part) if path.endswith(".parquet") else _read_jsonl(path, part)
    if not rows and not faults:
        faults = [f"{path}: no rows" if total == 0 else f"{name}: the slice is empty (the file has {total} rows)"]
    return rows, faults


def summarize(faults: list[str]) -> list[str]:
    """The first few faults, and how many more there are."""
    hidden = len(faults) - SHOWN_FAULTS
    return faults if hidden <= 0 else [*faults[:SHOWN_FAULTS], f"{hidden} more such rows"]


def _read_jsonl(path: str, part: slice) -> tuple[list[Row], list[str], int]:
    with Path(path).open("rb") as stream:
        lines = [(number, line) for number, line in enumerate(stream, start=1) if line.strip()]
    rows: list[Row] = []
    faults: list[str] = []
    for number, line in lines[part]:
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            faults.append(f"{where}: not JSON ({str(error).splitlines()[0]})")
            continue
        if b"\\u" in line and not _is_unicode(fields):
            faults.append(f"{where}: has half of a character (a \\ud800 to \\udfff alone), which no tokenizer reads")
            continue
        if isinstance(fields, dict):
            rows.append(Row(where, fields))
        else:
            faults.append(f"{where}: not a JSON object")
    return rows, faults, len(lines)


def _is_unicode(value: Any) -> bool:
    """Whether all strings of a JSON value can be written as UTF-8: JSON's escapes can spell half of a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: str, part: slice) -> tuple[list[Row], list[str], int]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return [], [f"{path}: reading Parquet needs pyarrow (pip install pyarrow)"], 0
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        return [], [f"{path}: not a Parquet file ({str(error).splitlines()[0]})"], 0
    start, stop, _ = part.indices(table.num_rows)
    values = table.slice(start, max(0, stop - start)).to_pylist()
    rows = [Row(f"{path}, row {number}", value) for number, value in enumerate(values, start=start + 1)]
    return rows, [], table.num_rows


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line through a temporary name, so that the file is never half written."""
    with replacing(Path(path)) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
