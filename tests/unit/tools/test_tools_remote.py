"""`agl ckpt ls`, `verify`, `diff` and `export` of a run at a URL: what they say of a directory they say of the URL."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from made_runs import ACC, files_of
from made_urls import BUCKET, objects, push, put, remove

from agentlightning.checkpoint import save
from agentlightning.checkpoint.record import MAX_RECORD_BYTES
from agentlightning.cli import main
from agentlightning.tools import remote
from agentlightning.tools.listing import list_checkpoints
from agentlightning.tools.places import open_places
from agentlightning.tools.runs import policy_of

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("nothing_stays")


# ---- ls


def test_ls_says_of_a_url_what_it_says_of_a_directory(any_url: str, make_run: MakeRun, capsys: Captured) -> None:
    root = make_run("run", (0.1, 0.9, 0.2), max_actor_ckpt_to_keep=1, keep_best_by=ACC)
    push(root, any_url)
    local = list_checkpoints(root, policy_of(root))
    with open_places() as places:
        picture = places.run(any_url)
        assert replace(list_checkpoints(picture, policy_of(picture)), run=str(root)) == local
    assert [row.kept for row in local.rows] == [("newest 1",), (f"best by {ACC}",), ()]
    assert main(["ckpt", "ls", any_url + "/", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], [row["step"] for row in told["rows"]]) == (any_url, [3, 2, 1])


def test_ls_reads_only_small_objects(
    url: str, make_run: MakeRun, read_objects: list[tuple[str, str]], capsys: Captured
) -> None:
    push(make_run("run", (0.1, 0.9)), url)
    read_objects.clear()
    assert main(["ckpt", "ls", url]) == 0
    assert set(read_objects) <= {
        ("cat_file", name)
        for step in (1, 2)
        for name in (f"global_step_{step}.pt", f"global_step_{step}/manifest.json", "config.yaml", "verified.json")
    }
    assert "global_step_2" in capsys.readouterr().out


def test_every_fault_at_a_url_has_its_row(url: str, make_run: MakeRun, read_objects: list[tuple[str, str]]) -> None:
    push(make_run("run", (None,) * 8), url)
    put(url, "global_step_1.pt", b"torn")
    remove(url, "global_step_2/trainer_state.json")
    put(url, "global_step_3/trainer_state.json", b"{}")
    put(url, "global_step_4/manifest.json", b"{}")
    remove(url, "global_step_5")
    remove(url, "global_step_6.pt")
    remove(url, "global_step_7.pt")
    put(url, f".global_step_7.{uuid.uuid4().hex}.tmp", b'{"checkpoint": "global_step_7"}')
    with tempfile.TemporaryFile() as file:
        torch.save({"batch": 20, "state_path": "gs://elsewhere/20"}, file)
        file.seek(0)
        put(url, "000020.pt", file.read())
    fs, path = fsspec.url_to_fs(f"{url}/000020.pt")
    fs.store[path].modified = datetime(2025, 1, 31, 12, tzinfo=UTC)
    put(url, "weights.pt", b"\0" * (MAX_RECORD_BYTES + 1))
    with open_places() as places:
        picture = places.run(url)
        rows = {row.name: row for row in list_checkpoints(picture, policy_of(picture)).rows}
    problems = {
        "global_step_1": "cannot be read",
        "global_step_2": "trainer_state.json is missing",
        "global_step_3": "trainer_state.json has 2 bytes",
        "global_step_4": "no manifest",
        "global_step_5": "directory is missing",
        "global_step_6": "a directory without its record",
        "global_step_7": "a save or prune is under way, or died",
        "weights": "a record has at most",
    }
    assert {name for name, row in rows.items() if row.state == "bad"} == set(problems)
    for name, words in problems.items():
        assert words in (rows[name].problem or "")
    assert (rows["000020"].state, rows["global_step_8"].state) == ("foreign", "whole")
    assert rows["000020"].saved_at == "2025-01-31T12:00:00+00:00"
    assert ("cat_file", "weights.pt") not in read_objects


# ---- verify


def test_verify_finds_one_wrong_bit_and_marks_the_good(
    any_url: str, make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 100)  # several requests a file
    root = make_run("run", (None, None))
    push(root, any_url)
    name = "global_step_1/actor/adapter_model.safetensors"
    data = objects(any_url)[name]
    put(any_url, name, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert main(["ckpt", "verify", any_url, "--json"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["state"], good["note"], bad["state"]) == ("good", None, "bad")
    assert bad["problems"] == ["actor/adapter_model.safetensors does not match its digest"]
    assert good["bytes"] == sum(
        len(data) for name, data in objects(any_url).items() if name.startswith("global_step_2/") and "manifest" not in name
    )
    assert set(json.loads(objects(any_url)["verified.json"])) == {"global_step_2"}
    assert main(["ckpt", "verify", any_url, "2"]) == 0
    capsys.readouterr()
    assert main(["ckpt", "ls", any_url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["verified_at"] is not None


def test_verify_puts_nothing_on_the_disk(url: str, make_run: MakeRun, read_objects: list[tuple[str, str]]) -> None:
    push(make_run("run", (None,)), url)
    assert main(["ckpt", "verify", url]) == 0
    assert "get_file" not in {how for how, _ in read_objects}
    assert ("cat_file", "global_step_1/actor/adapter_model.safetensors") in read_objects


def test_a_mark_takes_none_from_checkpoints_that_came_meanwhile(
    url: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run("run", (None,))
    push(root, url)
    theirs = {"global_step_2": {"digest": "of another", "at": "2025-01-31T12:00:00+00:00"}}
    real = remote.RemoteRun.has

    def come(self: remote.RemoteRun, path: Path) -> bool:
        put(url, "global_step_2.pt", b"came")
        put(url, "verified.json", json.dumps(theirs).encode())
        return real(self, path)

    monkeypatch.setattr(remote.RemoteRun, "has", come)
    assert main(["ckpt", "verify", url]) == 0
    marks = json.loads(objects(url)["verified.json"])
    assert set(marks) == {"global_step_1", "global_step_2"}
    assert marks["global_step_2"] == theirs["global_step_2"]


def test_one_that_cannot_be_marked_is_good_all_the_same(
    url: str, make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(make_run("run", (None,)), url)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    assert main(["ckpt", "verify", url]) == 0
    assert f"good, but {url}/verified.json cannot be written to remember it (Access Denied)" in capsys.readouterr().out


def test_one_that_its_run_prunes_meanwhile_is_not_bad(
    url: str, make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run("run", (None, None))
    push(root, url)
    real = remote.RemoteRun.blocks

    def lose(self: remote.RemoteRun, path: Path) -> Iterator[bytes]:
        if "global_step_1" in path.parts and "global_step_1.pt" in objects(url):
            remove(url, "global_step_1.pt")
            remove(url, "global_step_1")
        return real(self, path)

    monkeypatch.setattr(remote.RemoteRun, "blocks", lose)
    assert main(["ckpt", "verify", url, "--json"]) == 0
    assert [report["state"] for report in json.loads(capsys.readouterr().out)] == ["good", "gone"]


# ---- diff and export


@pytest.mark.parametrize(
    "end", ["/1", "/global_step_1", "/global_step_1/", "/global_step_1.pt", "/global_step_1/actor", "", "/"]
)
def test_what_a_person_may_call_a_checkpoint(url: str, make_run: MakeRun, end: str) -> None:
    push(make_run("run", (None, None)), url)
    with open_places() as places:
        directory = places.checkpoint(url + end, None)
        assert places.shown(directory) == f"{url}/global_step_{1 if end.strip('/') else 2}"
        assert (directory / "trainer_state.json").read_bytes() == objects(url)[f"{directory.name}/trainer_state.json"]


def test_diff_of_urls_and_directories(any_url: str, make_run: MakeRun, capsys: Captured) -> None:
    root = make_run("run", (None, 0.5))
    push(root, any_url)
    assert main(["ckpt", "diff", f"{root}/1", f"{root}/2", "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    names = {f"global_step_{step}" for step in (1, 2)}
    for words in ([f"{any_url}/1", any_url], ["1", "2", "--run", any_url], [f"{root}/1", f"{any_url}/2"]):
        assert main(["ckpt", "diff", *words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert {Path(told["a"]).name, Path(told["b"]).name} == names
        assert told["b"].startswith(any_url)
        assert {**told, "a": local["a"], "b": local["b"]} == local


def test_diff_fetches_the_two_and_no_third(url: str, make_run: MakeRun, read_objects: list[tuple[str, str]]) -> None:
    push(make_run("run", (None, None, None)), url)
    assert main(["ckpt", "diff", f"{url}/1", f"{url}/3"]) == 0
    fetched = {name.partition("/")[0] for how, name in read_objects if how == "get_file"}
    assert fetched == {"global_step_1", "global_step_3"}


def test_configurations_of_two_runs_at_urls_are_compared(make_run: MakeRun, capsys: Captured) -> None:
    base = f"memory://{BUCKET}/{uuid.uuid4().hex}"
    for seed in (1, 2):
        push(make_run(f"run{seed}", (None,), seed=seed), f"{base}/run{seed}")
    assert main(["ckpt", "diff", f"{base}/run1", f"{base}/run2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_config"] == [{"key": "trainer.seed", "a": 1, "b": 2}]


def test_export_fetches_the_adapter_alone(
    any_url: str, make_run: MakeRun, tmp_path: Path, read_objects: list[tuple[str, str]], capsys: Captured
) -> None:
    push(make_run("run", (None, None)), any_url)
    out = tmp_path / "adapter"
    assert main(["ckpt", "export", f"{any_url}/1", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == objects(any_url)[f"global_step_1/actor/{name}"]
    files = {"global_step_1/actor/adapter_config.json", "global_step_1/actor/adapter_model.safetensors"}
    if any_url.startswith("memory"):
        assert {name for how, name in read_objects if how == "get_file"} == files


def test_what_was_not_saved_is_not_exported(url: str, make_run: MakeRun, tmp_path: Path, capsys: Captured) -> None:
    push(make_run("run", (None,)), url)
    name = "global_step_1/actor/adapter_model.safetensors"
    put(url, name, bytes(len(objects(url)[name])))
    assert main(["ckpt", "export", f"{url}/1", str(tmp_path / "out")]) == 2
    assert f"{url}/global_step_1 cannot be exported: actor/adapter_model.safetensors does not" in capsys.readouterr().err
    remove(url, name)
    assert main(["ckpt", "export", f"{url}/1", str(tmp_path / "out")]) == 2
    assert "adapter_model.safetensors is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    url: str, make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch, read_objects: list[tuple[str, str]]
) -> None:
    push(make_run("run", (None,)), url)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: remote.shutil._ntuple_diskusage(10, 9, 1))
    assert main(["ckpt", "diff", f"{url}/1", f"{url}/1"]) == 2
    assert "1 are free; give another directory with TMPDIR=DIR" in capsys.readouterr().err
    assert "get_file" not in {how for how, _ in read_objects}


def test_a_local_checkpoint_is_not_taken_for_one_of_the_url(
    url: str, make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(make_run("run", (None,)), url)
    other = make_run("other", (None,))
    save(other, "mine", 9, files_of(9))
    monkeypatch.chdir(other)
    assert main(["ckpt", "verify", url, "mine"]) == 2
    assert "mine leads to " in capsys.readouterr().err
    assert "verified.json" not in objects(url)
