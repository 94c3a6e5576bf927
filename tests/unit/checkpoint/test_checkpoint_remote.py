"""A run directory behind a URL: the record is the commit there too, nothing is lost on the way, one run at a time has it."""

from __future__ import annotations

import atexit
import errno
import functools
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from agentlightning.checkpoint import (
    CheckpointFiles,
    LoadedCheckpoint,
    find_valid,
    remote_lease,
    remote_objects,
    save,
    set_aside,
)
from agentlightning.checkpoint.lease import LeaseLostError
from agentlightning.checkpoint.remote import SMALL_FILES, Mirror, RemoteUnreachableError, is_url, staging_for
from agentlightning.errors import CheckpointError

ADAPTER = "actor/adapter_model.safetensors"
BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})  # as FSSPEC_S3_ENDPOINT_URL would
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield endpoint
        server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_endpoint")
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.fixture
def memory() -> str:
    return f"memory://{BUCKET}/{uuid.uuid4().hex}/run"


def files_of(step: int) -> CheckpointFiles:
    weights = {"lora_A": np.random.default_rng(step).standard_normal((4, 8), dtype=np.float32)}
    return CheckpointFiles({ADAPTER: weights}, {"trainer_state.json": {"step": step}})


def name_of(step: int) -> str:
    return f"global_step_{step}"


@functools.cache
def saved(step: int) -> Path:
    """A run directory with one checkpoint, to be copied: that is much faster than a save."""
    root = Path(tempfile.mkdtemp(prefix="checkpoint-remote-"))
    atexit.register(shutil.rmtree, root)
    save(root, name_of(step), step, files_of(step))
    return root


def commit(staging: Path, step: int) -> None:
    """What a run does before a push."""
    shutil.copytree(saved(step), staging, dirs_exist_ok=True)
    (staging / "metrics.jsonl").write_text("".join(f'{{"step": {done}}}\n' for done in range(1, step + 1)))


def commit_and_push(mirror: Mirror, staging: Path, *steps: int) -> None:
    for step in steps:
        commit(staging, step)
        mirror.push(name_of(step), SMALL_FILES)


def tree(root: Path) -> dict[str, bytes]:
    """Every visible file but the lease of the directory itself."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".")}


def objects(url: str) -> dict[str, bytes]:
    """Everything at the URL but the lease and its heartbeat."""
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    found = {full[len(root) + 1 :]: fs.cat_file(full) for full in fs.find(root)}
    return {name: data for name, data in found.items() if not name.startswith((".lease-", ".beat-"))}


def put(url: str, name: str, data: bytes) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/{name}", data)


def resume(mirror: Mirror, staging: Path) -> LoadedCheckpoint | None:
    mirror.pull_index()
    return find_valid(staging, prepare=lambda record: mirror.fetch(record.name))


def assert_is(loaded: LoadedCheckpoint | None, step: int) -> None:
    assert loaded is not None
    assert loaded.step == step
    assert loaded.tensors[ADAPTER]["lora_A"].tobytes() == files_of(step).tensors[ADAPTER]["lora_A"].tobytes()


# ---- there and back


def test_a_second_empty_staging_gets_every_bit(url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with Mirror(url, first) as mirror:
        assert resume(mirror, first) is None
        (first / "config.yaml").write_text("a: 1\n")
        commit(first, 1)
        stats = mirror.push(name_of(1), SMALL_FILES)
        assert stats.bytes == sum(len(data) for name, data in tree(first).items() if name.startswith("global_step"))
        assert stats.seconds > 0
        commit_and_push(mirror, first, 2)
        assert objects(url) == tree(first)
        assert mirror.is_whole(name_of(2))
    with Mirror(url, second) as mirror:
        assert_is(resume(mirror, second), 2)
        assert not (second / name_of(1)).exists(), "only what is loaded is fetched"
        mirror.fetch(name_of(1))
        assert tree(second) == tree(first)
        commit_and_push(mirror, second, 3)
        assert objects(url) == tree(second)
    assert objects(url) == tree(second), "nothing of the lease stays"


def test_a_staging_that_is_whole_fetches_nothing(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Mirror(memory, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1)
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda *_, **__: pytest.fail("fetched"), raising=False)
    with Mirror(memory, tmp_path) as mirror:
        assert_is(resume(mirror, tmp_path), 1)


def test_a_staging_that_rotted_is_fetched_again(memory: str, tmp_path: Path) -> None:
    with Mirror(memory, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1, 2)
        good = tree(tmp_path)
        data = bytearray(good[f"global_step_2/{ADAPTER}"])
        data[-1] ^= 1
        (tmp_path / name_of(2) / ADAPTER).write_bytes(data)
        assert_is(resume(mirror, tmp_path), 2)
        assert tree(tmp_path) == good


def test_what_was_not_pushed_is_not_believed(url: str, tmp_path: Path) -> None:
    with Mirror(url, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1)
        commit(tmp_path, 2)
    with Mirror(url, tmp_path) as mirror:
        assert_is(resume(mirror, tmp_path), 1)
        assert tree(tmp_path) == objects(url)


def test_another_checkpoint_of_the_same_name_is_not_believed(memory: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save(second, name_of(1), 1, files_of(7))
    with Mirror(memory, first) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, first, 1)
    with Mirror(memory, second) as mirror:
        assert_is(resume(mirror, second), 1)
        assert tree(second) == tree(first)


def test_where_the_url_holds_nothing_the_staging_is_moved_and_not_deleted(url: str, tmp_path: Path) -> None:
    commit(tmp_path, 1)
    before = tree(tmp_path)
    with Mirror(url, tmp_path) as mirror:
        assert resume(mirror, tmp_path) is None
    assert tree(tmp_path) == {f"aside-1/{name}": data for name, data in before.items()}


def test_small_files_alone(url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with Mirror(url, first) as mirror:
        mirror.pull_index()
        (first / "attempts.jsonl").write_text("{}\n")
        mirror.push_files(SMALL_FILES)
    second.mkdir()
    (second / "metrics.jsonl").write_text("of another time\n")
    with Mirror(url, second) as mirror:
        assert resume(mirror, second) is None
    assert tree(second) == {"attempts.jsonl": b"{}\n"}


# ---- what is damaged or in the way


@pytest.mark.parametrize(
    ("url", "damage"),
    [("memory", "truncated"), ("memory", "flipped"), ("memory", "missing"), ("memory", "exchanged"), ("s3", "truncated")],
    indirect=["url"],
)
def test_damage_at_the_url_is_found_and_the_older_one_used(url: str, tmp_path: Path, damage: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with Mirror(url, first) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, first, 1, 2)
    name = f"global_step_2/{ADAPTER}"
    good = objects(url)[name]
    if damage == "missing":
        fs, root = fsspec.url_to_fs(url)
        fs.rm_file(f"{root}/{name}")
    elif damage == "exchanged":
        for other, data in objects(url).items():
            if other.startswith("global_step_1/"):
                put(url, other.replace("global_step_1/", "global_step_2/"), data)
    else:
        put(url, name, good[:-1] if damage == "truncated" else good[:-1] + bytes([good[-1] ^ 1]))
    with Mirror(url, second) as mirror:
        loaded = resume(mirror, second)
        assert_is(loaded, 1)
        assert loaded is not None
        assert [skipped for skipped, _ in loaded.skipped] == ["global_step_2.pt"]
        assert mirror.is_whole(name_of(2)) == (damage == "flipped" or damage == "exchanged")
    assert not [entry for entry in os.listdir(second) if entry.startswith(".")]


def test_a_url_that_cannot_be_read_is_no_reason_to_go_back(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with Mirror(memory, first) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, first, 1, 2)
    with Mirror(memory, second) as mirror:
        monkeypatch.setattr(MemoryFileSystem, "get_file", raising(ConnectionError("reset by peer")), raising=False)
        with pytest.raises(RemoteUnreachableError, match=r"global_step_2 could not be fetched.*reset by peer"):
            resume(mirror, second)
        monkeypatch.undo()
        assert_is(resume(mirror, second), 2)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_nothing_is_written_over(url: str, tmp_path: Path) -> None:
    with Mirror(url, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1)
        before = objects(url)
        with pytest.raises(CheckpointError, match=r"global_step_1\.pt exists and is not written over"):
            mirror.push(name_of(1), SMALL_FILES)
        # The server refuses by itself, also where a record appears between our look and the write.
        with pytest.raises(FileExistsError):
            mirror._objects.create("global_step_1.pt", b"another")
        with pytest.raises(FileExistsError):
            mirror._objects.upload(tmp_path / "metrics.jsonl", "global_step_1/trainer_state.json")
        assert objects(url) == before


def test_a_copy_that_somebody_made_is_moved_out_of_the_way(url: str, tmp_path: Path) -> None:
    put(url, "global_step_1/notes.txt", b"mine")
    put(url, ".global_step_9.pt.0123456789abcdef0123456789abcdef.tmp", b"not a marker")
    with Mirror(url, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1)
        found = objects(url)
        assert found.pop("aside-1/global_step_1/notes.txt") == b"mine"
        assert found.pop(".global_step_9.pt.0123456789abcdef0123456789abcdef.tmp") == b"not a marker"
        assert found == tree(tmp_path)
        assert (tmp_path / "aside-1").is_dir(), "the numbers go in step"


def test_a_write_whose_answer_got_lost_is_a_write(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again, and the server refuses what it has itself."""
    real = MemoryFileSystem.pipe_file

    def twice(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite", **rest: Any) -> None:
        real(self, path, value, mode=mode, **rest)
        if mode == "create":
            real(self, path, value, mode=mode, **rest)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", twice)
    with Mirror(memory, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1)
    assert objects(memory) == tree(tmp_path)


# ---- discard, set_aside


def test_discard(url: str, tmp_path: Path) -> None:
    with Mirror(url, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1, 2)
        kept = {name: data for name, data in objects(url).items() if not name.startswith("global_step_1")}
        mirror.discard([name_of(1), name_of(77)])
        assert objects(url) == kept


def test_the_newest_at_the_url_stays_until_a_newer_one_is_there(memory: str, tmp_path: Path) -> None:
    """Its successor was committed here, and could not be pushed."""
    with Mirror(memory, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1)
        commit(tmp_path, 2)
        mirror.discard([name_of(1)])
        assert "global_step_1.pt" in objects(memory)
        mirror.push(name_of(2))
        mirror.discard([])
        assert {name.split("/")[0] for name in objects(memory)} == {"global_step_2", "global_step_2.pt", "metrics.jsonl"}


def test_set_aside_goes_in_step_with_the_local_directory(url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with Mirror(url, first) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, first, 1, 2, 3)
        aside = set_aside(first, 1, ("metrics.jsonl",))
        assert aside is not None
        mirror.set_aside([name_of(3), name_of(2)], ["metrics.jsonl", "config.yaml"], aside=aside.name)
        assert objects(url) == tree(first)
        with pytest.raises(CheckpointError, match="aside-1 exists and is not written over"):
            mirror.set_aside([name_of(1)], aside="aside-1")
        mirror.set_aside(["global_step_9"], aside="aside-2")
        assert objects(url) == tree(first)
    with Mirror(url, second) as mirror:
        assert_is(resume(mirror, second), 1)
        aside = set_aside(second, 0)
        assert aside == second / "aside-2"
        mirror.set_aside([name_of(1)], aside=aside.name)
    assert {name.split("/")[0] for name in objects(url)} == {"aside-1", "aside-2"}


# ---- killed, or refused, at any step


class KilledError(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


class Faults:
    """Counts the calls to the file system and lets the k-th go wrong.

    kill: it and all after it do not happen, but of a file that was being copied one half is left. error: it alone is refused.
    late: it alone happens, and is then reported as refused.
    """

    METHODS = ("pipe_file", "put_file", "cp_file", "rm_file", "cat_file", "ls", "find", "get_file")

    action: Callable[[], None] | None

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch = patch
        self._lock = threading.Lock()
        self.disarm()
        for name in self.METHODS:
            patch.setattr(MemoryFileSystem, name, self._wrapped(name, getattr(MemoryFileSystem, name)), raising=False)

    def arm(self, how: str, at: int) -> None:
        self.how, self.at, self.calls = how, at, 0

    def disarm(self) -> None:
        self.how, self.at, self.calls, self.action = "", -1, 0, None

    def interrupt(self, at: int, action: Callable[[], None]) -> None:
        """Let `action` happen, once and alone, before the call number `at`."""
        self.how, self.at, self.calls, self.action = "interrupt", at, 0, action

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fs: MemoryFileSystem, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                number, how, hit = self.calls, self.how, self.calls == self.at
                self.calls += 1
                if hit and self.action is not None:
                    self._patch.undo()  # its own calls are not counted
                    self.action()
            if hit and how == "kill" and name == "put_file":
                fs.pipe_file.__wrapped__(fs, args[1], Path(args[0]).read_bytes()[: Path(args[0]).stat().st_size // 2])
            if how == "kill" and number >= self.at:
                raise KilledError
            if how == "error" and hit:
                raise OSError(errno.EIO, "injected")
            result = real(fs, *args, **kwargs)
            if how == "late" and hit:
                raise OSError(errno.EIO, "injected")
            return result

        call.__wrapped__ = real  # type: ignore[attr-defined]
        return call


def with_fault_at_every_step(
    faults: Faults, how: str, prepare: Callable[[], Any], act: Callable[[Any], None]
) -> Iterator[tuple]:
    """`prepare`, then `act` with a fault at step 0, 1, 2, ... until it gets through without one.

    Yields (what prepare gave, the error).
    """
    for at in itertools.count():
        given = prepare()
        error: BaseException | None = None
        faults.arm(how, at)
        try:
            act(given)
        except (KilledError, CheckpointError) as raised:
            error = raised
        reached = faults.calls > at
        faults.disarm()
        yield given, error
        if not reached:
            assert error is None
            assert at > 5, "the faults were never reached"
            return


def assert_no_leftovers(url: str, *steps: int) -> None:
    """The URL holds exactly these checkpoints, whole, and the small files."""
    expected = {"metrics.jsonl"}
    for step in steps:
        expected |= {f"global_step_{step}.pt"}
        expected |= {f"global_step_{step}/{file}" for file in (ADAPTER, "trainer_state.json", "manifest.json")}
    assert set(objects(url)) == expected


@pytest.mark.parametrize("how", ["kill", "error", "late"])
def test_a_push_that_dies_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    faults = Faults(monkeypatch)
    number = itertools.count()

    def prepare() -> tuple[str, Path, Mirror]:
        url, staging = f"memory://{BUCKET}/{uuid.uuid4().hex}", tmp_path / str(next(number))
        mirror = Mirror(url, staging, lapse_s=3600)
        mirror.pull_index()
        commit_and_push(mirror, staging, 1)
        commit(staging, 2)
        return url, staging, mirror

    outcomes = set()
    for (url, staging, mirror), error in with_fault_at_every_step(
        faults, how, prepare, lambda given: given[2].push(name_of(2), SMALL_FILES)
    ):
        if how != "kill" and error is not None:
            assert "injected" in str(error)
            if "global_step_2.pt" not in objects(url):
                mirror.push(name_of(2), SMALL_FILES)  # the same run goes on
                assert_no_leftovers(url, 1, 2)
        mirror.release()
        fresh = tmp_path / f"fresh-{next(number)}"
        for place in (fresh, staging):  # another host, and the same one
            with Mirror(url, place, lapse_s=3600) as again:
                loaded = resume(again, place)
                assert loaded is not None
                assert_is(loaded, loaded.step)
                assert loaded.skipped == ()
                assert loaded.step == 2 or error is not None, "a push that returned is a commit"
                assert_no_leftovers(url, *range(1, loaded.step + 1))
                outcomes.add(loaded.step)
    assert outcomes == ({1, 2} if how == "kill" else {2})


@pytest.mark.parametrize("how", ["kill", "error"])
def test_a_set_aside_that_dies_anywhere_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    faults = Faults(monkeypatch)
    source = tmp_path / "source"
    for step in (1, 2):
        commit(source, step)
    all_files = tree(source)

    def prepare() -> tuple[str, Mirror]:
        url = f"memory://{BUCKET}/{uuid.uuid4().hex}"
        for name, data in all_files.items():
            put(url, name, data)
        return url, Mirror(url, tmp_path / uuid.uuid4().hex, lapse_s=3600)

    moved = set()
    for (url, mirror), error in with_fault_at_every_step(
        faults, how, prepare, lambda given: given[1].set_aside([name_of(2)], ["metrics.jsonl"], aside="aside-1")
    ):
        found = objects(url)
        there = {name.removeprefix("aside-1/"): data for name, data in found.items() if not name.startswith(".")}
        assert there == all_files, "at no instant anything is in neither place"
        mirror.release()
        staging = tmp_path / uuid.uuid4().hex
        with Mirror(url, staging, lapse_s=3600) as again:
            loaded = resume(again, staging)
            assert_is(loaded, 1 if "aside-1/global_step_2.pt" in objects(url) else 2)
            found = objects(url)
            assert {name.removeprefix("aside-1/"): data for name, data in found.items()} == all_files
            assert len(found) == len(all_files), "nothing is in both places, and no leftover stays"
            aside = {name.removeprefix("aside-1/").split("/")[0] for name in found if name.startswith("aside-1/")}
            assert aside in (set(), {"global_step_2", "global_step_2.pt", "metrics.jsonl"})
            assert aside or error is not None
            moved.add(bool(aside))
    assert moved == {True, False}


@pytest.mark.parametrize("how", ["kill", "error"])
def test_a_discard_that_dies_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    faults = Faults(monkeypatch)
    source = tmp_path / "source"
    for step in (1, 2):
        commit(source, step)

    def prepare() -> tuple[str, Mirror]:
        url = f"memory://{BUCKET}/{uuid.uuid4().hex}"
        for name, data in tree(source).items():
            put(url, name, data)
        return url, Mirror(url, tmp_path / uuid.uuid4().hex, lapse_s=3600)

    for (url, mirror), error in with_fault_at_every_step(faults, how, prepare, lambda given: given[1].discard([name_of(1)])):
        mirror.release()
        staging = tmp_path / uuid.uuid4().hex
        with Mirror(url, staging, lapse_s=3600) as again:
            assert_is(resume(again, staging), 2)
        left = [step for step in (1, 2) if f"global_step_{step}.pt" in objects(url)]
        assert_no_leftovers(url, *left)
        assert left == [2] or error is not None


def test_a_push_that_was_refused_says_what_it_needs(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Mirror(memory, tmp_path) as mirror:
        mirror.pull_index()
        commit(tmp_path, 1)
        monkeypatch.setattr(MemoryFileSystem, "put_file", raising(OSError(errno.EDQUOT, "quota exceeded")), raising=False)
        needed = sum(len(data) for name, data in tree(tmp_path).items() if name.startswith("global_step"))
        with pytest.raises(CheckpointError) as caught:
            mirror.push(name_of(1), SMALL_FILES)
    message = str(caught.value)
    for part in (memory, f"{needed:,} bytes", "quota exceeded", "trainer.default_local_dir=DIR"):
        assert part in message
    assert objects(memory) == {}


# ---- the lease


def on_another_host(patch: pytest.MonkeyPatch) -> None:
    """Mirrors from here on belong to another kernel than those before."""
    patch.setattr(remote_lease, "_boot_id", lambda: "another boot")


def make_old(url: str, seconds: float) -> None:
    """Turn the server's clock on: what is there was written so long ago."""
    root = fsspec.url_to_fs(url)[1]
    if url.startswith("memory"):
        for path, file in MemoryFileSystem.store.items():
            if path.startswith(f"{root}/."):
                file.modified -= timedelta(seconds=seconds)
        return
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    for key in s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys.values():
        if key.name.startswith(root.removeprefix(f"{BUCKET}/")):
            key.last_modified -= timedelta(seconds=seconds)


def test_a_second_run_is_refused_at_once_and_told_who_holds_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Mirror(url, tmp_path / "a") as holder:
        for another_host in (False, True):
            if another_host:
                on_another_host(monkeypatch)
            started = time.monotonic()
            with pytest.raises(CheckpointError) as caught:
                Mirror(url, tmp_path / "b")
            assert time.monotonic() - started < 1
            message = str(caught.value)
            assert f"the run directory {url} is in use by pid {os.getpid()} on {socket.gethostname()} since 20" in message
            assert "its last heartbeat is" in message
            assert "trainer.default_local_dir=DIR" in message
        holder.check_held()
    with Mirror(url, tmp_path / "b") as holder:
        holder.check_held()
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    assert fs.find(root) == [], "released, and the refused ones left nothing"


def test_a_silent_run_is_taken_over_and_cannot_commit(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    sleeper = Mirror(url, first, lapse_s=60)
    sleeper.pull_index()
    commit_and_push(sleeper, first, 1)
    commit(first, 2)
    on_another_host(monkeypatch)
    make_old(url, 50)
    with pytest.raises(CheckpointError, match=r"5[0-9] s old, and it is taken over 60 s after"):
        Mirror(url, second, lapse_s=60)
    make_old(url, 50)
    with Mirror(url, second, lapse_s=60) as successor:
        assert_is(resume(successor, second), 1)
        before = objects(url)
        for attempt in (
            lambda: sleeper.push(name_of(2), SMALL_FILES),
            lambda: sleeper.push_files(SMALL_FILES),
            lambda: sleeper.discard([name_of(1)]),
            lambda: sleeper.set_aside([name_of(1)], aside="aside-1"),
            sleeper.pull_index,
            sleeper.check_held,
        ):
            with pytest.raises(LeaseLostError, match="taken over by pid"):
                attempt()
        assert sleeper.lost
        assert objects(url) == before
        sleeper.release()
        successor.check_held()
        commit_and_push(successor, second, 2)
    assert objects(url) == tree(second)


@pytest.mark.parametrize("pushes", ["before", "after"])
def test_a_holder_that_loses_its_lease_within_a_push_harms_nothing(tmp_path: Path, pushes: str) -> None:
    """Before each step of the push another run takes over and resumes; it pushes before the sleeper wakes, or after."""
    other_saved = tmp_path / "other"
    save(other_saved, name_of(2), 2, files_of(99))
    for at in itertools.count():
        url, here = f"memory://{BUCKET}/{uuid.uuid4().hex}", tmp_path / str(at)
        sleeper = Mirror(url, here / "first", lapse_s=3600)
        sleeper.pull_index()
        commit_and_push(sleeper, here / "first", 1)
        shutil.copytree(other_saved, here / "first", dirs_exist_ok=True)
        resumed: list[tuple[Mirror, int]] = []

        def take_over(at: int = at, url: str = url, here: Path = here, resumed: list[tuple[Mirror, int]] = resumed) -> None:
            with pytest.MonkeyPatch.context() as dead:
                dead.setattr(remote_lease, "_is_running", lambda _: False)
                successor = Mirror(url, here / "second", lapse_s=3600)
            loaded = resume(successor, here / "second")
            assert loaded is not None
            resumed.append((successor, loaded.step))
            if pushes == "before":
                commit_and_push(successor, here / "second", loaded.step + 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote_objects, "PARALLEL", 1)  # no other upload is under way meanwhile
            faults = Faults(patch)
            faults.interrupt(at, take_over)
            try:
                sleeper.push(name_of(2))
                committed = True
            except CheckpointError:
                committed = False
        sleeper.release()
        if not resumed:
            assert committed
            assert at > 10
            break
        successor, step = resumed[0]
        assert committed == (step == 2), "what the next run did not see was not committed"
        successor.check_held()
        if pushes == "after":
            commit_and_push(successor, here / "second", step + 1)
        successor.release()
        with Mirror(url, here / "third", lapse_s=3600) as mirror:
            assert_is(resume(mirror, here / "third"), step + 1)
        expected = tree(here / "second")
        assert {name: data for name, data in objects(url).items() if name in expected} == expected


def test_a_dead_run_of_this_host_is_taken_over_at_once(url: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os, sys; sys.stdout.write(str(os.getpid()))"], capture_output=True)
    holder = {
        "host": "n7",
        "pid": int(done.stdout),
        "boot_id": remote_lease._boot_id(),
        "token": "0",
        "since": "",
        "started": 0,
    }
    put(url, ".beat-0", b"{}")
    put(url, ".lease-1", json.dumps({**holder, "boot_id": "another boot"}).encode())
    with pytest.raises(CheckpointError, match="on n7"):
        Mirror(url, tmp_path, lapse_s=3600)
    put(url, ".lease-1", json.dumps(holder).encode())
    with Mirror(url, tmp_path, lapse_s=3600) as heir:
        heir.check_held()


def test_only_one_of_many_takes_over(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = Mirror(url, tmp_path / "dead", lapse_s=60)
    on_another_host(monkeypatch)
    make_old(url, 100)
    begin = threading.Barrier(4)
    winners: list[Mirror] = []
    refused: list[str] = []

    def contend(number: int) -> None:
        begin.wait()
        try:
            winners.append(Mirror(url, tmp_path / str(number), lapse_s=60))
        except CheckpointError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = winners
    assert len(refused) == 3
    winner.check_held()
    winner.release()
    dead.release()


def test_the_heartbeat_is_heard_and_finds_out(memory: str, tmp_path: Path) -> None:
    root = fsspec.url_to_fs(memory)[1]
    mirror = Mirror(memory, tmp_path, lapse_s=0.03)
    (beat,) = [path for path in MemoryFileSystem.store if path.startswith(f"{root}/.beat-")]

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not what():
            assert time.monotonic() < deadline
            threading.Event().wait(0.005)

    wait_for(lambda: json.loads(MemoryFileSystem.store[beat].getvalue())["beat"] > 5)
    fsspec.filesystem("memory").rm_file(f"{root}/.lease-1")
    wait_for(lambda: mirror.lost)
    mirror._lease._thread.join(10)
    assert not mirror._lease._thread.is_alive()
    mirror.release()


def test_a_released_mirror_saves_nothing_more(memory: str, tmp_path: Path) -> None:
    mirror = Mirror(memory, tmp_path)
    mirror.pull_index()
    commit(tmp_path, 1)
    mirror.release()
    mirror.release()
    with pytest.raises(LeaseLostError, match="was released"):
        mirror.push(name_of(1))


def test_a_lease_that_is_torn_is_taken_over_when_it_is_old(memory: str, tmp_path: Path) -> None:
    put(memory, ".lease-3", b'{"host": "n')
    with pytest.raises(CheckpointError, match="in use by another run"):
        Mirror(memory, tmp_path)
    make_old(memory, 100)
    with Mirror(memory, tmp_path) as mirror:
        mirror.check_held()


# ---- file systems that can do less, and URLs


def test_a_file_system_that_cannot_refuse_or_tell_the_time(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pipe, real_put = MemoryFileSystem.pipe_file, MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value: real_pipe(self, path, value))
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, here, there: real_put(self, here, there), raising=False)
    monkeypatch.setattr(MemoryFileSystem, "modified", raising(NotImplementedError()))
    with Mirror(memory, tmp_path) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, tmp_path, 1)
        with pytest.raises(FileExistsError):
            mirror._objects.create("global_step_1.pt", b"another")
        on_another_host(monkeypatch)
        with pytest.raises(CheckpointError, match=r"does not tell how old its heartbeat is; .*remove memory://.*/\.lease-1"):
            Mirror(memory, tmp_path)
    assert objects(memory) == tree(tmp_path)


def test_a_file_system_with_directories(tmp_path: Path) -> None:
    url, first, second = f"local://{tmp_path}/far/away", tmp_path / "first", tmp_path / "second"
    with Mirror(url, first) as mirror:
        mirror.pull_index()
        commit_and_push(mirror, first, 1, 2, 3)
        mirror.discard([name_of(1)])
        mirror.set_aside([name_of(3)], aside="aside-1")
        assert sorted(os.listdir(tmp_path / "far" / "away" / "aside-1")) == ["global_step_3", "global_step_3.pt"]
    with Mirror(url, second) as mirror:
        assert_is(resume(mirror, second), 2)
    assert sorted(os.listdir(tmp_path / "far" / "away")) == ["aside-1", "global_step_2", "global_step_2.pt", "metrics.jsonl"]


def test_a_bucket_that_is_not_there_is_not_made(s3_endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="s3://no-such-bucket/run cannot be used: The specified bucket does not exist"):
        Mirror("s3://no-such-bucket/run", tmp_path)
    assert s3_endpoint
    assert not fsspec.filesystem("s3").exists("no-such-bucket")


def test_a_client_error_comes_out_as_ours(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's errors are no OSErrors."""
    from botocore.exceptions import EndpointConnectionError

    with Mirror(url, tmp_path) as mirror:
        mirror.pull_index()
        # By item: undone, an attribute would stay on the object, which fsspec keeps for others, and hide its class's.
        unreachable = raising(EndpointConnectionError(endpoint_url="http://nowhere"))
        monkeypatch.setitem(vars(mirror._objects._fs), "ls", unreachable)
        with pytest.raises(CheckpointError, match="Could not connect to the endpoint URL"):
            mirror.pull_index()
        with pytest.raises(CheckpointError, match="not known whether"):
            mirror.check_held()
        monkeypatch.undo()


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="pip install gcsfs"):
        Mirror("gs://bucket/run", tmp_path)
    with pytest.raises(CheckpointError, match=r"nonsense://bucket/run cannot be opened.*expected a URL that fsspec knows"):
        Mirror("nonsense://bucket/run", tmp_path)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(CheckpointError, match="pip install fsspec"):
        Mirror("memory://bucket/run", tmp_path)


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    url = "sftp://me:s3cret@host/run"
    assert remote_objects.mask(url) == "sftp://me:***@host/run"
    assert remote_objects.mask("s3://bucket/a:b@c") == "s3://bucket/a:b@c"
    assert "s3cret" not in str(staging_for(url))
    objects = remote_objects.Objects(MemoryFileSystem(), "/run", url)
    with pytest.raises(CheckpointError) as caught, objects.speaking("no"):
        raise OSError("login me:s3cret failed")
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(CheckpointError) as caught:
        Mirror("nonsense://me:s3cret@host/run", tmp_path)
    assert "s3cret" not in str(caught.value)


def test_urls_and_where_they_are_staged(tmp_path: Path) -> None:
    assert [is_url(text) for text in ("s3://b/run", "memory://run", "runs/a", "/runs/a", "file:///runs/a")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    staging = staging_for("s3://bucket/my run", tmp_path)
    assert staging.parent == tmp_path
    assert staging.name.startswith("s3-bucket-my-run-")
    assert staging == staging_for("s3://bucket/my run/", tmp_path)
    assert staging != staging_for("s3://bucket/my-run", tmp_path)
    assert staging_for("s3://bucket/run").parent == Path.home() / ".cache" / "agentlightning"
