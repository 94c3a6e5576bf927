"""The few steps that a mirror takes on a file system behind a URL. Names below the URL enter; only OSErrors leave.

fsspec's file systems agree on the calls and on little else: each has errors of its own, its own idea of a directory, and its
own way to refuse to write over something. What differs is settled here, so that the mirror and its lease need not know who
serves them. Nothing is imported from fsspec: the file system is handed in.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from agentlightning.errors import CheckpointError

PARALLEL = 8  # objects moved at a time
_USER_INFO = re.compile(r"(?<=://)(?P<user>[^/@:]*):(?P<password>[^/]*)@")
# What clients raise beside OSError. Looked up among the loaded modules: who has not loaded a client cannot be shown its errors.
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("paramiko", "SSHException"),
)

T = TypeVar("T")


def mask(url: str) -> str:
    """A URL without its password, to be shown to people."""
    return _USER_INFO.sub(lambda match: f"{match['user']}:***@", url)


def words(error: OSError) -> str:
    """What an error says, in one line."""
    said = error.strerror or str(error) or type(error).__name__
    return f"{said} ({error.filename})" if error.filename is not None and str(error.filename) not in said else said


def client_errors() -> tuple[type[BaseException], ...]:
    """The classes of errors that the loaded clients raise beside OSError."""
    loaded = ((sys.modules.get(module), name) for module, name in _CLIENT_ERRORS)
    return tuple(getattr(module, name) for module, name in loaded if hasattr(module, name))


class Objects:
    """The objects below one URL, by their path relative to it.

    Example: `Objects(*fsspec.url_to_fs("s3://bucket/run"), "s3://bucket/run").read("config.yaml")`.
    """

    shown: str  # the URL as messages show it

    def __init__(self, fs: Any, root: str, url: str):
        """`fs` and `root` as `fsspec.url_to_fs(url)` gave them."""
        self._fs = fs
        self._root = root.rstrip("/")
        self.shown = mask(url).rstrip("/")
        match = _USER_INFO.search(url)
        self._secret = match["password"] if match is not None else ""

    @contextmanager
    def speaking(self, what: str) -> Iterator[None]:
        """OSErrors as a CheckpointError that begins with `what` and ends with the override."""
        try:
            yield
        except OSError as error:
            said = f"{what}: {words(error)}. Mend that, or give another directory with trainer.default_local_dir=DIR"
            tells = bool(self._secret) and self._secret in str(error)
            raise CheckpointError(said.replace(self._secret, "***") if tells else said) from (None if tells else error)

    @contextmanager
    def _calling(self, name: str) -> Iterator[str]:
        """The full path of `name`; what the client raises comes out as an OSError."""
        try:
            yield f"{self._root}/{name}" if name else self._root
        except client_errors() as error:
            if isinstance(error, OSError):
                raise
            raise OSError(errno.EIO, str(error) or type(error).__name__, f"{self.shown}/{name}") from error
        except NotImplementedError as error:
            raise OSError(errno.ENOSYS, f"its file system cannot do this ({error})", f"{self.shown}/{name}") from error

    def top(self) -> dict[str, int | None]:
        """The names right below the URL with their sizes, None for what is a directory; empty if nothing is there."""
        with self._calling("") as path:
            self._fs.invalidate_cache()  # others write here too
            try:
                listed = self._fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        found = ((entry["name"].rstrip("/"), entry) for entry in listed)
        return {
            name.rpartition("/")[2]: None if entry["type"] == "directory" else entry["size"]
            for name, entry in found
            if name != self._root  # a directory's placeholder lists itself
        }

    def sizes(self, name: str) -> dict[str, int]:
        """Relative path and size of every object below `name`; an object itself has the path ''. Empty if nothing is there."""
        with self._calling(name) as path:
            self._fs.invalidate_cache()
            try:
                listed = self._fs.find(path, detail=True)
            except FileNotFoundError:
                return {}
        return {full[len(path) + 1 :]: entry["size"] for full, entry in listed.items() if not full.endswith("/")}

    def read(self, name: str) -> bytes:
        """The bytes of an object; FileNotFoundError if it is not there."""
        with self._calling(name) as path:
            return self._fs.cat_file(path)

    def read_if_there(self, name: str) -> bytes | None:
        """The bytes of an object, or None."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def modified(self, name: str) -> datetime | None:
        """When the object was written, by the server's clock; None where it does not tell. FileNotFoundError if it is gone."""
        with self._calling(name) as path:
            self._fs.invalidate_cache()
            try:
                return self._fs.modified(path)
            except NotImplementedError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object, whatever was there."""
        with self._calling(name) as path:
            self._in_directory(path, lambda: self._fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> None:
        """Write an object that must not be there yet; FileExistsError if it is. `data` tells its writer from any other.

        Whatever the server answers, what lies there afterwards decides: an answer can get lost, the retry of a write that
        worked is refused, and not all servers word a refusal the same way.
        """
        try:
            with self._calling(name) as path:
                self._exclusively(name, path, lambda **mode: self._fs.pipe_file(path, data, **mode))
        except OSError as error:
            found = self.read_if_there(name)
            if found is None:
                raise
            if found != data:
                raise FileExistsError(errno.EEXIST, "it exists and is not written over", f"{self.shown}/{name}") from error

    def upload(self, local: Path, name: str) -> None:
        """Copy a file to an object that must not be there yet."""
        with self._calling(name) as path:
            self._exclusively(name, path, lambda **mode: self._fs.put_file(str(local), path, **mode))

    def download(self, name: str, local: Path) -> None:
        """Copy an object to a file."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with self._calling(name) as path:
            self._fs.get_file(path, str(local))

    def copy(self, source: str, target: str) -> None:
        """Copy an object on the server."""
        with self._calling(target) as path:
            self._in_directory(path, lambda: self._fs.cp_file(f"{self._root}/{source}", path))

    def remove(self, name: str) -> None:
        """Delete an object, or all objects below a name; nothing happens if there are none."""
        with self._calling(name) as path:
            self._fs.invalidate_cache()
            try:
                self._fs.rm(path, recursive=True)
            except FileNotFoundError:
                return

    def each(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """Call `function` with each item, several at a time; the first error ends it, once the calls under way are done."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _exclusively(self, name: str, path: str, call: Callable[..., object]) -> None:
        """Let the server refuse where it can (S3, GCS); look first where it cannot, and the lease must do."""
        try:
            return self._in_directory(path, lambda: call(mode="create"))
        except (TypeError, NotImplementedError):  # a file system that does not know the mode
            pass
        except OSError as error:
            if error.errno != errno.ENOSYS:  # a server that does not know the header
                raise
        if self.sizes(name):
            raise FileExistsError(errno.EEXIST, "it exists and is not written over", f"{self.shown}/{name}")
        self._in_directory(path, call)

    def _in_directory(self, path: str, call: Callable[[], object]) -> None:
        """Call, and again with the directory made if that was missing. Object stores (the asynchronous ones) have none."""
        try:
            call()
        except FileNotFoundError:
            if self._fs.async_impl:  # what is missing is the bucket, and s3fs would make one
                raise
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            call()
