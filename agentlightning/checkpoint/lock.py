"""One run in one directory. A directory enters; a held lock leaves, or an error that names who holds it.

The kernel keeps the lock (`flock` on `<root>/.lock`) and drops it when its process dies, however it dies: nothing stale is left
to clear. The file's text (host, pid, since) only serves the message. Processes that are forked without exec share the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

from agentlightning.errors import CheckpointError

LOCK_FILE = ".lock"
WAIT_SECONDS = 0.5  # a run that was just killed may take this long to be gone
_POLL_SECONDS = 0.02
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

log = logging.getLogger(__name__)


class RunLock:
    """Holds a run directory from construction until `release`, the end of a `with`, or the death of the process."""

    def __init__(self, root: Path, wait_seconds: float = WAIT_SECONDS):
        """Make the directory if need be and lock it; CheckpointError within `wait_seconds` if another run holds it."""
        self._path = root / LOCK_FILE
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 (held for the life of the run)
        except OSError as error:
            raise CheckpointError(
                f"the run directory {root} cannot be written ({error.strerror}); "
                "give another with trainer.default_local_dir=DIR"
            ) from error
        try:
            self._acquire(time.monotonic() + wait_seconds)
        except BaseException:
            self._file.close()
            raise

    def _acquire(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise CheckpointError(
                        f"the run directory {self._path.parent} is in use by {self._holder()}; "
                        "stop that run, or give this one another directory with trainer.default_local_dir=DIR"
                    ) from error
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise CheckpointError(f"{self._path} cannot be locked ({error.strerror})") from error
                log.warning("the file system of %s has no locks: see to it that only one run uses the directory", self._path)
                break
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self._file.truncate(0)  # opened for appending, so the text lands at the start
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()

    def _holder(self) -> str:
        try:
            self._file.seek(0)
            holder = json.loads(self._file.read())
            return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, LookupError, TypeError):  # caught between its lock and its text
            return "another run"

    def release(self) -> None:
        """Let the next run in. The file stays: removing it would let two runs lock two files of one name."""
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
