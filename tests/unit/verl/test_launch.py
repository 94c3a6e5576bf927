"""What a run does about workers that are gone, without workers."""

import os
import signal
from unittest.mock import MagicMock

import pytest

from agentlightning.errors import ConfigError, WorkerError
from agentlightning.verl import launch
from agentlightning.verl.assembly import Placement
from agentlightning.workers.cluster import NodeDrained

FIRST = Placement(1, "cpu", 1)


@pytest.fixture
def trainer(monkeypatch):
    """One whose workers can be started again at no cost."""
    monkeypatch.setattr(launch, "place_workers_again", lambda *_: (FIRST, None))
    monkeypatch.setattr(launch, "load_workers", MagicMock())
    monkeypatch.setattr(launch, "_facts", lambda *_: [])
    return MagicMock()


@pytest.mark.parametrize(
    ("error", "failures"), [(NodeDrained("node a is being drained"), 0), (WorkerError("worker 0 died"), 1)]
)
def test_only_a_death_counts_as_a_failure_of_the_run(trainer, error, failures):
    """A drained node cost no work: an interval between saves that shrinks for it would be chosen for the wrong reason."""
    trainer.fit.side_effect = [error, None]
    assert launch._fit_through_deaths(trainer, FIRST, launch._Deaths(1)) == (0, "finished")
    assert trainer.restart.call_count == 1
    assert trainer.checkpoints.history.worker_died.call_count == failures


def test_more_deaths_than_allowed_end_the_run(trainer):
    trainer.fit.side_effect = [WorkerError("one"), WorkerError("two"), None]
    with pytest.raises(WorkerError, match="two"):
        launch._fit_through_deaths(trainer, FIRST, launch._Deaths(1))


def test_drained_nodes_are_left_as_often_as_they_come(trainer):
    trainer.fit.side_effect = [*[NodeDrained("again")] * 3, None]
    assert launch._fit_through_deaths(trainer, FIRST, launch._Deaths(1)) == (0, "finished")


# ---- while the model loads


@pytest.fixture
def load(monkeypatch, tmp_path):
    """`load(outcomes, limit)`: each start of the workers ends as the next of `outcomes` says. Returns what was told."""

    def run(outcomes: list, limit: int = 2) -> tuple[list[str], launch._Deaths]:
        console, deaths, workers = MagicMock(), launch._Deaths(limit), MagicMock(blind_nodes=lambda _: [])
        placed = MagicMock(return_value=(FIRST, workers))
        monkeypatch.setattr(launch, "place_workers_again", placed)
        monkeypatch.setattr(launch, "load_workers", MagicMock(side_effect=outcomes))
        placement, group = launch._load_through_deaths(MagicMock(), FIRST, workers, 5, tmp_path, MagicMock(), console, deaths)
        assert (placement, group) == (FIRST, outcomes[-1])
        assert placed.call_count == workers.close.call_count == len(outcomes) - 1
        return [call.args[0] for call in console.warning.call_args_list], deaths

    return run


def group_that_says(warning: str | None) -> MagicMock:
    return MagicMock(memory_warning=lambda: warning)


def test_workers_that_die_while_they_load_are_started_again(load):
    said, deaths = load([WorkerError("one"), NodeDrained("node a is being drained"), WorkerError("two"), group_that_says(None)])
    assert [words.split("\n")[-1] for words in said] == [
        "starting the workers again, 1 of trainer.max_restarts=2",
        "node a is being drained; the workers are started again elsewhere",
        "starting the workers again, 2 of trainer.max_restarts=2",
    ]
    assert deaths.count == 2


def test_a_death_in_training_counts_with_those_before(trainer):
    deaths = launch._Deaths(2, count=2)
    trainer.fit.side_effect = [WorkerError("the third"), None]
    with pytest.raises(WorkerError, match="the third"):
        launch._fit_through_deaths(trainer, FIRST, deaths)


@pytest.mark.parametrize("error", [ConfigError("no tool"), ValueError("of the user's own")])
def test_what_a_worker_raises_itself_while_it_loads_is_not_tried_again(load, error):
    with pytest.raises(type(error), match=str(error)):
        load([error, group_that_says(None)])


def test_what_does_not_quite_fit_into_memory_is_told_once(load):
    said, _ = load([WorkerError("one"), group_that_says("a step needs about 9 GiB")])
    assert said[1:] == ["a step needs about 9 GiB"]


# ---- the end


def test_a_signal_while_ray_is_left_does_not_cut_that_short(monkeypatch):
    """Whoever presses Ctrl-C twice would else leave processes of Ray's behind, for a minute, and the folder of its session."""
    before = {number: signal.getsignal(number) for number in launch.SIGNALS}
    done, heard = [], []
    monkeypatch.setattr(launch.Preemption, "_on_signal", lambda _self, number, _frame: heard.append(number))

    def leave(exit_code: int) -> None:
        for number in launch.SIGNALS:
            os.kill(os.getpid(), number)
        done.append(exit_code)

    monkeypatch.setattr(launch, "_hold_directory_and_run", lambda *_: 75)
    monkeypatch.setattr(launch, "_leave_ray", leave)
    config = MagicMock()
    config.trainer.max_run_seconds = config.trainer.must_save_by = None
    config.trainer.backend = "ray"
    try:
        assert launch.launch(config) == 75
        assert (done, heard) == ([75], [])
        assert all(callable(signal.getsignal(number)) for number in launch.SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
