"""The order of a save: nothing gets its name before its bytes and its entry are on the disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentlightning.checkpoint import CheckpointFiles, save


def traced_save(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The ("write" | "fsync", path) and ("rename", new path) of a save, in their order; staged names without their uuid."""
    trace: list[tuple[str, str]] = []
    real_write, real_fsync, real_rename = os.write, os.fsync, os.rename

    def plain(path: str) -> str:
        parts = Path(path).relative_to(root).parts
        return "/".join("staged:" + part.rsplit(".", 2)[0][1:] if part.endswith(".tmp") else part for part in parts) or "root"

    def of(descriptor: int) -> str:
        return plain(os.readlink(f"/proc/self/fd/{descriptor}"))

    def write(descriptor: int, data: Any) -> int:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            trace.append(("write", of(descriptor)))
        return real_write(descriptor, data)

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        trace.append(("fsync", of(descriptor)))

    def rename(source: str, target: str) -> None:
        real_rename(source, target)
        trace.append(("rename", plain(os.fspath(target))))

    arrays = {"x": np.zeros(4, np.float32)}
    files = CheckpointFiles({"actor/adapter_model.safetensors": arrays, "critic/deep/a.safetensors": arrays}, {"s.json": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", rename)
        save(root, "n", 1, files)
    return trace


def test_bytes_then_entries_then_names_then_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced_save(tmp_path, monkeypatch)
    directory, record = trace.index(("rename", "n")), trace.index(("rename", "n.pt"))
    before, between, after = trace[:directory], trace[directory + 1 : record], trace[record + 1 :]
    written = [path for call, path in before if call == "write"]
    assert sorted(set(written)) == [
        "staged:n.pt",
        "staged:n/actor/adapter_model.safetensors",
        "staged:n/critic/deep/a.safetensors",
        "staged:n/manifest.json",
        "staged:n/s.json",
    ]
    for path in written:  # every byte of every file
        last_write = max(index for index, entry in enumerate(before) if entry == ("write", path))
        assert ("fsync", path) in before[last_write:]
    for folder in ("staged:n", "staged:n/actor", "staged:n/critic", "staged:n/critic/deep"):  # after all that was put into it
        last_write = max(
            index for index, (call, path) in enumerate(before) if call == "write" and path.startswith(folder + "/")
        )
        assert ("fsync", folder) in before[last_write:]
    assert before[-1] == ("fsync", "root")  # the hidden record, the sign by which a nameless directory is known
    assert between == [("fsync", "root")]
    assert after == [("fsync", "root")]
