"""What strangers leave in a run directory is never run and never in the way; a disk that stays broken costs no checkpoint."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint import record as records
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.store import CheckpointFiles, find_valid, save
from agentlightning.errors import CheckpointError


def state_of(step: int) -> CheckpointFiles:
    array = np.random.default_rng(step).standard_normal((6, 5), dtype=np.float32)
    return CheckpointFiles(
        tensors={
            "actor/adapter_model.safetensors": {"lora_A": array, "lora_B": array[:0]},
            "critic/value_head.safetensors": {"head": array.T, "step": np.array(step)},
        },
        json={"trainer_state.json": {"step": step, "wandb": None, "best": 0.5, "names": ["a", "ü"]}},
        fingerprint={"breaking": {"lora_rank": 8}, "harmless": {}},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run directory with steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "run", f"global_step_{step}", step, state_of(step))
    return tmp_path / "run"


@pytest.mark.parametrize("state_path", ["s3://bucket/x", "nowhere", "/nowhere", "", "global_step_2.pt", "global_step_2/actor"])
def test_a_record_of_another_loop_whose_state_is_not_ours_is_passed_over(root: Path, state_path: str) -> None:
    torch.save({"batch": 3, "state_path": state_path}, root / "theirs.pt")
    loaded = find_valid(root)
    assert loaded is not None
    assert loaded.step == 2
    ((name, reason),) = loaded.skipped
    assert name == "theirs.pt"
    assert state_path in reason


class _Evil:
    def __init__(self, command: tuple[Callable[..., Any], tuple[Any, ...]]):
        self.command = command

    def __reduce__(self):
        return self.command


def sealed(data: bytes) -> bytes:
    """`data`, a zip file, with a seal as a forger would put it."""
    start = data[:-2] + struct.pack("<H", records._SEAL_BYTES)
    return start + records._SEAL_PREFIX + manifests.digest(start).encode()


@pytest.mark.parametrize("form", ["zip", "sealed zip", "legacy", "bare pickle"])
def test_a_pickle_that_would_run_code_is_never_run(root: Path, tmp_path: Path, form: str) -> None:
    mark = tmp_path / "ran"
    for command in ((Path.touch, (mark,)), (os.mkdir, (str(mark),)), (exec, (f"open({str(mark)!r}, 'w')",))):
        value = {"schema": 1, "digest": "", "batch": 9, "step": 9, "state_path": "global_step_2", "extra": _Evil(command)}
        buffer = io.BytesIO()
        if form == "bare pickle":
            pickle.dump(value, buffer)
        else:
            torch.save(value, buffer, _use_new_zipfile_serialization=form != "legacy")
        data = buffer.getvalue()
        (root / "global_step_9.pt").write_bytes(sealed(data) if form == "sealed zip" else data)
        loaded = find_valid(root)
        assert not mark.exists()
        assert loaded is not None
        assert loaded.step == 2
        assert [name for name, _ in loaded.skipped] == ["global_step_9.pt"]
        with CheckpointManager(root, save_freq=1, keep=1) as manager, pytest.raises(CheckpointError):
            manager.load(str(root / "global_step_9.pt"))
        assert not mark.exists()


def test_the_evil_pickle_of_these_tests_would_run(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    pickle.loads(pickle.dumps(_Evil((os.mkdir, (str(tmp_path / "ran"),)))))
    assert (tmp_path / "ran").exists()


FAILING = ("open", "write", "fsync", "mkdir", "rename")


def fail_from(monkeypatch: pytest.MonkeyPatch, name: str, k: int) -> None:
    """From its k-th call on `os.<name>` fails."""
    real, calls = getattr(os, name), count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= k:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


def find_step(root: Path) -> int:
    loaded = find_valid(root)
    assert loaded is not None
    assert loaded.skipped == ()
    assert loaded.json == state_of(loaded.step).json
    return loaded.step


@pytest.mark.parametrize("name", FAILING)
def test_a_disk_that_stays_broken_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From the k-th call on nothing works any more, the cleaning up after the failure included."""
    for k in count(1):
        root = tmp_path / str(k)
        save(root, "global_step_1", 1, state_of(1))
        with monkeypatch.context() as patch:
            fail_from(patch, name, k)
            try:
                save(root, "global_step_2", 2, state_of(2))
                failed = False
            except CheckpointError:
                failed = True
        if not failed:
            assert find_step(root) == 2
            break
        assert find_step(root) in (1, 2)
        with CheckpointManager(root, save_freq=1) as manager:
            loaded = manager.load_latest()
            assert loaded is not None
            manager.save(3, state_of(3))
            assert find_step(root) == 3
            assert [path for path in os.listdir(root) if path.endswith(".tmp")] == []


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    save(tmp_path, "global_step_1", 1, state_of(1))
    assert find_step(tmp_path) == 1
