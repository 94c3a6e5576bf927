"""The smoothed curve: a step that measured nothing leaves a hole of its own size, no larger one."""

from __future__ import annotations

import numpy as np
import pytest

from agentlightning.verl.plot import series, smoothed


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_one_null_metric_spoils_no_later_mean(nothing: float | None) -> None:
    lines = [{"training/global_step": step, "x": nothing if step == 2 else float(step)} for step in range(1, 7)]
    _, values = series(lines, "x")
    assert smoothed(values, width=3).tolist() == [1.0, 1.0, 2.0, 3.5, 4.0, 5.0]


def test_where_nothing_was_measured_there_is_no_mean() -> None:
    values = np.array([np.nan, np.nan, 4.0, np.nan, np.nan, 6.0])
    np.testing.assert_array_equal(smoothed(values, width=2), [np.nan, np.nan, 4.0, 4.0, np.nan, 6.0])
    assert smoothed(np.array([]), width=2).tolist() == []
