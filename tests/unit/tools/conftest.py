"""Fixtures that make run directories, and URLs to put them at."""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from made_runs import files_of
from made_urls import BUCKET

from agentlightning.checkpoint import save


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "run", accuracies: tuple[float | None, ...] = (), **trainer: Any) -> Path:
        root = tmp_path / name
        root.mkdir()
        for step, accuracy in enumerate(accuracies, start=1):
            save(root, f"global_step_{step}", step, files_of(step, accuracy))
        (root / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
        return root

    return make


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
        fsspec.filesystem("s3").makedirs(BUCKET, exist_ok=True)  # another module may have made it
        yield endpoint
        server.stop()


@pytest.fixture(params=["memory", "s3"])
def any_url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_endpoint")
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.fixture
def url() -> str:
    return f"memory://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.fixture
def nothing_stays(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever a command does, its pictures are gone when it ends."""
    place = tmp_path_factory.mktemp("pictures")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert [path.name for path in place.iterdir() if path.name.startswith("agl-")] == []


@pytest.fixture
def read_objects(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(how, name below the run) of each object whose bytes are taken from the memory file system."""
    seen: list[tuple[str, str]] = []

    def watch(how: str) -> None:
        real = getattr(MemoryFileSystem, how)

        def call(self: MemoryFileSystem, path: str, *arguments: Any, **named: Any) -> Any:
            seen.append((how, path.partition("/run/")[2]))
            return real(self, path, *arguments, **named)

        monkeypatch.setattr(MemoryFileSystem, how, call)

    for how in ("cat_file", "get_file"):
        watch(how)
    return seen
