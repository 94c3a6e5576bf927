"""The folders of clusters that runs have started for themselves: Ray's sockets and logs below its temporary folder.

Ray leaves them. A run removes its own when it leaves Ray; what a killed one has left, the next start removes. Enters: the
folder that Ray keeps sessions in. Nothing leaves; a session that somebody else began with `ray start` stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import ray

_OWNER = "agentlightning_owner_"  # begins the name of what says whose a session is; it lies beside the sessions


def own_session() -> Path:
    """The folder of the cluster, Ray's own logs and sockets, on this machine."""
    node = ray._private.worker.global_worker.node  # pyright: ignore
    return Path(node.get_session_dir_path())


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who has started a cluster, as a file beside the sessions tells."""

    pid: int
    started: float
    pids: str  # the namespace that the number is of: a container may have mounted the folder of its host
    session: str | None  # None: it was killed while the cluster came up

    @classmethod
    def read(cls, path: Path) -> _Owner | None:
        """None where it cannot be made out."""
        try:
            pid, started, pids, *session = path.read_text().split()
            return cls(int(pid), float(started), pids, session[0] if session else None)
        except (OSError, ValueError):
            return None

    def may_live(self) -> bool:
        """Also where this cannot be told from here."""
        if self.pids != _pid_namespace():
            return True
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True

    def sessions(self, folder: Path) -> list[Path]:
        """Its own. Ray names one by its beginning and by the number of who began it, which may come again."""
        if self.session is not None:
            return [folder / self.session]
        found = [path for path in folder.glob(f"session_*_{self.pid}") if not path.is_symlink()]
        others = {owner.session for owner in map(_Owner.read, folder.glob(f"{_OWNER}*")) if owner is not None}
        return [path for path in found if _began(path) >= self.started - 1 and path.name not in others]


def mark_owner(folder: Path) -> None:
    """Write down in Ray's `folder` that this process is about to start a cluster there, and remove what those left that were
    killed before they could: the sessions, and what says whose they are.

    Before the start, so that no moment is left in which a killed run would leave a session of which nobody knows whose it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{_OWNER}*"):
        owner = _Owner.read(path)
        if owner is None or owner.may_live():
            continue
        for session in owner.sessions(folder):
            shutil.rmtree(session, ignore_errors=True)
        with contextlib.suppress(OSError):  # another start has removed it, or it is another user's
            path.unlink()
    _mark(folder, "")


def mark_session(session: Path) -> None:
    """Write down which session became of it."""
    _mark(session.parent, session.name)


def _mark(folder: Path, session: str) -> None:
    process = psutil.Process()
    _mark_of(folder).write_text(f"{process.pid} {process.create_time()} {_pid_namespace()} {session}\n")


def _mark_of(folder: Path) -> Path:
    return folder / f"{_OWNER}{os.getpid()}_{_pid_namespace()}"


def remove_session(session: Path) -> None:
    """Remove that folder if this process has started its cluster; one that was joined stays."""
    mark = _mark_of(session.parent)
    owner = _Owner.read(mark)
    if owner is not None and session in owner.sessions(session.parent):
        shutil.rmtree(session, ignore_errors=True)
        mark.unlink(missing_ok=True)


def _began(session: Path) -> float:
    """Seconds since the epoch; `session_2026-11-25_15-41-17_180508_17550` says local time. 0 where it says something else."""
    try:
        return datetime.strptime(session.name.rpartition("_")[0], "session_%Y-%m-%d_%H-%M-%S_%f").timestamp()
    except ValueError:
        return 0.0


def _pid_namespace() -> str:
    """Its number; the machine's name where the system has none."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return socket.gethostname()
