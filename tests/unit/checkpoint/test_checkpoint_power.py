"""Power loss, modelled: of a recorded save, what no fsync has vouched for is dropped, torn or alone in surviving.

The model knows two things. Bytes are durable after an fsync of their file; an entry (made, renamed, removed) is durable after
an fsync of its directory. Whatever else was done may be on the disk or not, each operation by itself, so the later one of two
may survive without the earlier one; of unsynced bytes any first part may be there, or zeros where they should be. A rename is
one operation, durable after an fsync of both directories: both names or neither change.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentlightning.checkpoint import CheckpointFiles, CheckpointManager, load
from agentlightning.errors import CheckpointError

LEASE = ".lease"  # holds no state and may be torn: test_checkpoint_lease.py
RANDOM_SUBSETS = 12  # at each crash point
Tree = Mapping[str, bytes | None]  # relative path -> contents, None for a directory


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of the recorded run. `inode` is the directory whose entries change, or the file that is written or synced."""

    kind: str  # link, rename, unlink, write, fsync
    inode: int
    name: str = ""
    target: int = -1  # link: what the name leads to
    new_name: str = ""
    to: int = -1  # rename: the directory of the new name
    offset: int = 0
    data: bytes = b""


@dataclass(slots=True)
class Disk:
    """Directories and files by number; 0 is the top."""

    entries: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    contents: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Disk:
        return Disk({inode: dict(names) for inode, names in self.entries.items()}, dict(self.contents))

    def add(self, is_directory: bool) -> int:
        inode = len(self.entries) + len(self.contents)
        if is_directory:
            self.entries[inode] = {}
        else:
            self.contents[inode] = b""
        return inode

    def apply(self, operation: Operation, survives: float = 1.0) -> None:
        """`survives` is how much of a write arrived; with a negative sign, that much arrived and the rest is zeros."""
        names = self.entries.get(operation.inode, {})
        if operation.kind == "link":
            names[operation.name] = operation.target
        elif operation.kind == "unlink":
            names.pop(operation.name, None)
        elif operation.kind == "rename":
            names.pop(operation.name, None)
            self.entries[operation.to][operation.new_name] = operation.target
        elif operation.kind == "write":
            data = operation.data[: int(abs(survives) * len(operation.data))]
            if survives < 0:
                data = data.ljust(len(operation.data), b"\0")
            before = self.contents[operation.inode]
            end = operation.offset + len(data)
            self.contents[operation.inode] = before[: operation.offset].ljust(operation.offset, b"\0") + data + before[end:]

    def tree(self, inode: int = 0, prefix: str = "") -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for name, child in self.entries[inode].items():
            found[prefix + name] = self.contents.get(child)
            if child in self.entries:
                found |= self.tree(child, f"{prefix}{name}/")
        return found


class Trace:
    """Everything that changes the file system below `top`, as it happens. What lies there at the start is durable."""

    def __init__(self, top: Path):
        self.top = top
        self.start = Disk()
        self._read(top, 0)
        self.now = self.start.copy()
        self.operations: list[Operation] = []

    def _read(self, directory: Path, inode: int) -> None:
        for path in sorted(directory.iterdir()):
            if path.name == LEASE:
                continue
            child = self.start.entries[inode][path.name] = self.start.add(path.is_dir())
            if path.is_dir():
                self._read(path, child)
            else:
                self.start.contents[child] = path.read_bytes()

    def find(self, path: str) -> int | None:
        """The number of what is at `path`; None for what is not modelled."""
        if not Path(path).is_relative_to(self.top):
            return None
        inode = 0
        for part in Path(path).relative_to(self.top).parts:
            if part not in self.now.entries.get(inode, {}):
                return None
            inode = self.now.entries[inode][part]
        return inode

    def note(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.now.apply(operation)

    def at(self, path: Any, dir_fd: int | None) -> tuple[int | None, str]:
        """The directory and name in it of a path as it was given to a function of os."""
        whole = os.path.abspath(os.path.join(descriptor_path(dir_fd) if dir_fd is not None else "", os.fspath(path)))
        directory, name = os.path.split(whole)
        return (None if name == LEASE else self.find(directory)), name

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Patches os itself, so that it sees what the writer's thread and shutil do."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir"):
                patch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))
            yield

    def _make(self, directory: int | None, name: str, is_directory: bool) -> None:
        if directory is not None and name not in self.now.entries[directory]:
            self.note(Operation("link", directory, name, self._new(is_directory)))

    def _new(self, is_directory: bool) -> int:
        inode = self.now.add(is_directory)
        assert self.start.add(is_directory) == inode  # nameless there until its link survives
        return inode

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **more: Any) -> int:
            descriptor = real(path, flags, *rest, dir_fd=dir_fd, **more)
            if flags & os.O_CREAT:
                self._make(*self.at(path, dir_fd), False)
            return descriptor

        return call

    def _write(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: Any) -> int:
            inode = self.find(descriptor_path(descriptor))
            written = real(descriptor, data)
            if inode is not None:
                self.note(Operation("write", inode, offset=len(self.now.contents[inode]), data=bytes(data)[:written]))
            return written

        return call

    def _fsync(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(descriptor: int) -> None:
            real(descriptor)
            inode = self.find(descriptor_path(descriptor))
            if inode is not None:
                self.note(Operation("fsync", inode))

        return call

    def _mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *rest: Any, dir_fd: int | None = None) -> None:
            real(path, *rest, dir_fd=dir_fd)
            self._make(*self.at(path, dir_fd), True)

        return call

    def _rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            real(source, target)
            (directory, name), (to, new_name) = self.at(source, None), self.at(target, None)
            assert directory is not None
            assert to is not None
            self.note(Operation("rename", directory, name, self.now.entries[directory][name], new_name, to))

        return call

    def _unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            directory, name = self.at(path, dir_fd)
            real(path, dir_fd=dir_fd)
            if directory is not None:
                self.note(Operation("unlink", directory, name))

        return call

    _replace, _remove, _rmdir = _rename, _unlink, _unlink


def descriptor_path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def unsynced(operations: Sequence[Operation], fsyncs_count: bool) -> list[int]:
    """The indices of what no later fsync in `operations` has made durable."""
    synced: set[int] = set()
    left: list[int] = []
    for index in reversed(range(len(operations))):
        operation = operations[index]
        if operation.kind == "fsync":
            synced |= {operation.inode} if fsyncs_count else set()
        elif not {operation.inode, operation.to} - {-1} <= synced:
            left.append(index)
    return left[::-1]


def survivals(operations: Sequence[Operation], open_ones: Sequence[int], rng: random.Random) -> Iterator[dict[int, float]]:
    """How much of each unsynced operation survived: both extremes, each one lost, each one alone, torn writes, random ones."""
    nothing, everything = dict.fromkeys(open_ones, 0.0), dict.fromkeys(open_ones, 1.0)
    yield nothing
    yield everything
    for index in open_ones:
        yield everything | {index: 0.0}
        yield nothing | {index: 1.0}
        if operations[index].kind == "write":
            for share in (rng.random(), rng.random(), 0.999):
                yield everything | {index: share}
                yield everything | {index: -share}
    for _ in range(RANDOM_SUBSETS if open_ones else 0):
        yield {index: rng.choice((0.0, 0.0, 1.0, 1.0, rng.random(), -rng.random())) for index in open_ones}


def after_power_loss(trace: Trace, fsyncs_count: bool) -> Iterator[tuple[int, Tree]]:
    """(operations done, what is on the disk) of every crash point, the last one first; each combination of the two once."""
    rng = random.Random(0)
    for done in reversed(range(len(trace.operations) + 1)):
        operations = trace.operations[:done]
        open_ones = unsynced(operations, fsyncs_count)
        seen: set[frozenset[tuple[str, bytes | None]]] = set()
        for survived in survivals(operations, open_ones, rng):
            disk = trace.start.copy()
            for index, operation in enumerate(operations):
                share = survived.get(index, 1.0)
                if share and (operation.kind == "write" or abs(share) == 1.0 or rng.random() < abs(share)):
                    disk.apply(operation, share)
            tree = disk.tree()
            if (key := frozenset(tree.items())) not in seen:
                seen.add(key)
                yield done, tree


def state_of(step: int) -> CheckpointFiles:
    weights = np.random.default_rng(step).standard_normal((4, 4), dtype=np.float32)
    return CheckpointFiles({"actor/adapter_model.safetensors": {"lora_A": weights}}, {"trainer_state.json": {"step": step}})


def put(tree: Tree, top: Path) -> None:
    top.mkdir()
    for relative, data in tree.items():
        if data is None:
            (top / relative).mkdir()
        else:
            (top / relative).write_bytes(data)


def start_again(root: Path) -> int | str:
    """The step that the next start resumes from, 0 if it begins from scratch; a text says what is wrong instead."""
    try:
        with CheckpointManager(root, save_freq=1, keep=1) as manager:
            loaded = manager.load_latest()
    except CheckpointError as error:
        return str(error)
    names = {name for name in os.listdir(root) if name not in (LEASE, "latest_checkpointed_iteration.txt", "verified.json")}
    if loaded is not None:
        same = loaded.json == state_of(loaded.step).json
        weights = state_of(loaded.step).tensors["actor/adapter_model.safetensors"]["lora_A"]
        if not same or not np.array_equal(loaded.tensors["actor/adapter_model.safetensors"]["lora_A"], weights):
            return f"what was loaded is not the state of step {loaded.step}"
        if loaded.skipped:
            return f"passed over: {loaded.skipped}"
    directories = {name for name in names if not name.endswith(".pt")}
    if directories != {name.removesuffix(".pt") for name in names - directories}:
        return f"left over: {sorted(names)}"
    return 0 if loaded is None else loaded.step


def allowed(trace: Trace, old: int, new: int) -> Callable[[int], set[int]]:
    """What may be resumed from after so many operations."""
    commit = next(i for i, operation in enumerate(trace.operations) if operation.new_name == f"global_step_{new}.pt")
    directory = trace.operations[commit].inode
    durable = next(
        index
        for index, operation in enumerate(trace.operations)
        if index > commit and operation.kind == "fsync" and operation.inode == directory
    )

    def at(done: int) -> set[int]:
        if done > durable:
            return {new}
        return {old, new} if done > commit else {old}

    return at


def record(top: Path, act: Callable[[CheckpointManager], object], saved: int, keep: int | None) -> Trace:
    """What `act` does to a run directory that holds so many steps."""
    root = top / "runs" / "one"
    top.mkdir()
    if saved:
        with CheckpointManager(root, save_freq=1) as manager:
            for step in range(1, saved + 1):
                manager.save(step, state_of(step))
    trace = Trace(top)
    with trace.recording(), CheckpointManager(root, save_freq=1, keep=keep) as manager:
        act(manager)
    assert trace.now.tree() == {
        str(path.relative_to(top)): None if path.is_dir() else path.read_bytes()
        for path in top.rglob("*")
        if path.name != LEASE
    }, "the recording missed something"
    return trace


SCENARIOS = {"prunes": (1, 2), "resumed": (1, 2), "first": (0, 1)}


@pytest.fixture(params=SCENARIOS)
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Trace, int, int]:
    """A save that also prunes the one before; one that keeps it, because it was read back; and the first of a new directory."""
    old, new = SCENARIOS[request.param]

    def act(manager: CheckpointManager) -> None:
        if request.param == "resumed":
            manager.load_latest()
        manager.save(new, state_of(new))
        assert (manager.root / f"global_step_{old}.pt").exists() == (request.param == "resumed")

    return record(tmp_path / "recorded", act, saved=old, keep=1), old, new


def illegal(trace: Trace, old: int, new: int, directory: Path, fsyncs_count: bool) -> Iterator[tuple[int, int | str]]:
    """(operations done, what the next start came to) wherever that is not allowed."""
    may_be = allowed(trace, old, new)
    known: dict[frozenset[tuple[str, bytes | None]], int | str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # the power stays on in here, and waiting for the disk takes long
        for done, tree in after_power_loss(trace, fsyncs_count):
            key = frozenset(tree.items())
            if key not in known:
                top = directory / str(len(known))
                put(tree, top)
                known[key] = start_again(top / "runs" / "one")
            if known[key] not in may_be(done):
                yield done, known[key]
    assert len(known) > 60


def test_every_legal_state_loads_the_old_or_the_new_checkpoint(recorded: tuple[Trace, int, int], tmp_path: Path) -> None:
    """The old one before its record has its name; the new one from the fsync after that, so also when `save` has returned."""
    assert list(illegal(*recorded, tmp_path, fsyncs_count=True)) == []


def test_without_the_fsyncs_there_would_be_illegal_states(recorded: tuple[Trace, int, int], tmp_path: Path) -> None:
    """Else the test above could not fail."""
    assert next(illegal(*recorded, tmp_path, fsyncs_count=False), None) is not None


@pytest.mark.parametrize("act", ["go_back", "start_over"])
def test_what_is_moved_aside_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Each checkpoint is whole in its place or in an aside directory, and the run can be started as before."""

    def go_back(manager: CheckpointManager) -> None:
        manager.load(1)
        manager.go_on()

    trace = record(tmp_path / "recorded", go_back if act == "go_back" else CheckpointManager.start_over, saved=3, keep=None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    trees = {frozenset(tree.items()): tree for _, tree in after_power_loss(trace, fsyncs_count=True)}
    assert len(trees) > 20
    for number, tree in enumerate(trees.values()):
        put(tree, tmp_path / str(number))
        root = tmp_path / str(number) / "runs" / "one"
        for step in (1, 2, 3):
            places = [path for path in (root, *root.glob("aside-*")) if (path / f"global_step_{step}").exists()]
            assert len(places) == 1
            assert load(places[0] / f"global_step_{step}").json == state_of(step).json
        with CheckpointManager(root, save_freq=1) as manager:
            if act == "go_back":
                assert manager.load(1).step == 1
                manager.go_on()
                assert [path.name for path in root.glob("*.pt")] == ["global_step_1.pt"]
            else:
                manager.start_over()
                assert manager.load_latest() is None
