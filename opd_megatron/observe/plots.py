"""Pictures of a run, drawn from its ``metrics.jsonl``.

A metric ``name`` gets a band of plus and minus one standard error where ``name_se`` is logged beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.observe.run_folder import read_metrics
from opd_megatron.system import replacing

COLORS = ("#1f6fb4", "#d1552c", "#3a923a", "#8456a8", "#b8860b", "#c44e8a")
GREY = "#6b6b6b"
PASS_AT_1 = re.compile(r"eval/(?P<set>.+)/pass@1")
REVERSE_KL = {"opd/reverse_kl": "sampled", "opd/reverse_kl_exact": "exact"}
SMALLEST_KL = 1e-6
"""The logarithmic axis never goes below this; the sampled estimate can be negative."""


@dataclass(frozen=True)
class Series:
    """A metric over the steps at which it was logged; ``errors`` are standard errors, nan where there is none."""

    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float]


def read_series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The values of one metric, without the steps where it is missing or null."""
    found = [record for record in records if record.get(name) is not None]
    errors = [record.get(f"{name}_se") for record in found]
    return Series(
        [record["step"] for record in found],
        [record[name] for record in found],
        [float("nan") if error is None else error for error in errors],
    )


def plot_run(metrics_file: str | Path, folder: str | Path) -> list[Path]:
    """Draw ``pass_at_1.png`` (one line an evaluation set) and ``reverse_kl.png`` into ``folder``.

    Returns the paths written; a picture without data is not written.
    """
    records = read_metrics(metrics_file)
    written = []
    names = {name for record in records for name in record}
    sets = sorted(match["set"] for name in names if (match := PASS_AT_1.fullmatch(name)))
    passes = {name: read_series(records, f"eval/{name}/pass@1") for name in sets}
    if any(series.steps for series in passes.values()):
        figure, (axes,) = _figure(1)
        _draw_pass(axes, passes)
        written.append(_save(figure, Path(folder) / "pass_at_1.png"))
    kls = {label: read_series(records, name) for name, label in REVERSE_KL.items()}
    if any(series.steps for series in kls.values()):
        figure, (axes,) = _figure(1)
        _draw_reverse_kl(axes, kls)
        written.append(_save(figure, Path(folder) / "reverse_kl.png"))
    return written


def plot_quickstart(
    metrics_file: str | Path, picture: str | Path, *, eval_set: str, teacher: float, student_before: float
) -> Path:
    """Draw what the student learned: its pass@1 between where it started and its teacher, and the reverse KL.

    ``teacher`` and ``student_before`` are pass@1 values in [0, 1] that appear as horizontal lines. Raises
    ``ValueError`` if the run never logged ``eval/<eval_set>/pass@1``.
    """
    records = read_metrics(metrics_file)
    student = read_series(records, f"eval/{eval_set}/pass@1")
    if not student.steps:
        raise ValueError(f"{metrics_file}: no eval/{eval_set}/pass@1 to draw")
    figure, (left, right) = _figure(2)
    _draw_pass(left, {"student": student})
    left.axhline(teacher, color=GREY, linestyle=(0, (6, 3)), linewidth=1.4, label=f"teacher ({teacher:.3f})", zorder=1)
    left.axhline(
        student_before,
        color=GREY,
        linestyle=(0, (1, 2)),
        linewidth=1.6,
        label=f"student before ({student_before:.3f})",
        zorder=1,
    )
    left.legend(loc="lower right")
    left.set_title("The student learns from its teacher", loc="left")
    _draw_reverse_kl(right, {label: read_series(records, name) for name, label in REVERSE_KL.items()})
    right.set_title("and comes close to its distribution", loc="left")
    return _save(figure, Path(picture))


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    """A figure without pyplot's global state, so that drawing is safe in any thread and needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * panels, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("step (rollouts)")
    return figure, all_axes


def _draw_series(axes: Any, series: Series, label: str, color: str, *, marker: bool, width: float = 1.8) -> None:
    import numpy as np

    values, errors = np.asarray(series.values, dtype=float), np.asarray(series.errors, dtype=float)
    if np.isfinite(errors).any():
        axes.fill_between(series.steps, values - errors, values + errors, color=color, alpha=0.18, linewidth=0)
    marker = marker or len(series.steps) == 1
    axes.plot(
        series.steps,
        values,
        label=label,
        color=color,
        linewidth=width,
        marker="o" if marker else None,
        markersize=4.5,
    )


def _draw_pass(axes: Any, by_label: Mapping[str, Series]) -> None:
    drawn = [(label, series) for label, series in by_label.items() if series.steps]
    for place, (label, series) in enumerate(drawn):
        _draw_series(axes, series, label, COLORS[place % len(COLORS)], marker=len(series.steps) <= 60)
    axes.set_ylim(-0.02, 1.04)
    axes.set_ylabel("pass@1 (fraction of problems solved)")
    axes.legend(loc="best")


def _draw_reverse_kl(axes: Any, by_label: Mapping[str, Series]) -> None:
    import numpy as np

    axes.set_ylabel("reverse KL(student || teacher) (nats per token)")
    drawn = [(label, series) for label, series in by_label.items() if series.steps]
    for place, (label, series) in enumerate(drawn):
        # the exact value, drawn last, is the smoother one
        _draw_series(axes, series, label, COLORS[place], marker=False, width=1.0 if place + 1 < len(drawn) else 1.8)
    positive = [value for _, series in drawn for value in series.values if value > 0]
    if positive:
        axes.set_yscale("log", nonpositive="clip")
        # a few estimates near zero would otherwise take most of the axis
        low, high = float(np.quantile(positive, 0.05)), max(positive)
        axes.set_ylim(max(SMALLEST_KL, 0.4 * low), 1.6 * max(high, SMALLEST_KL))
    if drawn:
        axes.legend(loc="upper right")


def _save(figure: Any, path: Path) -> Path:
    with replacing(path, "wb") as stream:
        figure.savefig(stream, format="png")
    return path
