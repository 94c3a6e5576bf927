"""`agl ckpt verify`: one wrong byte anywhere is found and named, and what is good is remembered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint import read_record
from agentlightning.checkpoint.record import list_records
from agentlightning.checkpoint.retention import verified_at
from agentlightning.cli import main
from agentlightning.tools import verify
from agentlightning.tools.verify import verify_checkpoint, verify_run

MakeRun = Callable[..., Path]


def marked(root: Path) -> set[str]:
    return set(verified_at(root, (record for _, record in list_records(root)[0])))


def test_good_ones_are_marked(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (None, None, None))
    assert main(["ckpt", "verify", str(root), "2"]) == 0
    assert marked(root) == {"global_step_2"}
    assert "good    global_step_2" in capsys.readouterr().out
    assert main(["ckpt", "verify", str(root), "--json"]) == 0
    assert [report["state"] for report in json.loads(capsys.readouterr().out)] == ["good"] * 3
    assert marked(root) == {"global_step_1", "global_step_2", "global_step_3"}


def test_every_file_is_read(make_run: MakeRun) -> None:
    root = make_run("run", (None,))
    directory = root / "global_step_1"
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != manifests.MANIFEST]
    found = verify_checkpoint(directory, read_record(root / "global_step_1.pt").digest)
    assert found.problems == ()
    assert found.bytes == sum(path.stat().st_size for path in files)
    for path in [*files, directory / manifests.MANIFEST]:
        data = path.read_bytes()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        (problem,) = verify_checkpoint(directory).problems
        assert problem.startswith(str(path.relative_to(directory)))
        path.write_bytes(data)
    assert verify_checkpoint(directory).problems == ()


def test_blocks_and_the_other_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files longer than a block, of no bytes, and digests of the kind that object stores give."""
    monkeypatch.setattr(verify._reader, "buffer", memoryview(bytearray(7)))
    for size in (0, 1, 7, 8, 100):
        data = os.urandom(size)
        (tmp_path / "f").write_bytes(data)
        assert verify._digest(verify.Disk(tmp_path), tmp_path / "f", "sha256") == (size, hashlib.sha256(data).hexdigest())
        assert verify._digest(verify.Disk(tmp_path), tmp_path / "f", "xxh3_128") == (size, manifests.digest(data))


def test_each_fault_is_named(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (None,) * 6)
    (root / "global_step_1" / "trainer_state.json").unlink()
    with (root / "global_step_2" / "actor" / "adapter_config.json").open("ab") as file:
        file.write(b" ")
    (root / "global_step_3.pt").write_bytes(b"")
    shutil.rmtree(root / "global_step_4")
    shutil.rmtree(root / "global_step_5")
    shutil.copytree(root / "global_step_6", root / "global_step_5")  # whole, but not the record's own
    torch.save({"batch": 20, "state_path": "elsewhere"}, root / "000020.pt")
    assert main(["ckpt", "verify", str(root), "--json"]) == 1
    reports = {report["name"]: report for report in json.loads(capsys.readouterr().out)}
    assert {name: report["state"] for name, report in reports.items() if report["state"] != "bad"} == {
        "000020": "foreign",
        "global_step_6": "good",
    }
    for step, words in enumerate(
        ["is missing", "the manifest says", "is empty", "directory is missing", "not the one"], start=1
    ):
        problems = " ".join(reports[f"global_step_{step}"]["problems"])
        assert words in problems
    assert marked(root) == {"global_step_6"}
    assert main(["ckpt", "verify", str(root), "6"]) == 0
    assert main(["ckpt", "verify", str(root), "2", "6"]) == 1
    assert "bad     global_step_2" in capsys.readouterr().out


def test_a_copy_without_its_record_is_judged_by_its_manifest(make_run: MakeRun) -> None:
    root = make_run("run", (None,))
    (root / "global_step_1.pt").unlink()
    (report,) = verify_run(root, ["global_step_1"])
    assert (report.state, "no record" in (report.note or "")) == ("good", True)
    assert not (root / "verified.json").exists()


def test_what_leads_out_of_the_checkpoint_is_not_read(make_run: MakeRun) -> None:
    root = make_run("run", (None,))
    state = root / "global_step_1" / "trainer_state.json"
    state.rename(root / "outside.json")
    state.symlink_to(root / "outside.json")
    (problem,) = verify_checkpoint(root / "global_step_1").problems
    assert "leads out of the checkpoint's directory" in problem


def test_a_directory_that_cannot_be_written_is_verified_all_the_same(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run("run", (None,))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(verify, "mark_verified", refuse)
    (report,) = verify_run(root)
    assert report.state == "good"
    assert "Read-only" in (report.note or "")


def test_one_that_is_pruned_meanwhile_is_not_bad(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentlightning.checkpoint.retention import discard

    root = make_run("run", (None, None))
    real = verify.verify_checkpoint

    def lose(directory: Path, digest: str | None, source: verify.Source) -> verify.Verified:
        if directory.name == "global_step_1":
            discard(root, ["global_step_1"])
        return real(directory, digest, source)

    monkeypatch.setattr(verify, "verify_checkpoint", lose)
    assert [report.state for report in verify_run(root)] == ["good", "gone"]
