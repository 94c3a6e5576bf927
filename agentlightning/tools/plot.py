"""`agl plot`: curves of several runs in one picture. Run directories and names of metrics enter; a PNG leaves.

One panel a metric, one colour a run; a triangle on a curve is a place where that run was resumed. `reward.png` is drawn by
each run itself.
"""

from __future__ import annotations

import difflib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agentlightning.checkpoint.files import replace_file
from agentlightning.errors import DataError, UserError
from agentlightning.verl.metrics import SCORE, STEP
from agentlightning.verl.plot import SMOOTHING_STEPS, resumed_at, series, smoothed
from agentlightning.verl.tracking import METRICS_FILE, MetricsFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = (METRICS_FILE,)  # all that is read of a run

# Okabe and Ito's colours, which the colour-blind tell apart as well; further runs get other line styles.
_LETTERS_AN_INCH, _LETTERS_OF_A_HANDLE = 15, 7  # of the legend's type
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_SPARSE = 0.5  # a metric logged at fewer of the steps (a validation) is drawn as points that are joined, and not smoothed


@dataclass(frozen=True, slots=True)
class Curve:
    """What was drawn of one run."""

    run: str  # its name in the legend
    path: str
    steps: int  # the last step it has a line of
    resumed_at: tuple[int, ...]
    metrics: tuple[str, ...]  # those asked for that it has


@dataclass(frozen=True, slots=True)
class Plotted:
    """The picture and what is in it."""

    picture: str
    metrics: tuple[str, ...]
    runs: tuple[Curve, ...]


def plot_runs(roots: Sequence[Path], out: Path, metrics: Sequence[str] = (SCORE,)) -> Plotted:
    """Draw `metrics` of the runs at `roots` to the PNG `out`, at once. UserError if a run or a metric has nothing to draw."""
    if out.suffix.lower() != ".png":
        raise UserError(f"the picture is to be {out}; expected a name that ends in .png")
    if not out.parent.is_dir():
        raise UserError(f"the picture is to be {out}, but {out.parent} is no directory; expected one that exists")
    runs = dict(zip(_names(roots), (_lines(root) for root in roots), strict=True))
    _check_metrics(runs, metrics)
    picture = io.BytesIO()
    _draw(runs, metrics, picture)
    try:
        replace_file(out, picture.getvalue())
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); expected another, -o FILE.png") from error
    curves = [
        Curve(name, str(root), lines[-1][STEP], tuple(resumed_at(lines)), tuple(key for key in metrics if _has(lines, key)))
        for root, (name, lines) in zip(roots, runs.items(), strict=True)
    ]
    return Plotted(str(out), tuple(metrics), tuple(curves))


def _lines(root: Path) -> Sequence[Mapping[str, Any]]:
    lines = MetricsFile(root / METRICS_FILE).lines
    if not lines:
        raise DataError(f"{root} has no finished step in {METRICS_FILE}; expected the directory of a run that has trained")
    return lines


def _names(roots: Sequence[Path]) -> list[str]:
    """The directories' names, with so many parents before them that no two are the same."""
    parts = [root.absolute().resolve().parts for root in roots]
    if repeated := [str(root) for root, count in zip(roots, map(parts.count, parts), strict=True) if count > 1]:
        raise UserError(f"{repeated[0]} was given twice; expected each run once")
    names = ["/".join(part[-1:]) for part in parts]
    for length in range(2, max(map(len, parts)) + 1):
        counts = Counter(names)
        names = [name if counts[name] == 1 else "/".join(part[-length:]) for name, part in zip(names, parts, strict=True)]
    return names


def _has(lines: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(key in line for line in lines)


def _check_metrics(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]) -> None:
    known = sorted({key for lines in runs.values() for line in lines for key in line})
    for metric in metrics:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=3, cutoff=0.4) or known[:3]
            raise UserError(f"no run has the metric {metric}; expected one of {METRICS_FILE}'s, such as {', '.join(near)}")


def _draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str], picture: io.BytesIO) -> None:
    # The object interface alone: pyplot would keep figures alive and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(8 * columns, 4.2 * rows + 0.5), dpi=110, layout="constrained")
    for position, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(rows, columns, position)
        for number, lines in enumerate(runs.values()):
            _draw_curve(axes, lines, metric, number)
        axes.set(xlabel="step", ylabel=metric)
        axes.margins(x=0.01)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=_colour(number), linestyle=_style(number), linewidth=2.2, label=name)
        for number, name in enumerate(runs)
    ]
    if any(resumed_at(lines) for lines in runs.values()):
        handles.append(Line2D([], [], color="#555555", marker="^", linestyle="", markersize=8, label="resumed"))
    longest = max(len(str(handle.get_label())) for handle in handles)
    legend_columns = max(1, min(4, len(handles), int(8 * columns * _LETTERS_AN_INCH) // (longest + _LETTERS_OF_A_HANDLE)))
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=9)
    figure.suptitle(f"lines: mean of the last {SMOOTHING_STEPS} steps", fontsize=9, color="#555555", x=0.99, ha="right")
    FigureCanvasAgg(figure).print_png(picture)


def _draw_curve(axes: Axes, lines: Sequence[Mapping[str, Any]], metric: str, number: int) -> None:
    """One run's curve in one panel, with its marks. Steps whose value was not finite are left out."""
    steps, values = series(lines, metric)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if len(steps) == 0:
        return
    colour, sparse = _colour(number), len(steps) < _SPARSE * len(lines)
    curve = values if sparse else smoothed(values)
    if not sparse:
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1.0)
    marker = "o" if sparse or len(steps) == 1 else None
    axes.plot(steps, curve, color=colour, linestyle=_style(number), linewidth=2.2, marker=marker, markersize=5)
    marks = [step for step in resumed_at(lines) if steps[0] <= step <= steps[-1]]
    heights = np.interp(marks, steps, curve)
    axes.plot(marks, heights, linestyle="", marker="^", markersize=9, color=colour, markeredgecolor="white", zorder=4)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _style(number: int) -> Literal["-", "--", ":", "-."]:
    return _STYLES[number // len(_COLOURS) % len(_STYLES)]
