"""Bytes that rot, disks that fill, directories that vanish: detected, named, and the last good checkpoint stays."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentlightning.checkpoint import CheckpointFiles, CheckpointManager, find_valid, load, save
from agentlightning.checkpoint.manifest import FileEntry, build, digest, encode_json, parse, verified_bytes
from agentlightning.errors import CheckpointError

ADAPTER = "actor/adapter_model.safetensors"


def files_of(step: int) -> CheckpointFiles:
    rng = np.random.default_rng(step)
    weights = {"lora_A": rng.standard_normal((4, 8), dtype=np.float32)}
    return CheckpointFiles({ADAPTER: weights}, {"trainer_state.json": {"step": step}}, {"breaking": {"r": 4}})


def save_steps(root: Path, *steps: int) -> None:
    for step in steps:
        save(root, f"global_step_{step}", step, files_of(step))


def expect_fallback(root: Path, step: int, reason: str) -> None:
    """The newest is passed over, by name and with the reason, for `step`."""
    loaded = find_valid(root)
    assert loaded is not None
    assert loaded.step == step
    ((name, why),) = loaded.skipped
    assert name == f"global_step_{step + 1}.pt"
    assert reason in why


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    directory = tmp_path / "global_step_2"
    targets = [path for path in (tmp_path / "global_step_2.pt", *sorted(directory.rglob("*"))) if path.is_file()]
    assert len(targets) == 4
    rng = random.Random(0)
    for path in targets:
        good = path.read_bytes()
        for _ in range(75):
            data = bytearray(good)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            loaded = find_valid(tmp_path)
            assert loaded is not None
            assert loaded.step == 1, path
            assert [name for name, _ in loaded.skipped] == ["global_step_2.pt"]
        path.write_bytes(good)
    whole = find_valid(tmp_path)
    assert whole is not None
    assert whole.step == 2


def test_every_bit_of_a_manifest_counts_without_a_record_too() -> None:
    good, _ = build("n", 1, {"a.json": FileEntry(3, "xxh3_128", "0" * 32)}, {"breaking": {"lr": 1e-05}}, {})
    assert parse(good)["step"] == 1
    for position in range(len(good) * 8):
        data = bytearray(good)
        data[position // 8] ^= 1 << (position % 8)
        with pytest.raises(CheckpointError):
            parse(bytes(data))


@pytest.mark.parametrize("name", [ADAPTER, "trainer_state.json", "manifest.json"])
def test_truncated_lengthened_or_missing_files_are_found(tmp_path: Path, name: str) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "global_step_2" / name
    good = path.read_bytes()
    for data in (b"", good[:-1], good[: len(good) // 2], good + b"\0"):
        path.write_bytes(data)
        expect_fallback(tmp_path, 1, "manifest")
    path.unlink()
    expect_fallback(tmp_path, 1, name)


def test_an_exchanged_directory_is_found(tmp_path: Path) -> None:
    """Whole in itself, but not the one that the record was written for."""
    save_steps(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "global_step_2")
    shutil.copytree(tmp_path / "global_step_1", tmp_path / "global_step_2")
    expect_fallback(tmp_path, 1, "not the one")


def test_a_record_whose_directory_is_gone_is_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "global_step_2")
    expect_fallback(tmp_path, 1, "manifest.json")


def test_none_valid_is_an_error_that_names_all_and_the_override(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "global_step_1.pt").write_bytes(b"")
    (tmp_path / "global_step_2" / ADAPTER).unlink()
    with pytest.raises(CheckpointError) as caught:
        find_valid(tmp_path)
    message = str(caught.value)
    assert "global_step_1.pt: the file is empty" in message
    assert f"global_step_2.pt: {ADAPTER} is missing" in message
    assert "trainer.resume_mode=disable" in message


def sealed(directory: Path, **changes: Any) -> dict[str, Any]:
    """Give a directory a manifest that is changed and yet bears a right seal, as a forger would."""
    manifest = parse((directory / "manifest.json").read_bytes())
    body = {key: value for key, value in (manifest | changes).items() if key != "digest"}
    text = encode_json({**body, "digest": digest(encode_json(body))})
    (directory / "manifest.json").write_bytes(text)
    return body


@pytest.mark.parametrize(
    "escape", ["../secret.json", "{absolute}", "a/../../secret.json", "link/secret.json", "link.json", "\0.json"]
)
def test_a_manifest_that_leads_out_of_its_directory_is_refused(tmp_path: Path, escape: str) -> None:
    root = tmp_path / "run"
    save_steps(root, 1)
    secret = root / "secret.json"
    secret.write_bytes(b"1\n")
    (root / "global_step_1" / "link").symlink_to(root)
    (root / "global_step_1" / "link.json").symlink_to(secret)
    relative = escape.format(absolute=secret)
    sealed(root / "global_step_1", files={relative: {"size": 2, "xxh3_128": digest(b"1\n")}})
    (root / "global_step_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"plain path|leads out"):
        load(root / "global_step_1")


def test_forged_manifests_are_passed_over_and_do_not_crash(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    directory = tmp_path / "global_step_1"
    good = (directory / "manifest.json").read_bytes()
    (tmp_path / "global_step_1.pt").unlink()
    for changes in ({"files": []}, {"files": {"a.json": 3}}, {"files": {"a.json": {"size": 1}}}, {"more": 1}, {"schema": 2}):
        sealed(directory, **changes)
        with pytest.raises(CheckpointError):
            load(directory)
        (directory / "manifest.json").write_bytes(good)
    for text in (b"", b"[]", b"{}", b"[" * 100_000, b'"text"', b"\xff"):
        (directory / "manifest.json").write_bytes(text)
        with pytest.raises(CheckpointError):
            load(directory)


def test_a_file_that_is_no_safetensors_file_is_no_crash(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "global_step_1.pt").unlink()
    data = b"no tensors in here"
    (tmp_path / "global_step_1" / "x.safetensors").write_bytes(data)
    sealed(tmp_path / "global_step_1", files={"x.safetensors": {"size": len(data), "xxh3_128": digest(data)}})
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(tmp_path / "global_step_1")


def test_what_is_checked_is_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is opened once: bytes exchanged after the check cannot get in."""
    save_steps(tmp_path, 1)
    manifest = parse((tmp_path / "global_step_1" / "manifest.json").read_bytes())
    reads: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (reads.append(Path(path).name), real(path, *rest))[1])
    assert verified_bytes(tmp_path / "global_step_1", manifest).keys() == manifest["files"].keys()
    load(tmp_path / "global_step_1")
    assert reads.count("adapter_model.safetensors") == 2  # once in each of the two calls


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, k: int, code: int) -> Callable[[], bool]:
    """The k-th call of `os.<name>` raises, a full disk also all later ones. Returns whether it came to that."""
    real, calls = getattr(os, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == k or (calls > k and code == errno.ENOSPC):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)
    return lambda: calls >= k


def try_to_save(manager: CheckpointManager) -> tuple[str, str]:
    """The notes of a save of step 2 that worked, or its error."""
    try:
        return " ".join(manager.save(2, files_of(2)).notes), ""
    except CheckpointError as error:
        return "", str(error)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EDQUOT),
        ("write", errno.EIO),
        ("open", errno.EMFILE),
        ("open", errno.EROFS),
        ("fsync", errno.EIO),
        ("mkdir", errno.ENOSPC),
        ("rename", errno.EIO),
    ],
)
def test_a_save_that_the_disk_refuses_anywhere(tmp_path: Path, name: str, code: int) -> None:
    """Whichever call fails: an error with path and bytes, the last good one stays, nothing is left, and the next save works."""
    for k in range(1, 100):
        root = tmp_path / str(k)
        with CheckpointManager(root, save_freq=10) as manager:
            manager.save(1, files_of(1))
            with pytest.MonkeyPatch.context() as patch:
                came_to_it = fail_at(patch, name, k, code)
                notes, error = try_to_save(manager)
            if error:
                assert manager.failed == error
                assert re.search(rf"global_step_2 was not saved: {os.strerror(code)} at .* needs [\d,]+ bytes", error)
            elif came_to_it() and name != "mkdir":  # (a directory that is there already need not be made)
                assert os.strerror(code) in notes  # what fails after the commit is told, and costs nothing
            if not came_to_it():
                assert k > 2 or name == "mkdir"
                return
            expected = 1 if manager.failed else 2
            assert manager.should_save(3, is_last=False) is (manager.failed is not None)
            loaded = find_valid(root)
            assert loaded is not None
            assert loaded.step == expected
            assert loaded.skipped == ()
            manager.save(3, files_of(3))
            assert manager.failed is None
        with CheckpointManager(root, save_freq=10) as manager:
            assert not [entry for entry in os.listdir(root) if entry.endswith(".tmp")]
            loaded = manager.load_latest()
            assert loaded is not None
            assert loaded.step == 3
            assert loaded.skipped == ()
    raise AssertionError("the save never came through")


def test_a_full_disk_gets_its_bytes_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    before = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patch:
        fail_at(patch, "write", 2, errno.ENOSPC)
        with pytest.raises(CheckpointError, match=r"it needs [\d,]+ bytes, [\d,]+ are free .*max_actor_ckpt_to_keep"):
            save_steps(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_interrupt_in_a_save_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    before = sorted(os.listdir(tmp_path))

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_steps(tmp_path, 2)
    assert [entry for entry in sorted(os.listdir(tmp_path)) if not entry.endswith(".tmp")] == before
    with CheckpointManager(tmp_path, save_freq=1):
        assert sorted(entry for entry in os.listdir(tmp_path) if entry != ".lease") == before


def test_a_directory_removed_under_the_run_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with CheckpointManager(root, save_freq=1) as manager:
        manager.save(1, files_of(1))
        shutil.rmtree(root)
        manager.save(2, files_of(2))
        loaded = manager.load_latest()
        assert loaded is not None
        assert loaded.step == 2


def test_a_root_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written.*trainer\.default_local_dir"):
        CheckpointManager(tmp_path / "file" / "run", save_freq=1)
    with pytest.raises(CheckpointError, match=r"was not saved.*trainer\.default_local_dir"):
        save_steps(tmp_path / "file" / "run", 1)


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2)
    real = os.readv

    def bad_sector(descriptor: int, buffers: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path / "global_step_2" / ADAPTER):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "readv", bad_sector)
    expect_fallback(tmp_path, 1, "Input/output error")
