"""`agl ckpt` and `agl plot` on a run at a URL: what they say of a directory they say of the URL."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from made_runs import ACC, files_of, write_metrics
from moto.server import ThreadedMotoServer

from agentlightning.checkpoint import remote_lease, save
from agentlightning.checkpoint.record import MAX_RECORD_BYTES, list_records
from agentlightning.checkpoint.remote import SMALL_FILES, Mirror
from agentlightning.cli import main
from agentlightning.tools import remote
from agentlightning.tools.listing import list_checkpoints
from agentlightning.tools.places import open_places
from agentlightning.tools.runs import policy_of

BUCKET = "runs"
MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


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
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
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


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever a command does, its pictures are gone when it ends."""
    place = tmp_path_factory.mktemp("pictures")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert [path.name for path in place.iterdir() if path.name.startswith("agl-")] == []


def push(root: Path, url: str) -> str:
    """Put a run at a URL, as its manager does; returns the URL."""
    with Mirror(url, root) as mirror:
        for _, record in reversed(list_records(root)[0]):
            mirror.push(record.name, SMALL_FILES)
        mirror.push_files(SMALL_FILES)
    return url


def objects(url: str) -> dict[str, bytes]:
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return {full[len(root) + 1 :]: fs.cat_file(full) for full in fs.find(root)}


def put(url: str, name: str, data: bytes) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/{name}", data)


def remove(url: str, name: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.rm(f"{root}/{name}", recursive=True)


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


# ---- prune


def test_prune_says_first_and_then_does(any_url: str, make_run: MakeRun, capsys: Captured, tmp_path: Path) -> None:
    push(make_run("run", (0.1, 0.9, 0.2, 0.3), max_actor_ckpt_to_keep=1, keep_best_by=ACC), any_url)
    before = objects(any_url)
    assert main(["ckpt", "prune", any_url, "--dry-run", "--json"]) == 0
    would = json.loads(capsys.readouterr().out)
    assert (would["run"], would["gone"], would["dry_run"]) == (any_url, ["global_step_3", "global_step_1"], True)
    assert objects(any_url) == before
    assert main(["ckpt", "prune", any_url, "--json"]) == 0
    did = json.loads(capsys.readouterr().out)
    assert (did["gone"], did["bytes"]) == (would["gone"], would["bytes"])
    assert did["bytes"] == sum(
        len(data) for name, data in before.items() if name.startswith(("global_step_3/", "global_step_1/"))
    )
    # Neither a lease nor a marker stays, and what stays is as it was.
    assert objects(any_url) == {
        name: data for name, data in before.items() if not name.startswith(("global_step_3", "global_step_1"))
    }
    with Mirror(any_url, tmp_path / "staging") as mirror:
        mirror.pull_index()
        mirror.fetch("global_step_4")


def test_prune_leaves_a_run_at_the_url_alone(any_url: str, make_run: MakeRun, capsys: Captured) -> None:
    root = make_run("run", (0.1, 0.9), max_actor_ckpt_to_keep=1)
    push(root, any_url)
    with Mirror(any_url, root) as mirror:
        before = {name for name in objects(any_url) if not name.startswith(".beat-")}
        assert main(["ckpt", "prune", any_url]) == 2
        assert f"{any_url} is in use by pid {os.getpid()} on " in capsys.readouterr().err
        assert main(["ckpt", "prune", any_url, "--dry-run"]) == 0
        assert {name for name in objects(any_url) if not name.startswith(".beat-")} == before
        mirror.check_held()


def test_a_prune_that_dies_is_ended_by_the_next_start(
    url: str, make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The record goes first: at no moment is there a record of files that are going."""
    push(make_run("run", (None, None)), url)
    real = MemoryFileSystem.rm

    def die(self: MemoryFileSystem, path: str, *arguments: Any, **named: Any) -> None:
        if path.endswith("/global_step_1"):
            raise PermissionError(13, "Access Denied")
        real(self, path, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "rm", die)
    assert main(["ckpt", "prune", url, "--keep", "1"]) == 2
    assert "Access Denied" in capsys.readouterr().err
    left = objects(url)
    assert "global_step_1.pt" not in left
    assert "global_step_1/manifest.json" in left
    monkeypatch.setattr(MemoryFileSystem, "rm", real)
    with Mirror(url, tmp_path / "staging") as mirror:
        mirror.pull_index()
    assert {name for name in objects(url) if "global_step_1" in name} == set()
    assert "global_step_2.pt" in objects(url)


def test_prune_chooses_under_the_lease(url: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """What another run saved after the first look counts: it is the newest now."""
    root = make_run("run", (None, None), max_actor_ckpt_to_keep=1)
    push(root, url)
    real = remote.RemoteRun.held

    def late(self: remote.RemoteRun) -> Any:
        save(root, "global_step_3", 3, files_of(3))
        with Mirror(url, root) as mirror:
            mirror.push("global_step_3")
        return real(self)

    monkeypatch.setattr(remote.RemoteRun, "held", late)
    assert main(["ckpt", "prune", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gone"] == ["global_step_2", "global_step_1"]
    assert {name for name in objects(url) if name.endswith(".pt")} == {"global_step_3.pt"}


def test_only_what_went_is_said_to_be_gone(url: str, tmp_path: Path, capsys: Captured) -> None:
    """A mirror keeps the newest by name, which names of one's own may not be by step."""
    root = tmp_path / "run"
    for step in (9, 10):
        save(root, f"ck-{step}", step, files_of(step))
    push(root, url)
    assert main(["ckpt", "prune", url, "--keep", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gone"] == []
    assert {"ck-9.pt", "ck-10.pt"} <= set(objects(url))


# ---- plot, and what is said


def test_plot_of_a_url_beside_a_directory(
    any_url: str, tmp_path: Path, capsys: Captured, read_objects: list[tuple[str, str]]
) -> None:
    lines = [
        {"training/global_step": step, "training/attempt": 1 + (step > 3), "critic/score/mean": step / 9} for step in range(9)
    ]
    write_metrics(tmp_path / "run", lines)
    put(any_url, "metrics.jsonl", (tmp_path / "run" / "metrics.jsonl").read_bytes())
    out = tmp_path / "out.png"
    assert main(["plot", any_url, str(tmp_path / "run"), "-o", str(out), "--json"]) == 0
    there, here = json.loads(capsys.readouterr().out)["runs"]
    assert (there["path"], there["run"]) == (any_url, "/".join(any_url.split("/")[-2:]))
    assert (there["resumed_at"], there["steps"]) == (here["resumed_at"], here["steps"])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert {name for _, name in read_objects} <= {"metrics.jsonl"}
    assert main(["plot", any_url, any_url + "/", "-o", str(out)]) == 2
    assert f"{any_url} was given twice" in capsys.readouterr().err


def test_no_password_is_shown(make_run: MakeRun, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, base = "pass-that-nobody-prints", f"@{BUCKET}/{uuid.uuid4().hex}"
    url = push(make_run("run", (None, None)), f"memory://me:{secret}{base}/run")
    said = ""
    for words in (
        ["ckpt", "ls", url, "--json"],
        ["ckpt", "ls", f"{url}/global_step_1"],
        ["ckpt", "ls", f"{url}/nothing"],
        ["ckpt", "verify", url, "7"],
        ["ckpt", "diff", f"{url}/1", f"{url}/2"],
        ["ckpt", "diff", f"{url}/1", f"{url}/7"],
        ["ckpt", "export", f"{url}/1/x/y", str(tmp_path / "out")],
        ["ckpt", "prune", url, "--keep", "1"],
        ["plot", url],
        ["ckpt", "ls", f"nosuch://me:{secret}{base}"],
    ):
        main(words)
        captured = capsys.readouterr()
        said += captured.out + captured.err

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(f"{secret} is no password")

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
    assert main(["ckpt", "ls", url]) == 2
    said += capsys.readouterr().err
    assert "*** is no password" in said
    assert f"memory://me:***{base}/run" in said
    assert secret not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ckpt", "ls", "URL/nothing"], "URL/nothing holds nothing; expected a run"),
        (["ckpt", "ls", "URL/global_step_1"], "URL/global_step_1 is one checkpoint; expected the run that it lies in, URL"),
        (["ckpt", "ls", "file:///tmp/run"], "expected its path, /tmp/run"),
        (["ckpt", "ls", "nosuch://bucket/run"], "nosuch://bucket/run cannot be opened"),
        (["ckpt", "verify", "URL", "9"], "9 is no checkpoint: expected a step number"),
        (["ckpt", "diff", "URL/9", "URL/1"], "URL holds: global_step_1"),
        (["ckpt", "diff", "memory://7", "URL/1"], "memory://7 is no checkpoint; expected RUN/40"),
        (["ckpt", "prune", "URL", "--keep", "0"], "expected at least 1"),
        (["plot", "URL"], "URL has no finished step in metrics.jsonl"),
    ],
)
def test_what_is_given_and_cannot_be_meant(url: str, make_run: MakeRun, capsys: Captured, words: list[str], said: str) -> None:
    push(make_run("run", (None,)), url)
    assert main([word.replace("URL", url) for word in words]) == 2
    error = capsys.readouterr().err
    assert said.replace("URL", url) in error
    assert tempfile.gettempdir() not in error


def test_a_config_at_a_url_that_cannot_be_meant_is_named_by_its_url(url: str, make_run: MakeRun, capsys: Captured) -> None:
    push(make_run("run", (None,), max_actor_ckpt_to_keep="three"), url)
    assert main(["ckpt", "ls", url]) == 2
    assert f"{url}/config.yaml has trainer.max_actor_ckpt_to_keep='three'" in capsys.readouterr().err


def test_a_server_that_does_not_answer(url: str, make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    push(make_run("run", (None,)), url)

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    for words in (["ls", url], ["diff", f"{url}/1", f"{url}/1"]):
        assert main(["ckpt", *words]) == 2
        assert "cannot be read: no answer" in capsys.readouterr().err


def test_a_dead_holder_on_another_host_is_waited_for(url: str, make_run: MakeRun, capsys: Captured) -> None:
    """A lease whose holder cannot be seen from here, and whose heartbeat is young, is held."""
    push(make_run("run", (None, None)), url)
    holder = {"host": "elsewhere", "pid": 1, "boot_id": "other", "token": "t", "since": "today", "started": 0.0}
    put(url, ".lease-1", json.dumps(holder).encode())
    put(url, f"{remote_lease._BEAT}t", b"1")
    assert main(["ckpt", "prune", url, "--keep", "1"]) == 2
    assert "in use by pid 1 on elsewhere" in capsys.readouterr().err
    assert "global_step_1.pt" in objects(url)


def test_configurations_of_two_runs_at_urls_are_compared(make_run: MakeRun, capsys: Captured) -> None:
    base = f"memory://{BUCKET}/{uuid.uuid4().hex}"
    for seed in (1, 2):
        push(make_run(f"run{seed}", (None,), seed=seed), f"{base}/run{seed}")
    assert main(["ckpt", "diff", f"{base}/run1", f"{base}/run2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_config"] == [{"key": "trainer.seed", "a": 1, "b": 2}]
