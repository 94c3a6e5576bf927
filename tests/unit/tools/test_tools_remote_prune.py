"""`agl ckpt prune` at a URL: the record goes first, and never while a run is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from made_runs import ACC, files_of
from made_urls import objects, push, put

from agentlightning.checkpoint import remote_lease, save
from agentlightning.checkpoint.remote import Mirror
from agentlightning.cli import main
from agentlightning.tools import remote

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("nothing_stays")


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


def test_a_dead_holder_on_another_host_is_waited_for(url: str, make_run: MakeRun, capsys: Captured) -> None:
    """A lease whose holder cannot be seen from here, and whose heartbeat is young, is held."""
    push(make_run("run", (None, None)), url)
    holder = {"host": "elsewhere", "pid": 1, "boot_id": "other", "token": "t", "since": "today", "started": 0.0}
    put(url, ".lease-1", json.dumps(holder).encode())
    put(url, f"{remote_lease._BEAT}t", b"1")
    assert main(["ckpt", "prune", url, "--keep", "1"]) == 2
    assert "in use by pid 1 on elsewhere" in capsys.readouterr().err
    assert "global_step_1.pt" in objects(url)
