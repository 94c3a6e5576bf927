"""A run at a URL, for the tools. A URL enters; a local directory leaves that stands for it, and what is asked of it later.

The directory, a picture, has the run's records and manifests as they are, and in place of every other file of a checkpoint one
without contents, of the size that the server lists (a hole, which takes no room). So whatever looks at names, records and sizes
need not know that there is a URL. Bytes are streamed from the URL, or fetched into the picture first; a hole does not have its
file's digest, so it cannot be mistaken for it. Nothing is written at the URL but by `mark` and by whoever holds `held`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint.files import LEFTOVER
from agentlightning.checkpoint.manifest import MANIFEST
from agentlightning.checkpoint.record import MAX_RECORD_BYTES, RECORD_SUFFIX, record_path
from agentlightning.checkpoint.remote import Mirror
from agentlightning.checkpoint.remote_objects import Objects, client_errors, mask, words
from agentlightning.checkpoint.retention import VERIFIED, mark_verified, step_of
from agentlightning.errors import CheckpointError
from agentlightning.tools.runs import CONFIG_FILE, find_checkpoint, sound_manifest

BLOCK_BYTES = 8 << 20  # of one request while an object is streamed
_SCHEME = re.compile(r"(?P<scheme>[^:/]+)://(?P<path>.*)")
_MAX_PART = 100  # characters of a directory's name in the picture; the URL's parts may be longer than a disk allows


class _Readable(Objects):
    """The objects below a URL, for one who mostly reads."""

    @contextmanager
    def saying(self, what: str) -> Iterator[None]:
        """OSErrors as a CheckpointError that begins with `what`, without the URL's password."""
        try:
            yield
        except OSError as error:
            said = f"{what}: {words(error)}"
            if self._secret and self._secret in str(error):
                raise CheckpointError(said.replace(self._secret, "***")) from None
            raise CheckpointError(said) from error

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of an object of `size`, a request for each block. OSError if it cannot be read."""
        for start in range(0, size, BLOCK_BYTES):
            with self._calling(name) as path:
                block = self._fs.cat_file(path, start=start, end=min(start + BLOCK_BYTES, size))
            yield block

    def written_at(self, name: str) -> float | None:
        """When an object was written, as a file time; None if the server does not tell."""
        moment = self.modified(name)
        return None if moment is None else moment.timestamp()


def _open(url: str) -> _Readable:
    shown = mask(url)
    try:
        import fsspec

        fs, root = fsspec.url_to_fs(url)
    except ImportError as error:  # fsspec names the package
        raise CheckpointError(f"{shown} needs a package that is not installed ({error}); pip install it") from error
    except (ValueError, OSError, *client_errors()) as error:
        raise CheckpointError(
            f"{shown} cannot be opened ({mask(str(error))}); expected a URL that fsspec knows, such as s3://bucket/run"
        ) from error
    return _Readable(fs, root, url)


class RemoteRun:
    """The run at a URL, and `root`, the picture of it. `look` makes the picture; before it there is only an empty directory.

    Example: `with RemoteRun("s3://bucket/run") as run: run.look()`, then `list_checkpoints(run.root, policy_of(run.root))`.
    """

    url: str  # without its password
    root: Path  # its last parts are the URL's, so that a name made of them is the run's

    def __init__(self, url: str):
        """CheckpointError if the URL cannot be opened, holds nothing, or is one checkpoint."""
        self._url = url
        self._objects = _open(url)
        self.url = self._objects.shown
        with self._objects.saying(f"{self.url} cannot be read"):
            top = self._objects.top()
        if MANIFEST in top:
            raise CheckpointError(f"{self.url} is one checkpoint; expected the run that it lies in, {_split(self.url)[0]}")
        if not top:
            raise CheckpointError(f"{self.url} holds nothing; expected a run, such as trainer.default_local_dir names it")
        self._directory = tempfile.TemporaryDirectory(prefix="agl-")
        match = _SCHEME.fullmatch(self.url)
        assert match is not None, f"{self.url} was opened, and is no URL"
        parts = [part[:_MAX_PART] for part in match["path"].split("/") if part not in ("", ".", "..")]
        self.root = Path(self._directory.name).joinpath(match["scheme"], *parts)
        self.root.mkdir(parents=True)

    def __enter__(self) -> RemoteRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    # ---- the picture

    def look(self) -> None:
        """Make the picture of what lies at the URL now; one that was there is gone."""
        with self._objects.saying(f"{self.url} cannot be read"):
            shutil.rmtree(self.root)
            self.root.mkdir()
            top = self._objects.top()
            for name in top:
                if (marker := LEFTOVER.fullmatch(name)) is not None:
                    # A local save or prune leaves its record under a hidden name; at a URL a marker says the same.
                    unique = name.removesuffix(".tmp").rpartition(".")[2]
                    (self.root / f".{marker['name']}{RECORD_SUFFIX}.{unique}.tmp").touch()
            records = {name: size for name, size in top.items() if size is not None and _is_record(name, size)}
            self._objects.each(lambda item: self._picture_record(*item), records.items())
            self._objects.each(self._picture_checkpoint, self._checkpoints(top))
            self.pull((CONFIG_FILE, VERIFIED))

    def _checkpoints(self, top: Mapping[str, int | None]) -> list[str]:
        """The directories of checkpoints; those are left out that were pruned since they were listed."""
        directories = [name for name, size in top.items() if size is None]
        return [
            name
            for name in directories
            if record_path(self.root, name).exists() or (step_of(name) is not None and f"{name}{RECORD_SUFFIX}" not in top)
        ]

    def _picture_record(self, record: str, size: int) -> None:
        path = self.root / record
        if size > MAX_RECORD_BYTES:
            return _hole(path, size)  # somebody's weights: `read_record` says so by the size
        data = self._objects.read_if_there(path.name)
        if data is None:
            return  # pruned since it was listed
        path.write_bytes(data)
        with suppress(FileNotFoundError):
            if (moment := self._objects.written_at(path.name)) is not None:
                os.utime(path, (moment, moment))

    def _picture_checkpoint(self, name: str) -> None:
        data = self._objects.read_if_there(f"{name}/{MANIFEST}")
        (self.root / name).mkdir()
        if data is None:
            return
        (self.root / name / MANIFEST).write_bytes(data)
        try:
            files = manifests.parse(data)["files"]
            sizes = self._objects.sizes(name)
            for relative in files.keys() & sizes.keys():
                _hole(manifests.locate(self.root / name, relative), sizes[relative])
        except CheckpointError:
            return  # who reads the manifest in the picture finds the same

    def pull(self, names: Sequence[str]) -> None:
        """Have small files of the run in the picture, those that are there."""
        with self._objects.saying(f"{self.url} cannot be read"):
            for name in names:
                if (data := self._objects.read_if_there(name)) is not None:
                    (self.root / name).write_bytes(data)

    # ---- what the tools ask of a place: see `verify.Source`

    def find(self, text: str) -> Path:
        """The checkpoint of the picture that `text` means, as `find_checkpoint`; CheckpointError if it lies elsewhere."""
        directory = find_checkpoint(text, self.root)
        if Path(os.path.realpath(directory)).parent != Path(os.path.realpath(self.root)):
            raise CheckpointError(f"{text} leads to {directory}; expected a step or a name of {self.url}, or the whole URL")
        return directory

    def blocks(self, path: Path) -> Iterator[bytes]:
        """The bytes at the URL of a file in the picture. OSError if they cannot be read."""
        return self._objects.blocks(self._name(path), path.stat().st_size)

    def has(self, path: Path) -> bool:
        """Whether what the picture has is still at the URL."""
        with self._objects.saying(f"{self.url} cannot be read"):
            return self._objects.read_if_there(self._name(path)) is not None

    def mark(self, root: Path, name: str, digest: str) -> None:
        """Mark a checkpoint verified at the URL. A run that goes on there has marks of its own, and writes over this file."""
        assert root == self.root
        self.pull((VERIFIED,))
        for listed, size in self._objects.top().items():  # those that came since `look` keep their marks
            if _is_record(listed, size):
                (root / listed).touch()
        mark_verified(root, name, digest)
        self._objects.write(VERIFIED, (root / VERIFIED).read_bytes())

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    # ---- bytes, and what is not only reading

    def fetch(self, directory: Path, only: Collection[str] | None = None) -> None:
        """Put the files of a pictured checkpoint in place of their holes, all or those named in `only`. Not verified.

        CheckpointError if they cannot be read, or the disk has no room for them.
        """
        holes = _fitting(directory, sound_manifest(directory, None), only)
        needed, free = sum(holes.values()), shutil.disk_usage(self.root).free
        if needed > free:
            raise CheckpointError(
                f"{self.url}/{directory.name} needs {needed:,} bytes in {tempfile.gettempdir()}, where {free:,} are free; "
                "give another directory with TMPDIR=DIR in the environment"
            )
        with self._objects.saying(f"{self.url}/{directory.name} cannot be fetched"):
            self._objects.each(
                lambda relative: self._objects.download(f"{directory.name}/{relative}", directory / relative), holes
            )

    @contextmanager
    def held(self) -> Iterator[Mirror]:
        """Have the URL alone, as a run has it; CheckpointError within a second if a run does."""
        with Mirror(self._url, self.root) as mirror:
            yield mirror

    def gone(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that have no record at the URL now."""
        with self._objects.saying(f"{self.url} cannot be read"):
            top = self._objects.top()
        return [name for name in names if f"{name}{RECORD_SUFFIX}" not in top]


def find_remote(url: str) -> tuple[str, str | None]:
    """What a person means by the URL of a checkpoint: the run's URL, and a step or name in it; None stands for its newest.

    Takes what `find_checkpoint` takes as a path: `RUN/40`, `RUN/global_step_40`, its record, a folder in it, or `RUN`.
    """
    url = url.rstrip("/")
    here = _top(url)
    if MANIFEST not in here and any(_is_record(name, size) for name, size in here.items()):
        return url, None
    parent, name = _split(url)
    if MANIFEST not in here and MANIFEST in _top(parent):
        return _split(parent)
    return parent, name


def _top(url: str) -> dict[str, int | None]:
    objects = _open(url)
    with objects.saying(f"{objects.shown} cannot be read"):
        return objects.top()


def _split(url: str) -> tuple[str, str]:
    parent, _, name = url.rstrip("/").rpartition("/")
    if not name or parent.endswith(":/") or "://" not in parent:
        raise CheckpointError(f"{mask(url)} is no checkpoint; expected RUN/40 or RUN/global_step_40, or a run's URL")
    return parent, name


def _is_record(name: str, size: int | None) -> bool:
    return name.endswith(RECORD_SUFFIX) and not name.startswith(".") and size is not None


def _hole(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.truncate(size)


def _fitting(directory: Path, manifest: dict[str, Any], only: Collection[str] | None) -> dict[str, int]:
    """Name and size of the files that are worth fetching: those that have the size that the manifest says."""
    wanted = {relative: entry["size"] for relative, entry in manifest["files"].items() if only is None or relative in only}
    paths = {relative: directory / relative for relative in wanted}
    return {name: size for name, size in wanted.items() if paths[name].is_file() and paths[name].stat().st_size == size}
