"""The comparison's table says what was reached within the steps it names."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_algorithms

    yield compare_algorithms
    del sys.modules["compare_algorithms"]


def test_a_longer_run_that_is_there_already_is_read_up_to_the_steps_asked_for(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({script.SCORE: float(step)}) + "\n" for step in range(1, 61)))
    assert script._reached(script.CASES[1], tmp_path, 20, 1) == (5.5, 15.5)
