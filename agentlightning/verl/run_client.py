"""The training client that the trainer stands on: `TrainingClient`'s own words over the workers and the directory of a run.

The state of the workers enters, the futures of `agentlightning.tinker` leave. A run wants two things more than a loop's own
client gives. Whoever is told to leave in the middle of a step must be able to save the step before: so every step's state is
copied to the host. And a save is written behind the next step: its future is rarely waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from dataclasses import dataclass
from pathlib import Path

from agentlightning.checkpoint import store
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.retention import name_of
from agentlightning.checkpoint.store import CheckpointFiles, LoadedCheckpoint, PartWriter
from agentlightning.errors import CheckpointError
from agentlightning.tinker.futures import ErrorsTo, Future
from agentlightning.tinker.types import LoadWeightsResponse, SaveWeightsResponse
from agentlightning.verl.state import worker_state
from agentlightning.workers.group import WorkerGroup


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after a finished step: what its checkpoint will hold, its tensors in a host buffer of the workers."""

    step: int
    files: CheckpointFiles
    buffer: int


class RunClient:
    """One run's workers and its directory. `resume_info` is the checkpoint that was found and verified at the start, if any."""

    def __init__(
        self, group: WorkerGroup, checkpoints: CheckpointManager, resume_info: LoadedCheckpoint | None, uses_critic: bool
    ) -> None:
        self._group, self._checkpoints = group, checkpoints
        self._resume_info, self._uses_critic = resume_info, uses_critic
        self.snapshot: Snapshot | None = None

    def load_state(self, path: str) -> Future[LoadWeightsResponse]:
        """Weights, optimizer and version of the actor, and of the critic if there is one, to every worker; done on return.

        CheckpointError, from the future, if the directory is not whole, or of another kind of run; no worker has changed then.
        """
        answer: ConcurrentFuture[LoadWeightsResponse] = ConcurrentFuture()
        with ErrorsTo(answer):
            found = self._resume_info
            loaded = found if found is not None and str(found.path) == path else store.load(Path(path))
            self._group.load_state(worker_state(loaded, self._uses_critic))
            answer.set_result(LoadWeightsResponse(path))
        return Future(answer)

    def take_snapshot(self, step: int, buffer: int, files_with: Callable[[PartWriter], CheckpointFiles]) -> int:
        """Copy the workers' state into a free host buffer: `save_state` saves it from there. Returns its bytes."""
        parts = self._group.snapshot(buffer)
        self.snapshot = Snapshot(step, files_with(parts), buffer)
        return parts.bytes

    def save_state(self, name: str) -> Future[SaveWeightsResponse]:
        """Have the last snapshot written and committed behind what comes next: the directory `name`, then its record.

        The answer comes when it is durable. CheckpointError, from the future, if it could not be saved.
        """
        if self.snapshot is None or name != name_of(self.snapshot.step):
            held = "no snapshot" if self.snapshot is None else f"the snapshot {name_of(self.snapshot.step)}"
            raise CheckpointError(f"save_state({name!r}): there is {held}; expected take_snapshot of that step before")
        saved = self._checkpoints.start_save(self.snapshot.step, self.snapshot.files, self.snapshot.buffer)
        return Future(saved).then(lambda checkpoint: SaveWeightsResponse(str(checkpoint.path)))
