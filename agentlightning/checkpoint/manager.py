"""When a run saves, what it keeps, and where it goes on. Steps and files enter; durable checkpoints leave.

One manager holds one run directory, alone, from construction to `close`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from agentlightning.checkpoint import store
from agentlightning.checkpoint.lock import RunLock
from agentlightning.checkpoint.record import list_records
from agentlightning.checkpoint.retention import (
    RetentionPolicy,
    name_of,
    prune,
    remove_leftovers,
    set_aside,
    write_pointer,
)
from agentlightning.checkpoint.store import CheckpointFiles, LoadedCheckpoint, SavedCheckpoint
from agentlightning.errors import CheckpointError

WENT_BACK_TO = "went_back_to"  # in a record's extra: the resume_from_path that this line of the run began with


@contextmanager
def _changing(root: Path) -> Iterator[None]:
    """File-system errors as a message with the override."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the run directory {root} cannot be changed ({error.strerror or error}: {error.filename}); mend it, "
            "or give another with trainer.default_local_dir=DIR"
        ) from error


class CheckpointManager:
    """Saves and resumes one run.

    Example: `manager = CheckpointManager(root, save_freq=1, keep=3)`, `loaded = manager.load_latest()`, and after each step
    `if manager.should_save(step, is_last): manager.save(step, files)`.
    """

    last: SavedCheckpoint | None  # the newest that this manager made durable
    failed: str | None  # the message of the last save if it failed; None again after one that worked

    def __init__(self, root: str | Path, save_freq: int, keep: int | None = None):
        """Lock `root` (made if need be) and clear what dead saves left there; CheckpointError if another run holds it.

        `save_freq` is in steps, -1 for the last step only. `keep` is how many checkpoints stay, None for all.
        """
        if keep is not None and keep < 1:
            raise CheckpointError(f"trainer.max_actor_ckpt_to_keep={keep}; expected at least 1, or null to keep all")
        self.root = Path(root)
        self.save_freq = save_freq
        self.keep = keep
        self.last = None
        self.failed = None
        self._went_back_to: str | None = None
        self._resumed_step: int | None = None  # what is later than this is still to be moved aside
        self._lock = RunLock(self.root)
        with _changing(self.root):
            remove_leftovers(self.root)

    def should_save(self, step: int, is_last: bool) -> bool:
        """Whether the state after `step` (1 is the first) is to be saved. After a save that failed, the next step is."""
        if self.last is not None and self.last.step == step:
            return False
        return is_last or self.failed is not None or (self.save_freq > 0 and step % self.save_freq == 0)

    def save(self, step: int, files: CheckpointFiles) -> SavedCheckpoint:
        """Commit `global_step_<step>`, then prune; durable on return.

        CheckpointError if it could not be saved; `failed` then holds its message, the checkpoints before are untouched, and
        training can go on.
        """
        if self._went_back_to is not None:
            files = replace(files, extra={**files.extra, WENT_BACK_TO: self._went_back_to})
        try:
            self.go_on()
            saved = store.save(self.root, name_of(step), step, files)
        except CheckpointError as error:
            self.failed = str(error)
            raise
        self.failed = None
        self.last = replace(saved, notes=(*saved.notes, *self._after_commit(step)))
        return self.last

    def _after_commit(self, step: int) -> list[str]:
        """The pointer and the pruning; what fails here costs disk space and not the checkpoint, so it is only reported."""
        try:
            write_pointer(self.root, step)
            if self.keep is not None:
                prune(self.root, RetentionPolicy(self.keep), name_of(step))
        except (OSError, CheckpointError) as error:
            return [f"step {step} is saved, but tidying up after it failed: {error}"]
        return []

    def load_latest(self) -> LoadedCheckpoint | None:
        """The newest valid checkpoint, or None in a fresh directory; CheckpointError if there are some and none is valid.

        `.skipped` names the newer ones that were passed over, with the reason. Nothing in the directory changes.
        """
        loaded = store.find_valid(self.root)
        self._went_back_to = None
        self._resumed_step = None if loaded is None else loaded.step
        return loaded

    def load(self, which: str | int) -> LoadedCheckpoint:
        """The checkpoint that `trainer.resume_from_path` names (see `store.resolve`). Nothing in the directory changes.

        The same command started again after a kill must go on, not back once more: if the newest checkpoint here descends from
        the same `which`, that newest one is given, and a note says so.
        """
        given = str(which)
        records, _ = list_records(self.root)
        if records and WENT_BACK_TO in records[0][1].extra and records[0][1].extra[WENT_BACK_TO] == given:
            loaded = self.load_latest()
            if loaded is not None:
                self._went_back_to = given
                return replace(loaded, notes=(*loaded.notes, _goes_on(loaded, given)))
        path = store.resolve(self.root, which)
        loaded = store.load(path)
        self._went_back_to = given
        self._resumed_step = loaded.step if path.resolve().parent == self.root.resolve() else -1
        return loaded

    def go_on(self) -> Path | None:
        """Make what was loaded the newest checkpoint here: later ones, and the bad ones passed over, move to `aside-<n>/`.

        To be called when the run has accepted what it loaded, before it writes anything; the first `save` sees to it otherwise.
        Returns the new directory, None if nothing was in the way. All that is here moves if another directory was loaded from.
        """
        if self._resumed_step is None:
            return None
        aside = self.start_over(later_than_step=self._resumed_step)
        self._resumed_step = None
        return aside

    def start_over(self, also: Sequence[str] = (), later_than_step: int = -1) -> Path | None:
        """Move all checkpoints, or those after a step, and the files named in `also` to `aside-<n>/`.

        Returns that directory, None if there was nothing to move.
        """
        with _changing(self.root):
            return set_aside(self.root, later_than_step, also)

    def close(self) -> None:
        """Let another run have the directory."""
        self._lock.release()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _goes_on(loaded: LoadedCheckpoint, given: str) -> str:
    return (
        f"this run already went back to {given} and has come to step {loaded.step}; it goes on from there. "
        f"To go back once more, first move the later global_step_*.pt files away"
    )
