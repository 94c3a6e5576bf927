"""Where the saves of a loop of one's own lie: `<root>/<model>/weights/<name>` and `<root>/<model>/sampler_weights/<name>`.

A name enters, a directory that is not there yet leaves. **A path that was given out never gets other contents**, because a
record may name it: every start of a loop has a model id of its own, and so a directory of its own, and a name that is saved
twice by one client becomes `<name>-2`. So a loop that was killed between its save and its record may save the same name
again; what the dead one left stays where it is (`agl` does not prune it), harming nothing.

A save with a TTL has a file `<name>.expires` beside it. What has expired is removed at the next save below the same root, but
never the newest state of a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from agentlightning.checkpoint.files import make_directory, replace_file, temporary
from agentlightning.checkpoint.record import RECORD_SUFFIX
from agentlightning.errors import UserError

Kind = Literal["weights", "sampler_weights"]
DEFAULT_ROOT = Path("checkpoints") / "tinker"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_EXPIRES = ".expires"
_URL = re.compile(r"tinker://(?P<model>[^/]+)/(?P<kind>weights|sampler_weights)/(?P<name>[^/]+)")


class Places:
    """The saves below one root."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        """`root=None`: `checkpoints/tinker` in the working directory."""
        self.root = (Path(root).expanduser() if root is not None else DEFAULT_ROOT).absolute()

    def new(self, model_id: str, kind: Kind, name: str) -> Path:
        """A directory for a save, not there yet; what is above it is. UserError for a name that is not a plain one."""
        check_name(name)
        parent = self.root / _folder(model_id) / kind
        make_directory(parent)
        path, number = parent / name, 1
        while os.path.lexists(path) or os.path.lexists(_record(path)):
            number += 1
            path = parent / f"{name}-{number}"
        return path

    def describe(self, model_id: str, about: Mapping[str, Any]) -> None:
        """Say in `<model>/run.json` what the saves there are of."""
        path = self.root / _folder(model_id) / "run.json"
        if not path.exists():
            replace_file(path, (json.dumps(about, indent=1) + "\n").encode())

    def expire(self, path: Path, ttl_seconds: int | None) -> None:
        """Let the save at `path` end so many seconds from now (None: never), and remove what has ended."""
        if ttl_seconds is not None:
            replace_file(path.with_name(path.name + _EXPIRES), f"{time.time() + ttl_seconds:.0f}\n".encode())
        for mark in self.root.glob(f"*/*/*{_EXPIRES}"):
            _remove_expired(mark)

    def find(self, path: str, *, sampler: bool) -> Path:
        """The directory that `path` names: a save of either kind, or a `tinker://MODEL/KIND/NAME` below the root."""
        url = _URL.fullmatch(path)
        if "://" in path and url is None:
            raise UserError(f"{path!r}: expected a directory, or tinker://MODEL/weights/NAME")
        if url is not None:
            check_name(url["name"])
            found = self.root / _folder(url["model"]) / url["kind"] / url["name"]
        else:
            found = Path(path).expanduser()
        if not found.is_dir():
            what = "weights to sample from" if sampler else "state to train on from"
            raise UserError(f"no {what} at {path!r} ({found.absolute()} is no directory); expected the `.path` of a save")
        return found


def check_name(name: str) -> None:
    """UserError unless `name` is one plain path segment."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith((_EXPIRES, RECORD_SUFFIX)):
        raise UserError(
            f"a save cannot be named {name!r}; use letters, digits, '.', '_' and '-', at most 128, no '.' first and no "
            f"{_EXPIRES!r} or {RECORD_SUFFIX!r} last"
        )


def check_ttl(ttl_seconds: int | None) -> None:
    """UserError unless it is None or a whole number of seconds."""
    if ttl_seconds is not None and (type(ttl_seconds) is not int or ttl_seconds < 1):
        raise UserError(f"ttl_seconds={ttl_seconds!r}; expected a whole number of seconds, or None to keep it for good")


def _folder(model_id: str) -> str:
    folder = model_id.replace(":", "_")
    check_name(folder)
    return folder


def _record(directory: Path) -> Path:
    """The record that the store keeps beside a checkpoint."""
    return directory.with_name(directory.name + RECORD_SUFFIX)


def _remove_expired(mark: Path) -> None:
    """Remove a save whose time is over. Another process may be doing the same: then there is nothing left to do."""
    with contextlib.suppress(FileNotFoundError):
        if float(mark.read_text()) > time.time():
            return
        directory = mark.with_name(mark.name.removesuffix(_EXPIRES))
        if mark.parent.name == "weights" and directory == _newest(mark.parent):
            return
        doomed = temporary(directory.parent, directory.name)
        _record(directory).unlink(missing_ok=True)
        if directory.exists():
            os.rename(directory, doomed)  # at once, so that nobody finds half a save
            shutil.rmtree(doomed)
        mark.unlink()


def _newest(parent: Path) -> Path:
    return max((path for path in parent.iterdir() if path.is_dir()), key=lambda path: (path.stat().st_mtime_ns, path.name))
