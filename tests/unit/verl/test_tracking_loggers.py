"""What is common to the loggers: how they start, what their failures do, and W&B's tables."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentlightning.errors import ConfigError
from agentlightning.verl import loggers as loggers_module
from agentlightning.verl import tracking_wandb
from agentlightning.verl.loggers import SteadyLogger, check_installed
from agentlightning.verl.metrics import SCORE, STEP
from agentlightning.verl.tracking import Tracking
from agentlightning.verl.tracking_samples import GenerationSample
from agentlightning.verl.tracking_service import LoggerError, RunInfo

SAMPLE = GenerationSample("2+2?", "4", "4", 1.0, "sums")


class FakeLogger:
    """A service that has what it was given, while `down` is None."""

    run_id, url = "id", None

    def __init__(self, last_step: int = -1) -> None:
        self.last_step, self.down = last_step, None
        self.calls: list[tuple[str, int]] = []

    def resume(self, held: int) -> None:
        self._call("resume", held)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._call("log", step)
        self.last_step = step

    def table(self, step: int, rows: Sequence[GenerationSample]) -> None:
        self._call("table", step)

    def finish(self, exit_code: int) -> None:
        self._call("finish", exit_code)

    def _call(self, name: str, number: int) -> None:
        if self.down is not None:
            raise self.down
        self.calls.append((name, number))


def lines(*steps: int) -> list[dict[str, int]]:
    return [{STEP: step} for step in steps]


def test_what_a_service_has_is_not_logged_again_and_what_it_lacks_is() -> None:
    fake = FakeLogger(last_step=4)
    steady = SteadyLogger("fake", fake, lambda _: None)
    steady.log_missing(lines(1, 2, 3, 4))
    steady.log_missing(lines(1, 2, 3, 4, 5, 6))
    steady.log_missing(lines(1, 2, 3, 4, 5, 6))
    steady.table(6, [SAMPLE])  # done again
    steady.table(7, [SAMPLE])
    assert fake.calls == [("log", 5), ("log", 6), ("table", 7)]


@pytest.mark.parametrize("error", [LoggerError("down"), ConnectionResetError("Connection lost")])
def test_each_outage_is_told_once_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(loggers_module, "_SECONDS_BETWEEN_TRIES", 0.0)
    told: list[str] = []
    fake = FakeLogger()
    steady = SteadyLogger("fake", fake, told.append)
    for number in (1, 2):
        fake.down = error
        steady.log_missing(lines(*range(3 * number)))
        steady.log_missing(lines(*range(3 * number + 1)))
        assert len(told) == number
        fake.down = None
        steady.log_missing(lines(*range(3 * number + 2)))
    assert fake.calls == [("log", step) for step in range(8)]


def test_a_service_that_is_down_is_not_waited_for_at_each_step_but_at_the_end() -> None:
    told: list[str] = []
    fake = FakeLogger()
    steady = SteadyLogger("fake", fake, told.append)
    fake.down = LoggerError("down")
    steady.log_missing(lines(1))
    fake.down = None
    steady.log_missing(lines(1, 2))
    steady.table(3, [SAMPLE])
    assert fake.calls == []
    steady.finish(lines(1, 2), exit_code=1)
    assert fake.calls == [("log", 1), ("log", 2), ("finish", 1)]
    assert len(told) == 1


def test_a_fault_of_ours_is_not_taken_for_an_outage() -> None:
    fake = FakeLogger()
    fake.down = TypeError("a bug")
    with pytest.raises(TypeError):
        SteadyLogger("fake", fake, lambda _: None).log_missing(lines(1))


def test_trouble_at_a_resume_or_with_samples_is_told_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLogger()
    monkeypatch.setattr(loggers_module, "LOGGERS", {"wandb": lambda *_: fake})
    tracking = Tracking(tmp_path, logger=["wandb"])
    tracking.resume(0)
    fake.down = LoggerError("down")
    tracking.log_val_generations(1, [SAMPLE])
    assert tracking.trouble is None
    tracking.log(1, {SCORE: 0.0})
    assert tracking.trouble == "wandb could not be written (down); the samples of step 1 are not shown"
    tracking.log(2, {SCORE: 0.0})
    assert tracking.trouble is None
    tracking.finish()
    assert len(tracking.history) == 2


def test_the_disk_s_trouble_does_not_keep_the_loggers_from_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLogger()
    monkeypatch.setattr(loggers_module, "LOGGERS", {"wandb": lambda *_: fake})
    tracking = Tracking(tmp_path, logger=["wandb"])
    tracking.resume(0)
    tracking.log(1, {SCORE: 0.0})
    monkeypatch.setattr(tracking, "draw", lambda: (tmp_path / "none" / "x").write_text(""))
    with pytest.raises(OSError, match="none"):
        tracking.finish(exit_code=3)
    assert fake.calls[-1] == ("finish", 3)


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)])  # nothing; a directory ./mlflow
def test_a_logger_whose_library_is_missing_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    there = SimpleNamespace(origin="__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found if name == "mlflow" else there)
    check_installed(["console", "wandb", "tensorboard"])
    with pytest.raises(ConfigError, match=r"given mlflow.*pip install -e '\.\[mlflow\]'.*trainer\.logger=\[console\]"):
        Tracking(tmp_path, logger=["console", "mlflow"])


def test_if_one_does_not_start_the_others_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLogger()

    def broken(run: RunInfo, run_id: str | None) -> FakeLogger:
        raise ConfigError("no")

    monkeypatch.setattr(loggers_module, "LOGGERS", {"tensorboard": lambda *_: fake, "wandb": broken})
    with pytest.raises(ConfigError, match="no"):
        Tracking(tmp_path, logger=["wandb", "tensorboard"])
    assert fake.calls == [("finish", 1)]


class FakeWandbRun:
    """Stands for the service."""

    def __init__(self, step: int = 0, offline: bool = False) -> None:
        self.step, self.offline, self.url = step, offline, "https://wandb.example/run"
        self.logged: dict[int, dict[str, Any]] = {}

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged[step] = values

    def finish(self, exit_code: int) -> None: ...


def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: FakeWandbRun) -> Tracking:
    monkeypatch.setattr(tracking_wandb, "_start_wandb", lambda *_: run)
    return Tracking(tmp_path, logger=["wandb"])


def test_wandb_gets_each_table_with_the_numbers_of_its_step_and_all_rows_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeWandbRun()
    tracking = wandb_run(tmp_path, monkeypatch, run)
    tracking.resume(0)
    for step in (1, 2, 3):
        if step != 2:
            tracking.log_val_generations(step, [SAMPLE])
        tracking.log(step, {SCORE: float(step)})
    assert tracking.wandb_url == run.url
    assert run.logged[1][SCORE] == 1.0
    assert run.logged[1]["val/generations"].data == [[1, "2+2?", "4", "4", 1.0, "sums"]]
    assert "val/generations" not in run.logged[2]
    assert [row[0] for row in run.logged[3]["val/generations"].data] == [1, 3]
    assert run.logged[3]["val/generations"].columns == ["step", "input", "output", "ground_truth", "score", "data_source"]


@pytest.mark.parametrize(("offline", "logged"), [(False, [3, 4, 5, 6]), (True, [5, 6])])
def test_wandb_gets_what_it_lacks_if_it_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, logged: list[int]
) -> None:
    before = Tracking(tmp_path)
    before.resume(0)
    for step in range(1, 5):
        before.log(step, {SCORE: 0.0})
    run = FakeWandbRun(step=0 if offline else 3, offline=offline)
    tracking = wandb_run(tmp_path, monkeypatch, run)
    tracking.resume(4)
    for step in (5, 6):
        tracking.log(step, {SCORE: 0.0})
    assert sorted(run.logged) == logged


def test_real_wandb_offline_keeps_the_table_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["run", "+ray_kwargs.ray_init.env_vars.API_KEY=swordfish"])
    config = {"ray_kwargs": {"env_vars": {"API_KEY": "swordfish"}}, "url": "s3://me:swordfish@bucket", "seed": 12321}
    tracking = Tracking(tmp_path, logger=["wandb"], config=config)
    tracking.resume(0)
    tracking.log_val_generations(1, [SAMPLE])
    tracking.log(1, {SCORE: 0.5})
    tracking.finish()
    assert tracking.trouble is None
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/val/generations_*.table.json")
    assert json.loads(table.read_text())["data"] == [[1, "2+2?", "4", "4", 1.0, "sums"]]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"12321" in written
    assert b"swordfish" not in written
