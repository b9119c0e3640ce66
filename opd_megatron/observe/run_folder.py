"""The run folder: where a run writes what people and programs read afterwards."""

from __future__ import annotations

import json
import math
import numbers
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opd_megatron.system import replacing

Metric = int | float | None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a ``metrics.jsonl``, in order; nothing if there is no file.

    A last line that a killed run left half written is ignored; any other line that is not a JSON object with a whole
    number ``step`` raises ``ValueError`` with its number.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # what stands after the last newline is empty, or the half of a line
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number}: not an object with a whole number 'step'")
        records.append(record)
    return records


def metric_record(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One line of ``metrics.jsonl`` as a mapping: ``step``, then the metrics as plain numbers.

    Numbers of numpy and torch (one element) become Python numbers. NaN and infinities, which JSON does not have,
    become None and their names are listed under ``non_finite``. Raises ``TypeError`` for a value that is no number,
    ``ValueError`` for a metric that takes one of the two reserved names.
    """
    reserved = {"step", "non_finite"} & metrics.keys()
    if reserved:
        raise ValueError(f"{', '.join(sorted(reserved))}: reserved, no name for a metric")
    record: dict[str, Any] = {"step": int(step)}
    non_finite = []
    for name, value in metrics.items():
        number = _plain_number(name, value)
        if number is not None and not math.isfinite(number):
            non_finite.append(name)
            number = None
        record[name] = number
    if non_finite:
        record["non_finite"] = non_finite
    return record


def _plain_number(name: str, value: Any) -> Metric:
    if hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"metric {name} is a {type(value).__name__}, not a number")


def _json_ready(value: Any) -> Any:
    """``value`` with arrays as lists, unknown objects as text and non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_json_ready(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


class RunFolder:
    """The files of one run under ``path``, which is created.

    ``config.yaml``, ``metrics.jsonl`` (one object a step), ``summary.json``, ``samples/``, ``plots/``,
    ``tensorboard/`` and ``checkpoints/``. Whole files appear under their name only when they are complete.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.samples = self.path / "samples"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self._last_step: int | None = None

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``. The caller leaves secrets out."""
        with replacing(self.config_file) as stream:
            stream.write(text if text.endswith("\n") else text + "\n")

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Add the line of ``step`` (see :func:`metric_record`) to ``metrics.jsonl`` and return it as a mapping.

        The line is on its way to the disk when this returns. Raises ``ValueError`` unless steps increase: a resumed run
        calls :meth:`truncate_after` first.
        """
        record = metric_record(step, metrics)
        if self._last_step is None:
            self._last_step = self._repair()
        if record["step"] <= self._last_step:
            raise ValueError(f"{self.metrics_file}: step {step} comes after step {self._last_step}")
        with self.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, allow_nan=False) + "\n")
        self._last_step = record["step"]
        return record

    def truncate_after(self, step: int) -> None:
        """Forget what an earlier process of the run wrote of later steps; the run writes it anew.

        That is their metrics (and a half-written last line), the samples of their rollouts (step k follows rollout
        k - 1) and the summary; before the first step, ``step`` -1, all TensorBoard events and plots, too.
        """
        kept = [record for record in read_metrics(self.metrics_file) if record["step"] <= step]
        if self.metrics_file.exists():
            self._rewrite(kept)
        self._last_step = max((record["step"] for record in kept), default=-1)
        for path in self.samples.glob("rollout_*.jsonl"):
            if int(path.stem.removeprefix("rollout_")) >= step:
                path.unlink()
        self.summary_file.unlink(missing_ok=True)
        if step < 0:
            for folder in (self.tensorboard, self.plots):
                shutil.rmtree(folder, ignore_errors=True)

    def _repair(self) -> int:
        """Remove a half-written last line, to which the next one would be joined; returns the last step (-1: none)."""
        if not self.metrics_file.exists():
            return -1
        records = read_metrics(self.metrics_file)
        if not self.metrics_file.read_bytes().endswith(b"\n"):
            self._rewrite(records)
        return max((record["step"] for record in records), default=-1)

    def _rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        with replacing(self.metrics_file) as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)

    def read_metrics(self) -> list[dict[str, Any]]:
        """See :func:`read_metrics`."""
        return read_metrics(self.metrics_file)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``; non-finite numbers become null."""
        with replacing(self.summary_file) as stream:
            json.dump(_json_ready(summary), stream, indent=2, ensure_ascii=False, allow_nan=False)
            stream.write("\n")

    def write_samples(self, rollout_id: int, records: Iterable[Mapping[str, Any]]) -> Path:
        """Write one JSON object a line to ``samples/rollout_000012.jsonl`` and return that path."""
        path = self.samples / f"rollout_{rollout_id:06d}.jsonl"
        with replacing(path) as stream:
            for record in records:
                stream.write(json.dumps(_json_ready(record), ensure_ascii=False, allow_nan=False) + "\n")
        return path
