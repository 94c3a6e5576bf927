"""MLflow with a store in a file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import Engine, event

from agentlightning.errors import ConfigError
from agentlightning.verl import loggers as loggers_module
from agentlightning.verl.metrics import SCORE, STEP
from agentlightning.verl.tracking import Tracking
from agentlightning.verl.tracking_mlflow import mlflow_name
from agentlightning.verl.tracking_samples import GenerationSample


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store of plain files, which unlike a database costs no second to make."""
    uri = f"file://{tmp_path}/store"
    environment = dict(os.environ)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield uri
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)


def start(run_dir: Path, **kwargs: object) -> Tracking:
    return Tracking(run_dir, logger=["console", "mlflow"], project_name="p", experiment_name="e", **kwargs)  # pyright: ignore


def train(tracking: Tracking, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1):
        tracking.log(step, {SCORE: step / 8 + offset})


def scores(store: str, run_id: str | None) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=store).get_metric_history(str(run_id), SCORE)
    return [(metric.step, metric.value) for metric in history]


def test_a_killed_run_goes_on_in_the_same_curve_with_each_step_once(tmp_path: Path, store: str) -> None:
    killed = start(tmp_path, config={"trainer": {"seed": 3}, "ray": {"token": "abc"}})
    killed.resume(0)
    train(killed, 1, 7)
    again = start(tmp_path, config={"trainer": {"seed": 4}})
    again.resume(5)
    train(again, 6, 8, offset=100.0)
    again.finish()
    assert again.mlflow_run_id == killed.mlflow_run_id
    assert scores(store, again.mlflow_run_id) == [*((step, step / 8) for step in range(1, 8)), (8, 101.0)]
    run = MlflowClient(tracking_uri=store).get_run(str(again.mlflow_run_id))
    assert run.data.params == {"trainer.seed": "3", "ray.token": "***"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "e")
    assert MlflowClient(tracking_uri=store).get_experiment(run.info.experiment_id).name == "p"


def test_what_the_service_lacks_after_a_kill_is_logged_from_the_history(tmp_path: Path, store: str) -> None:
    without = Tracking(tmp_path)
    without.resume(0)
    train(without, 1, 3)
    late = start(tmp_path)
    late.resume(3)
    train(late, 4, 4)
    assert scores(store, late.mlflow_run_id) == [(step, step / 8) for step in range(1, 5)]


@pytest.mark.parametrize(("exit_code", "status"), [(0, "FINISHED"), (75, "KILLED"), (1, "FAILED")])
def test_how_a_run_ended(tmp_path: Path, store: str, exit_code: int, status: str) -> None:
    tracking = start(tmp_path)
    tracking.resume(0)
    tracking.finish(exit_code)
    client = MlflowClient(tracking_uri=store)
    assert client.get_run(str(tracking.mlflow_run_id)).info.status == status
    assert client.get_run(str(start(tmp_path).mlflow_run_id)).info.status == "RUNNING"


def test_the_checkpoint_s_run_comes_first_and_an_unknown_or_deleted_one_is_made_anew(tmp_path: Path, store: str) -> None:
    one, two = start(tmp_path / "one"), start(tmp_path / "two")
    assert start(tmp_path / "two", mlflow_run_id=one.mlflow_run_id).mlflow_run_id == one.mlflow_run_id
    assert start(tmp_path / "two", mlflow_run_id="0" * 32).mlflow_run_id == two.mlflow_run_id
    MlflowClient(tracking_uri=store).delete_run(str(two.mlflow_run_id))
    new = start(tmp_path / "two").mlflow_run_id
    assert new not in (None, one.mlflow_run_id, two.mlflow_run_id)
    assert start(tmp_path / "two").mlflow_run_id == new


def test_an_outage_is_told_once_and_the_curve_is_completed(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> None:
        raise MlflowException("API request to https://me:secret@host failed\nwith a long explanation")

    monkeypatch.setattr(loggers_module, "_SECONDS_BETWEEN_TRIES", 0.0)
    tracking = start(tmp_path)
    tracking.resume(0)
    train(tracking, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", down)
        train(tracking, 3, 3)
        assert tracking.trouble is not None
        assert tracking.trouble.startswith("mlflow could not be written (API request to https://***@host failed)")
        train(tracking, 4, 4)
        assert tracking.trouble is None
    train(tracking, 5, 5)
    assert scores(store, tracking.mlflow_run_id) == [(step, step / 8) for step in range(1, 6)]


def test_an_outage_holds_up_one_step_and_not_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def down(*_: object, **__: object) -> None:
        tries.append(1)
        raise MlflowException("down")

    tracking = start(tmp_path)
    tracking.resume(0)
    monkeypatch.setattr(MlflowClient, "log_batch", down)
    train(tracking, 1, 5)
    assert len(tries) == 1
    tracking.finish()  # a last try, and the run goes on to its own end
    assert len(tries) == 2


def test_samples_are_an_artifact_a_step(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = start(tmp_path)
    tracking.resume(0)
    tracking.log_val_generations(1, [GenerationSample("2+2?", "\ud8004 é", ["4"], 1.0, "sums")])
    train(tracking, 1, 1)
    client = MlflowClient(tracking_uri=store)
    (artifact,) = client.list_artifacts(str(tracking.mlflow_run_id), "val/generations")
    assert artifact.path == "val/generations/step_1.json"
    path = client.download_artifacts(str(tracking.mlflow_run_id), artifact.path, str(tmp_path))
    assert json.loads(Path(path).read_text()) == {
        "columns": ["input", "output", "ground_truth", "score", "data_source"],
        "data": [["2+2?", "?4 é", "['4']", 1.0, "sums"]],
    }

    def refused(*_: object) -> None:
        raise RuntimeError("the bucket is gone")  # an artifact store's own error, whatever it is

    monkeypatch.setattr(MlflowClient, "log_dict", refused)
    tracking.log_val_generations(2, [])
    train(tracking, 2, 2)
    assert tracking.trouble is not None
    assert "the bucket is gone" in tracking.trouble


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("val-core/openai/gsm8k/reward/mean@1", "val-core/openai/gsm8k/reward/mean_at_1"),
        ("critic/score/mean", "critic/score/mean"),
        ("/a//../b,c é", "a/b_c _"),
        ("..", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_that_mlflow_takes(tmp_path: Path, ours: str, theirs: str) -> None:
    assert mlflow_name(ours) == theirs
    tracking = start(tmp_path)
    tracking.resume(0)
    tracking.log(1, {ours: 1.0})
    assert tracking.trouble is None


def test_more_numbers_than_a_call_takes(tmp_path: Path, store: str) -> None:
    tracking = start(tmp_path)
    tracking.resume(0)
    tracking.log(1, {f"m{i}": 1.0 for i in range(1100)})
    assert tracking.trouble is None
    data = MlflowClient(tracking_uri=store).get_run(str(tracking.mlflow_run_id)).data
    assert len(data.metrics) == 1102
    assert data.metrics[STEP] == 1


def test_a_server_that_does_not_answer_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI.*trainer\.logger=\[console\]") as error:
        start(tmp_path)
    assert "http://***@127.0.0.1:9" in str(error.value)
    assert "secret" not in str(error.value)


def test_without_a_server_the_run_directory_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_fsync(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")  # the hundred migrations of a new database wait for the disk otherwise

    event.listen(Engine, "connect", without_fsync)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    killed = start(run_dir)
    killed.resume(0)
    killed.log_val_generations(1, [GenerationSample("a", "b", "c", 1.0)])
    train(killed, 1, 3)
    again = start(run_dir)
    again.resume(2)
    train(again, 3, 4)
    assert again.trouble is None
    uri = f"sqlite:///{run_dir}/mlflow.db"
    assert scores(uri, again.mlflow_run_id) == [(step, step / 8) for step in range(1, 5)]
    assert list(run_dir.glob("mlflow_artifacts/*/artifacts/val/generations/step_1.json"))
    assert os.listdir(tmp_path) == ["run"]
    event.remove(Engine, "connect", without_fsync)
