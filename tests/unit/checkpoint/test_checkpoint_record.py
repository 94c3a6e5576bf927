"""The record: torch.load reads it, nothing in it is run, and no flipped bit or missing byte goes unseen."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from agentlightning.checkpoint import CheckpointFiles, CheckpointRecord, find_valid, read_record, save, write_record
from agentlightning.checkpoint.record import MAX_RECORD_BYTES, list_records
from agentlightning.errors import CheckpointError

RECORD = CheckpointRecord("n", 40, 40, "n", "n/actor", "0" * 32, {"score": 0.5, "tags": ["a", None], "deep": {"b": True}})


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def save_one(root: Path, step: int) -> None:
    save(root, f"global_step_{step}", step, CheckpointFiles({"a.safetensors": {"x": np.zeros(3, np.float32)}}))


def test_it_comes_back_with_paths_beside_it(tmp_path: Path) -> None:
    path = write_record(tmp_path, RECORD)
    back = read_record(path)
    assert path == tmp_path / "n.pt"
    assert (back.state_path, back.sampler_path) == (str(tmp_path / "n"), str(tmp_path / "n" / "actor"))
    assert (back.name, back.step, back.batch, back.digest, back.extra) == ("n", 40, 40, "0" * 32, RECORD.extra)
    assert os.listdir(tmp_path) == ["n.pt"]


def test_absolute_paths_and_urls_stay(tmp_path: Path) -> None:
    back = read_record(write_record(tmp_path, CheckpointRecord("n", 1, 1, "tinker://run/weights/1", "/abs/actor")))
    assert (back.state_path, back.sampler_path) == ("tinker://run/weights/1", "/abs/actor")


def test_any_loop_reads_it_with_torch(tmp_path: Path) -> None:
    plain = torch.load(write_record(tmp_path, RECORD), weights_only=True)
    assert type(plain) is dict
    assert (plain["name"], plain["batch"], plain["state_path"]) == ("n", 40, "n")


def test_what_would_not_come_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no plain value"):
        write_record(tmp_path, CheckpointRecord("n", 1, 1, "n", None, extra={"path": tmp_path}))
    assert os.listdir(tmp_path) == []


def test_a_flipped_bit_anywhere_counts(tmp_path: Path) -> None:
    path = write_record(tmp_path, RECORD)
    good = path.read_bytes()
    for position in range(0, len(good), 5):
        data = bytearray(good)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_record(path)


def test_a_truncation_anywhere_counts(tmp_path: Path) -> None:
    path = write_record(tmp_path, RECORD)
    good = path.read_bytes()
    for length in (*range(0, len(good), 7), len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            read_record(path)


def test_records_of_other_loops_are_read(tmp_path: Path) -> None:
    torch.save({"batch": 12, "state_path": "tinker://run/weights/12", "loss": 0.5}, tmp_path / "cookbook.pt")
    record = read_record(tmp_path / "cookbook.pt")
    assert (record.name, record.step, record.batch, record.digest) == ("cookbook", 12, 12, None)
    assert record.state_path == "tinker://run/weights/12"
    assert record.extra == {"loss": 0.5}


def test_a_foreign_record_that_leads_to_a_checkpoint_is_one(tmp_path: Path) -> None:
    save_one(tmp_path / "elsewhere", 5)
    run = tmp_path / "run"
    save_one(run, 3)
    torch.save({"batch": 9, "state_path": str(tmp_path / "elsewhere" / "global_step_5")}, run / "mine.pt")
    loaded = find_valid(run)
    assert loaded is not None
    assert loaded.record.batch == 9
    assert loaded.path == tmp_path / "elsewhere" / "global_step_5"


def test_flipped_bits_in_the_contents_of_a_foreign_record_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"batch": 12, "state_path": "somewhere/else"}, path)
    good = path.read_bytes()
    start = good.index(b"somewhere/else")
    for position in range(start, start + len("somewhere/else")):
        data = bytearray(good)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            read_record(path)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trap, root = tmp_path / "trap", tmp_path / "run"
    save_one(root, 1)
    torch.save({"batch": 99, "state_path": "x", "bomb": RunsCode(trap)}, root / "zip.pt")
    torch.save({"batch": 99, "bomb": RunsCode(trap)}, root / "old.pt", _use_new_zipfile_serialization=False)
    (root / "bare.pt").write_bytes(pickle.dumps(RunsCode(trap)))
    loaded = find_valid(root)
    assert not trap.exists()
    assert loaded is not None
    assert loaded.step == 1
    assert {name for name, _ in loaded.skipped} == {"zip.pt", "old.pt", "bare.pt"}
    torch.load(root / "zip.pt", weights_only=False)  # the trap is a real one
    assert trap.exists()


def test_what_is_no_record_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("not a zip file")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.pt")
    with open(tmp_path / "large.pt", "wb") as file:
        file.truncate(MAX_RECORD_BYTES + 1)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme", "no pickle in here")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    torch.save({"batch": "7", "state_path": "x"}, tmp_path / "text_batch.pt")
    torch.save({"batch": -1, "state_path": "x"}, tmp_path / "negative.pt")
    torch.save({"batch": True, "state_path": "x"}, tmp_path / "boolean.pt")
    torch.save({"batch": 7}, tmp_path / "no_state.pt")
    (tmp_path / ".hidden.pt").touch()
    readable, unreadable = list_records(tmp_path)
    assert readable == []
    reasons = dict(unreadable)
    assert reasons.keys() == {path.name for path in tmp_path.iterdir()} - {".hidden.pt"}
    assert "empty" in reasons["empty.pt"]
    assert "no file" in reasons["folder.pt"]
    assert "no file" in reasons["gone.pt"]
    assert "no file" in reasons["pipe.pt"]
    assert "bytes" in reasons["large.pt"]
    assert "list" in reasons["list.pt"]
    for name in ("weights.pt", "text_batch.pt", "negative.pt", "boolean.pt"):
        assert "`batch`" in reasons[name]
    assert "`state_path`" in reasons["no_state.pt"]
