"""What a run does about workers that are gone, without workers."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from agentlightning.errors import WorkerError
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
    fake = MagicMock()
    fake.config.trainer = SimpleNamespace(max_restarts=1)
    return fake


@pytest.mark.parametrize(
    ("error", "failures"), [(NodeDrained("node a is being drained"), 0), (WorkerError("worker 0 died"), 1)]
)
def test_only_a_death_counts_as_a_failure_of_the_run(trainer, error, failures):
    """A drained node cost no work: an interval between saves that shrinks for it would be chosen for the wrong reason."""
    trainer.fit.side_effect = [error, None]
    assert launch._fit_through_deaths(trainer, FIRST) == (0, "finished")
    assert trainer.restart.call_count == 1
    assert trainer.checkpoints.history.worker_died.call_count == failures


def test_more_deaths_than_allowed_end_the_run(trainer):
    trainer.fit.side_effect = [WorkerError("one"), WorkerError("two"), None]
    with pytest.raises(WorkerError, match="two"):
        launch._fit_through_deaths(trainer, FIRST)


def test_drained_nodes_are_left_as_often_as_they_come(trainer):
    trainer.fit.side_effect = [*[NodeDrained("again")] * 3, None]
    assert launch._fit_through_deaths(trainer, FIRST) == (0, "finished")
