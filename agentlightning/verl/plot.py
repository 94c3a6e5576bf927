"""reward.png: how the reward went, step by step, and where the run was resumed.

The lines of metrics.jsonl go in, a PNG file comes out. matplotlib is imported by the first picture, not by this module.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentlightning.checkpoint.files import replace_file
from agentlightning.verl.metrics import ATTEMPT, SCORE, STEP, VAL_CORE

SMOOTHING_STEPS = 5
_INK, _FAINT, _VAL, _MARK = "#1f5fa8", "#b9cfe8", "#d1622b", "#8a8a8a"


def draw_reward_curve(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write the picture, at once: a reader never sees half of it. Without a single step there is nothing to draw."""
    steps, scores = series(lines, SCORE)
    if len(steps) == 0:
        return
    # The object interface alone: pyplot would keep figures alive and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, scores, color=_FAINT, linewidth=1.2, label="each step")
    axes.plot(steps, smoothed(scores), color=_INK, linewidth=2.2, label=f"mean of the last {SMOOTHING_STEPS} steps")
    for position, key in enumerate(_core_validation_keys(lines)):
        # Another marker for each further data source, so that the legend tells them apart.
        marker = "osD^vP"[position % 6]
        axes.plot(*series(lines, key), marker, color=_VAL, markersize=6, label=key.removeprefix(VAL_CORE))
    for count, step in enumerate(resumed_at(lines)):
        label = "resumed" if count == 0 else None
        axes.axvline(step - 0.5, color=_MARK, linestyle="--", linewidth=1.2, label=label, zorder=0)
    axes.set(title=title, xlabel="step", ylabel=SCORE)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False, fontsize=9)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    replace_file(path, picture.getvalue())


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and values [N] of a metric, where it was logged."""
    points = [(line[STEP], line[key]) for line in lines if key in line]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=np.float64)


def smoothed(values: np.ndarray, width: int = SMOOTHING_STEPS) -> np.ndarray:
    """Mean of the last `width` values up to each place, or of as many as there are.

    A value that is not finite (a null in the file) counts as not measured; NaN where none of the `width` was.
    """
    measured = np.isfinite(values)
    # Without it one NaN would stay in the running sum, and so in every mean after it.
    sums = np.concatenate([[0.0], np.cumsum(np.where(measured, values, 0.0), dtype=np.float64)])
    counts = np.concatenate([[0], np.cumsum(measured)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    found = counts[ends] - counts[starts]
    return np.where(found > 0, (sums[ends] - sums[starts]) / np.maximum(found, 1), np.nan)


def resumed_at(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """The first step of every further attempt."""
    known = [(line[STEP], line[ATTEMPT]) for line in lines if ATTEMPT in line]
    return [step for (_, before), (step, attempt) in itertools.pairwise(known) if attempt != before]


def _core_validation_keys(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = {key for line in lines for key in line if key.startswith(VAL_CORE) and "/mean@" in key}
    return sorted(keys)
