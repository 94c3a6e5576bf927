"""`agl plot` of a URL; and what the tools say of URLs that cannot be meant: in their name, without their password."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from made_runs import write_metrics
from made_urls import BUCKET, push, put

from agentlightning.cli import main

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("nothing_stays")


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
