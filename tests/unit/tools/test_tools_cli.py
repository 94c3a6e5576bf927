"""`agl` as a person starts it: exit codes, tables and JSON, and nothing heavy imported for a light command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentlightning import cli
from agentlightning.cli import main
from agentlightning.errors import WorkerError

MakeRun = Callable[..., Path]


def test_the_real_command(make_run: MakeRun) -> None:
    root = make_run("run", (0.25, 0.5), max_actor_ckpt_to_keep=1)
    command = [sys.executable, "-m", "agentlightning", "ckpt", "ls", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    header, newest, oldest = done.stdout.splitlines()
    assert header.split() == ["name", "step", "when", "size", "val-core/sums/acc/mean@1", "verified", "kept", "because"]
    assert newest.split()[:2] == ["global_step_2", "2"]
    assert newest.rstrip().endswith("0.5  -         newest 1")
    assert oldest.rstrip().endswith("nothing: goes at the next prune")


def test_ls_as_json(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (0.25, float("nan")))
    assert main(["ckpt", "ls", str(root), "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert listing["policy"] == {"keep": None, "best_by": None, "every": None}
    assert [(row["step"], row["metric"], row["kept"]) for row in listing["rows"]] == [
        (2, None, ["all are kept"]),
        (1, 0.25, ["all are kept"]),
    ]


def test_an_empty_directory_and_brackets_in_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "ls", str(tmp_path)]) == 0
    assert "no checkpoints in" in capsys.readouterr().out
    (tmp_path / "[bold]x.pt").write_bytes(b"")
    assert main(["ckpt", "ls", str(tmp_path)]) == 0
    assert "[bold]x" in capsys.readouterr().out


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ckpt", "ls", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for words in ([], ["ckpt"], ["ckpt", "ls"], ["fly"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2

    def fail(_: object) -> int:
        raise WorkerError("it died")

    monkeypatch.setattr(cli, "_ls", fail)
    assert main(["ckpt", "ls", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("error: it died\n")


def test_train_hands_its_words_to_the_entrypoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentlightning.verl import entrypoint

    seen: list[list[str]] = []

    def train() -> int:
        seen.append(sys.argv[1:])
        return 7

    monkeypatch.setattr(entrypoint, "main", train)
    monkeypatch.setattr(sys, "argv", ["agl"])
    assert main(["train", "model=tiny", "--help"]) == 7
    assert seen == [["model=tiny", "--help"]]


def test_a_reader_that_has_enough(make_run: MakeRun) -> None:
    """`agl ckpt ls | head -1` ends without a traceback."""
    root = make_run("run", (0.5,))
    code = f"import sys; from agentlightning.cli import main; sys.exit(main(['ckpt', 'ls', {str(root)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate()
    assert (process.returncode, error) == (1, "")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, agentlightning.cli; sys.stdout.write(' '.join({'torch', 'ray', 'numpy', 'rich'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
