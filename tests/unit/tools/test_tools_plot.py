"""`agl plot`: several runs in one picture, each resume with its mark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_runs import ACC, write_metrics

from agentlightning.cli import main
from agentlightning.errors import AgentLightningError
from agentlightning.tools.plot import plot_runs

PNG = b"\x89PNG\r\n\x1a\n"


def lines(last: int, resumed_at: tuple[int, ...] = (), shift: float = 0.0) -> list[dict[str, Any]]:
    """A curve that rises, with a validation every tenth step and one step that measured nothing."""
    made: list[dict[str, Any]] = []
    for step in range(1, last + 1):
        line: dict[str, Any] = {
            "training/global_step": step,
            "training/attempt": 1 + sum(step >= place for place in resumed_at),
            "critic/score/mean": None if step == 7 else 1 - math.exp(-step / 30) + shift + 0.05 * math.sin(step * 2.1),
        }
        made.append(line | ({ACC: 1 - math.exp(-step / 25) + shift} if step % 10 == 0 else {}))
    return made


def test_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, resumes in (("a", (20, 41)), ("b", ()), ("seed/a", (33,))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_metrics(tmp_path / name, lines(60, resumes, len(name) / 20))
    runs, out = [str(tmp_path / name) for name in ("a", "b", "seed/a")], tmp_path / "out.png"
    assert main(["plot", *runs, "-o", str(out), "--metric", "critic/score/mean", "--metric", ACC, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in told["runs"]] == [f"{tmp_path.name}/a", "b", "seed/a"]
    assert [run["resumed_at"] for run in told["runs"]] == [[20, 41], [], [33]]
    assert out.read_bytes().startswith(PNG)
    assert main(["plot", *runs, "-o", str(out)]) == 0
    assert "resumed at 20, 41" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out.png", "seed"]


def test_a_run_that_lacks_a_metric_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path / "a", lines(12))
    write_metrics(tmp_path / "b", lines(1))
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "o.png"), "--metric", ACC]) == 0
    assert f"b: 1 steps; has no {ACC}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runs", "out", "metric", "words"),
    [
        (["a"], "o.png", "critic/score/maen", r"no run has the metric critic/score/maen.*critic/score/mean"),
        (["a", "empty"], "o.png", "critic/score/mean", "has no finished step"),
        (["a", "a"], "o.png", "critic/score/mean", "was given twice"),
        (["a"], "o.pdf", "critic/score/mean", r"ends in \.png"),
        (["a"], "no/o.png", "critic/score/mean", "is no directory"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, runs: list[str], out: str, metric: str, words: str) -> None:
    write_metrics(tmp_path / "a", lines(3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AgentLightningError, match=words):
        plot_runs([tmp_path / run for run in runs], tmp_path / out, [metric])
