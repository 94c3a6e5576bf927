"""When a run saves, what it keeps, and where it goes on. Steps and files enter; durable checkpoints leave.

One manager holds one run directory, alone, from construction to `close`. Saving happens in a thread of its own; the run hears
of it by `collect`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from agentlightning.checkpoint import store
from agentlightning.checkpoint.files import entries, fsync_entries, missing_directories
from agentlightning.checkpoint.history import RunHistory
from agentlightning.checkpoint.interval import AutoInterval, Choice
from agentlightning.checkpoint.lease import Lease
from agentlightning.checkpoint.record import RECORD_SUFFIX, CheckpointRecord, list_records
from agentlightning.checkpoint.remote import SMALL_FILES, Mirror, PushStats, is_url, staging_for
from agentlightning.checkpoint.retention import (
    RetentionPolicy,
    discard,
    mark_verified,
    metric_of,
    name_of,
    prune,
    remove_leftovers,
    set_aside,
    step_of,
    write_pointer,
)
from agentlightning.checkpoint.store import CheckpointFiles, LoadedCheckpoint, SavedCheckpoint
from agentlightning.checkpoint.writer import BackgroundWriter, Outcome
from agentlightning.errors import CheckpointError, UserError

WENT_BACK_TO = "went_back_to"  # in a record's extra: the resume_from_path that this line of the run began with
METRICS = "metrics"  # in a record's extra: what the best checkpoint is chosen by
BEST = "best"  # a resume_from_path

log = logging.getLogger(__name__)


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
    `if manager.should_save(step, is_last): manager.start_save(step, files)`, then `manager.collect()` to hear of earlier ones.
    """

    last: SavedCheckpoint | None  # the newest that this manager made durable
    choice: Choice | None  # what `save_freq=auto` chose last
    failed: str | None  # the message of the last save if it failed; None again after one that worked

    def __init__(
        self,
        root: str | Path,
        save_freq: int | Literal["auto"],
        keep: int | None = None,
        *,
        best_by: str | None = None,
        keep_every: int | None = None,
        digest: str = "xxh3_128",
        staging_parent: Path | None = None,
    ):
        """Take the lease of `root` (made if need be) and clear what dead saves left; CheckpointError if another run holds it.

        `save_freq` is in steps, -1 for the last step only, or `auto` (see interval.py). `keep` is how many of the newest stay,
        None for all; `best_by` and `keep_every`: see `RetentionPolicy`. A `root` that is a URL (fsspec's: s3://, gs://,
        memory://) is mirrored: the run works in a directory below `staging_parent`, and a checkpoint counts once it is there.
        """
        url = str(root) if is_url(str(root)) else None
        self.root = Path(root) if url is None else staging_for(url, staging_parent)
        self.save_freq: int | Literal["auto"] = save_freq
        self.policy = RetentionPolicy(keep, best_by, keep_every)
        self.digest = digest
        self.last = None
        self.failed = None
        self.choice = None
        self._went_back_to: str | None = None
        self._resumed_step: int | None = None  # what is later than this is still to be moved aside
        self._began_with: LoadedCheckpoint | None = None
        self._verified: CheckpointRecord | None = None  # what was loaded: every byte of it was read and checked
        self._started_step = 0  # the last one that was resumed from, or of which a save was started
        self._durable_since = time.monotonic()
        self._auto = AutoInterval()
        self._written_beside = False  # whether a save was being written during the last step
        made = missing_directories(self.root)
        self.mirror: Mirror | None = None
        self.lease = Lease(self.root)
        try:
            with _changing(self.root):
                fsync_entries(made)
                remove_leftovers(self.root)
            if url is not None:
                self.mirror = Mirror(url, self.root)
                self.mirror.pull_index()
            with _changing(self.root):
                self.history = RunHistory(self.root)
        except BaseException:
            self._release()
            raise
        self._writer = BackgroundWriter()

    # ---- saving

    def should_save(self, step: int, is_last: bool) -> bool:
        """Whether the state after `step` (1 is the first) is to be saved. After a save that failed, the next step is."""
        if self.is_safe(step):
            return False
        if is_last or self.failed is not None:
            return True
        if self.save_freq == "auto":
            self.choice = self._auto.choose(self.history.summary())
            return self.choice.due(step, self._started_step)
        return self.save_freq > 0 and step % self.save_freq == 0

    def is_safe(self, step: int) -> bool:
        """Whether the state after `step` is durable, or on its way to be."""
        return (self.last is not None and self.last.step == step) or self._writer.writes(step)

    def free_buffer(self) -> int:
        """Which of the two host buffers may be filled; waits only if both are being written."""
        return self._writer.free_buffer()

    def start_save(self, step: int, files: CheckpointFiles, buffer: int | None = None) -> Future[SavedCheckpoint]:
        """Have `global_step_<step>` written, committed and the old ones pruned, behind what comes next.

        `buffer` is the host buffer that `files.parts` reads. What becomes of it is told by the future, and by `collect`; a save
        that failed leaves the checkpoints before it untouched, and training can go on.
        """
        if self._went_back_to is not None:
            files = replace(files, extra={**files.extra, WENT_BACK_TO: self._went_back_to})
        self._started_step = step
        taken_at = time.monotonic()
        return self._writer.submit(step, buffer, lambda: self._save(step, files, taken_at))

    def save(self, step: int, files: CheckpointFiles) -> SavedCheckpoint:
        """`start_save`, and wait for it: durable on return. CheckpointError if it could not be saved."""
        self.start_save(step, files)
        outcome = self.drain()[-1]
        if outcome.saved is None:
            assert outcome.error is not None
            raise outcome.error
        return outcome.saved

    def collect(self) -> list[Outcome]:
        """The saves that have ended since the last call, in order; `last` and `failed` are up to date then."""
        outcomes = self._writer.collect()
        for outcome in outcomes:
            if outcome.saved is not None:
                self.last, self.failed = outcome.saved, None
            else:
                self.failed = str(outcome.error)
        return outcomes

    def drain(self) -> list[Outcome]:
        """Wait for what is being written, then `collect`."""
        self._writer.wait()
        return self.collect()

    def observe(self, step_s: float, blocked_s: float | None) -> None:
        """What a step took, and for how long it was blocked by its save, if it had one: `save_freq=auto` learns from it."""
        self._auto.observe_step(step_s, self._written_beside)
        self._written_beside = self._writer.busy  # beside the step that comes now
        if blocked_s is not None:
            self._auto.observe_save(blocked_s, self.last.seconds if self.last is not None else 0.0)

    @property
    def age_s(self) -> float:
        """Seconds of work that a kill at this instant would lose."""
        return time.monotonic() - self._durable_since

    def _save(self, step: int, files: CheckpointFiles, taken_at: float) -> SavedCheckpoint:
        self.go_on()
        saved = store.save(self.root, name_of(step), step, files, algorithm=self.digest, committing=self.lease.committing)
        notes = self._point_at(step)
        if self.mirror is not None:
            pushed = self._push(saved.name)
            saved = replace(saved, seconds=saved.seconds + pushed.seconds)
        self._durable_since = taken_at
        return replace(saved, notes=(*saved.notes, *notes, *self._prune(step)))

    def _push(self, name: str) -> PushStats:
        """Make it count at the URL. If that fails it is taken back here as well: then the same step can be tried again."""
        assert self.mirror is not None
        try:
            return self.mirror.push(name, SMALL_FILES)
        except CheckpointError:
            with suppress(OSError):
                discard(self.root, [name])
            raise

    def _point_at(self, step: int) -> list[str]:
        """verl's pointer; what fails here, or in `_prune`, costs no checkpoint, so it is only reported."""
        try:
            write_pointer(self.root, step)
        except OSError as error:
            return [f"step {step} is saved, but tidying up after it failed: {error}"]
        return []

    def _prune(self, step: int) -> list[str]:
        try:
            if self.mirror is None:
                prune(self.root, self.policy, name_of(step))
            else:
                self.mirror.discard(prune(self.root, self.policy, name_of(step), elsewhere=self.mirror.is_whole))
        except (OSError, UserError) as error:
            return [f"step {step} is saved, but tidying up after it failed: {error}"]
        return []

    # ---- resuming

    def load_latest(self) -> LoadedCheckpoint | None:
        """The newest valid checkpoint, or None in a fresh directory; CheckpointError if there are some and none is valid.

        `.skipped` names the newer ones that were passed over, with the reason. No checkpoint in the directory changes.
        """
        self._writer.wait()
        loaded = store.find_valid(self.root, self._fetch)
        self._went_back_to = None
        return self._resumed(loaded, own=True)

    def load_again(self) -> LoadedCheckpoint | None:
        """Where a run goes on that lost its workers: the newest checkpoint here, else what the run itself began with.

        None if it began with nothing and has saved nothing. Saves that failed before, and what they were of, are forgotten.
        """
        self._writer.wait()
        loaded = store.find_valid(self.root, self._fetch)
        self.last, self.failed = None, None
        if loaded is None:
            return self._began_with
        self._resumed_step, self._started_step = loaded.step, loaded.step
        self._verified = loaded.record
        return loaded

    def load(self, which: str | int) -> LoadedCheckpoint:
        """The checkpoint that `trainer.resume_from_path` names (see `store.resolve`), or the `best` one.

        The same command started again after a kill must go on, not back once more: if the newest checkpoint here descends from
        the same `which`, that newest one is given, and a note says so. Nothing in the directory changes.
        """
        given = str(which)
        records, _ = list_records(self.root)
        if records and WENT_BACK_TO in records[0][1].extra and records[0][1].extra[WENT_BACK_TO] == given:
            loaded = self.load_latest()
            if loaded is not None:
                self._went_back_to = given
                return replace(loaded, notes=(*loaded.notes, _goes_on(loaded, given)))
        path = self.root / self.best() if given == BEST else store.resolve(self.root, which)
        own = path.resolve().parent == self.root.resolve()
        if own and self.mirror is not None:
            self.mirror.fetch(path.name)
        loaded = store.load(path)
        self._went_back_to = given
        self._resumed(loaded, own)
        return loaded

    def _fetch(self, record: CheckpointRecord) -> None:
        if self.mirror is not None and record.digest is not None:
            self.mirror.fetch(record.name)

    def best(self) -> str:
        """The name of the best checkpoint by `best_by`, or by the first validation mean that the records hold."""
        records = [record for _, record in list_records(self.root)[0] if record.digest is not None]
        held = [name for record in records for name in record.extra.get(METRICS, {})]
        by = self.policy.best_by or next(iter(held), None)
        candidates: list[tuple[float, int, str]] = []
        for record in records:
            value = metric_of(record, by.removeprefix("-")) if by is not None else None
            if value is not None:
                candidates.append((-value if by is not None and by.startswith("-") else value, record.step, record.name))
        if not candidates:
            raise CheckpointError(
                f"trainer.resume_from_path=best: no checkpoint in {self.root} holds {by or 'a validation score'}; "
                f"name one by its step, or set trainer.keep_best_by to one of: {', '.join(sorted(set(held))) or 'none'}"
            )
        return max(candidates)[2]

    def _resumed(self, loaded: LoadedCheckpoint | None, own: bool) -> LoadedCheckpoint | None:
        self._resumed_step = None if loaded is None else loaded.step if own else -1
        self._started_step = 0 if loaded is None else loaded.step
        self._verified = loaded.record if loaded is not None and own else None
        self._began_with = loaded
        return loaded

    def go_on(self) -> Path | None:
        """Make what was loaded the newest checkpoint here: later ones, and the bad ones passed over, move to `aside-<n>/`.

        To be called when the run has accepted what it loaded, before it writes anything; the first save sees to it otherwise.
        Returns the new directory, None if nothing was in the way. All that is here moves if another directory was loaded from.
        """
        if self._resumed_step is None:
            return None
        aside = self.start_over(later_than_step=self._resumed_step)
        self._resumed_step = None
        if self._verified is not None and self._verified.digest is not None:
            with _changing(self.root):
                mark_verified(self.root, self._verified.name, self._verified.digest)
        return aside

    def start_over(self, also: Sequence[str] = (), later_than_step: int = -1) -> Path | None:
        """Move all checkpoints, or those after a step, and the files named in `also` to `aside-<n>/`.

        Returns that directory, None if there was nothing to move.
        """
        with _changing(self.root), self.lease.committing():
            aside = set_aside(self.root, later_than_step, also)
        if aside is not None and self.mirror is not None:
            moved = entries(aside)
            names = {name.removesuffix(RECORD_SUFFIX) for name in moved if name.endswith(RECORD_SUFFIX)}
            newest_first = sorted(names, key=lambda name: step_of(name) or 0, reverse=True)
            self.mirror.set_aside(newest_first, [name for name in also if name in moved], aside=aside.name)
        return aside

    def close(self) -> None:
        """Finish what is being written, and let another run have the directory."""
        self._writer.close()
        try:
            if self.mirror is not None:
                self.mirror.push_files(SMALL_FILES)
        except UserError as error:
            log.warning("%s", error)
        finally:
            self._release()

    def _release(self) -> None:
        if self.mirror is not None:
            self.mirror.release()
        self.lease.release()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _goes_on(loaded: LoadedCheckpoint, given: str) -> str:
    return (
        f"this run already went back to {given} and has come to step {loaded.step}; it goes on from there. "
        f"To go back once more, first move the later global_step_*.pt files away"
    )
