"""SIGKILL at every file-system operation. Whatever was killed: the next start resumes, leaves no leftovers, and goes on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import agentlightning
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.store import LoadedCheckpoint, load

DRIVER = Path(__file__).with_name("kill_driver.py")
_spec = importlib.util.spec_from_file_location("kill_driver", DRIVER)
assert _spec is not None
assert _spec.loader is not None
kill_driver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kill_driver)
state_of = kill_driver.state_of


def template(base: Path, steps: tuple[int, ...]) -> Path:
    root = base / "template"
    root.mkdir()
    with CheckpointManager(root, save_freq=1) as manager:
        for step in steps:
            manager.save(step, state_of(step))
    (root / "metrics.jsonl").write_text('{"training/global_step": 1}\n')
    (root / ".mine.tmp").write_text("a person's own hidden file")
    return root


def run_driver(*scenarios: tuple[str, Path]) -> None:
    package = Path(agentlightning.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
    command = [sys.executable, str(DRIVER), *(f"{scenario}={base}" for scenario, base in scenarios)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def roots_of(base: Path) -> list[Path]:
    """One directory per operation at which the run died there, and last the one that came through."""
    return sorted((path for path in base.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """All scenarios in one driver: by name, the directories that the dead left (each is used by one test)."""
    steps = {
        "save_next": (1, 2),
        "save_torn": (1, 2),
        "save_first": (),
        "go_back": (1, 2, 3),
        "start_over": (1, 2),
        "start": (1, 2),
    }
    bases = {name: tmp_path_factory.mktemp(name) for name in steps}
    for name, base in bases.items():
        template(base, steps[name])
    leave_the_remains_of_a_save_and_a_prune(bases["start"] / "template")
    run_driver(*bases.items())
    return {name: roots_of(base) for name, base in bases.items()}


def leave_the_remains_of_a_save_and_a_prune(root: Path) -> None:
    """What the dead may leave at worst: step 3 killed before its last rename, and step 1 killed in its prune."""
    mark = "0123456789abcdef" * 2
    shutil.copytree(root / "global_step_2", root / "global_step_3")
    (root / f".global_step_3.pt.{mark}.tmp").write_bytes(b"a staged record")
    (root / f".global_step_4.{mark}.tmp" / "actor").mkdir(parents=True)
    (root / f".global_step_4.{mark}.tmp" / "actor" / "half").write_bytes(b"half a file")
    (root / "global_step_1.pt").rename(root / f".global_step_1.pt.{mark}.tmp")


def assert_is(loaded: LoadedCheckpoint, step: int) -> None:
    expected = state_of(step)
    assert loaded.step == step
    assert loaded.json == expected.json
    for relative, arrays in expected.tensors.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded.tensors[relative][name], array)


def assert_clean(root: Path) -> None:
    """No leftovers; every record has its directory and the other way round; a person's file is still there."""
    names = set(os.listdir(root))
    assert {name for name in names if name.endswith(".tmp")} == {".mine.tmp"}
    directories = {name for name in names if name.startswith("global_step_") and not name.endswith(".pt")}
    assert directories == {name.removesuffix(".pt") for name in names if name.endswith(".pt")}


def goes_on_from(root: Path) -> int:
    """Start as the next run would and train on to step 4; returns the step that it resumed from."""
    with CheckpointManager(root, save_freq=1, keep=2) as manager:
        assert_clean(root)
        loaded = manager.load_latest()
        assert loaded is not None
        assert loaded.skipped == ()
        assert_is(loaded, loaded.step)
        for step in range(loaded.step + 1, 5):
            manager.save(step, state_of(step))
        again = manager.load_latest()
        assert again is not None
        assert_is(again, 4)
    assert_clean(root)
    # The newest two, and the one that was loaded: the last of which every byte was read and found good.
    assert {path.name for path in root.glob("*.pt")} == {f"global_step_{step}.pt" for step in (loaded.step, 3, 4)}
    return loaded.step


def test_killed_before_every_operation_of_a_save(killed: dict[str, list[Path]]) -> None:
    resumed = [goes_on_from(root) for root in killed["save_next"]]
    assert len(resumed) > 40  # the counting saw the writes, fsyncs and renames
    # Once committed it stays committed: the old step up to some operation, the new one from there on, to the prune's end.
    assert resumed == sorted(resumed)
    assert set(resumed) == {2, 3}


def test_killed_in_the_middle_of_every_write_of_a_save(killed: dict[str, list[Path]]) -> None:
    resumed = [goes_on_from(root) for root in killed["save_torn"]]
    # Five files and the record are written before the commit; after it comes only the pointer.
    assert resumed[:6] == [2] * 6
    assert resumed[-1] == 3


def test_killed_before_every_operation_of_the_first_save(killed: dict[str, list[Path]]) -> None:
    outcomes = []
    for root in killed["save_first"]:
        with CheckpointManager(root, save_freq=1) as manager:
            assert_clean(root)
            loaded = manager.load_latest()  # None, not an error: nothing that was ever a checkpoint is lost
            outcomes.append(loaded is not None)
            if loaded is not None:
                assert_is(loaded, 3)
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


def test_killed_before_every_operation_of_going_back(killed: dict[str, list[Path]]) -> None:
    """The template holds steps 1 to 3; the run goes back to 1 and saves another step 2."""
    resumed = []
    for root in killed["go_back"]:
        with CheckpointManager(root, save_freq=1) as manager:
            loaded = manager.load(1)  # the same command again: goes back, or on from the new step 2 if that was committed
            resumed.append(loaded.step)
            if loaded.step == 1:
                assert_is(loaded, 1)
                manager.save(2, state_of(20))
            latest = manager.load_latest()
            assert latest is not None
            assert latest.step == 2
            assert latest.json == state_of(20).json
        assert_nothing_lost(root, later={2, 3})
    assert len(resumed) > 40
    assert resumed == sorted(resumed)
    assert set(resumed) == {1, 2}


def assert_nothing_lost(root: Path, later: set[int]) -> None:
    """The steps that were moved aside are whole in some aside directory."""
    for step in later:
        (directory,) = root.glob(f"aside-*/global_step_{step}")
        assert_is(load(directory), step)


def test_killed_before_every_operation_of_starting_over(killed: dict[str, list[Path]]) -> None:
    assert len(killed["start_over"]) > 10
    for root in killed["start_over"]:
        with CheckpointManager(root, save_freq=1) as manager:
            manager.start_over(also=["metrics.jsonl"])
            assert manager.load_latest() is None
            assert not (root / "metrics.jsonl").exists()
            assert len(list(root.glob("aside-*/metrics.jsonl"))) == 1
            manager.save(1, state_of(10))
        assert_nothing_lost(root, later={1, 2})


def test_killed_before_every_operation_of_clearing_what_the_dead_left(killed: dict[str, list[Path]]) -> None:
    assert len(killed["start"]) > 15
    for root in killed["start"]:
        with CheckpointManager(root, save_freq=1) as manager:
            assert_clean(root)
            assert not (root / "global_step_1").exists()
            assert not (root / "global_step_3").exists()
            loaded = manager.load_latest()
            assert loaded is not None
            assert_is(loaded, 2)
