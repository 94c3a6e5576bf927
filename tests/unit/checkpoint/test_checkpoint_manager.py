"""When a run saves, what it keeps, going back and starting over: nothing is lost, the last good one never goes."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from agentlightning.checkpoint import CheckpointFiles, CheckpointManager, find_valid, load, retention, set_aside, store
from agentlightning.errors import CheckpointError

POINTER = "latest_checkpointed_iteration.txt"


def files_of(mark: int) -> CheckpointFiles:
    return CheckpointFiles(
        {"actor/adapter_model.safetensors": {"x": np.full(4, mark, np.float32)}}, {"trainer_state.json": mark}
    )


def run_to(root: Path, last: int, *, first: int = 1, keep: int | None = None, mark: int = 0) -> None:
    with CheckpointManager(root, save_freq=1, keep=keep) as manager:
        for step in range(first, last + 1):
            manager.save(step, files_of(mark + step))


def steps(root: Path) -> list[int]:
    """Steps that have both a record and a directory; a half one fails the test."""
    records = {name.removesuffix(".pt") for name in os.listdir(root) if name.endswith(".pt")}
    directories = {name for name in os.listdir(root) if name.startswith("global_step_") and (root / name).is_dir()}
    assert records == directories
    return sorted(int(name.removeprefix("global_step_")) for name in records)


def test_when_it_saves(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_freq=3) as manager:
        assert [step for step in range(1, 11) if manager.should_save(step, step == 10)] == [3, 6, 9, 10]
        manager.save(9, files_of(9))
        assert not manager.should_save(9, is_last=True)  # it is durable already
    with CheckpointManager(tmp_path / "last", save_freq=-1) as manager:
        assert [step for step in range(1, 11) if manager.should_save(step, step == 10)] == [10]


def test_the_pointer_for_verls_tools(tmp_path: Path) -> None:
    run_to(tmp_path, 3)
    assert (tmp_path / POINTER).read_text() == "3"
    (tmp_path / POINTER).write_text("")  # as verl leaves it when it is killed: nobody here minds
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        loaded = manager.load_latest()
        assert loaded is not None
        assert loaded.step == 3


def test_it_keeps_the_newest_also_those_of_an_earlier_start(tmp_path: Path) -> None:
    run_to(tmp_path, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    run_to(tmp_path, 5, first=5, keep=2)
    assert steps(tmp_path) == [4, 5]
    run_to(tmp_path, 12, first=6, keep=2)
    assert steps(tmp_path) == [11, 12]


def test_keep_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_actor_ckpt_to_keep=0"):
        CheckpointManager(tmp_path, save_freq=1, keep=0)


def test_pruning_follows_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment anything goes, the new checkpoint is on disk and valid."""
    seen: list[int] = []
    real = retention.discard

    def watch(root: Path, names: list[str]) -> None:
        loaded = find_valid(root)
        assert loaded is not None
        seen.append(loaded.step)
        real(root, names)

    monkeypatch.setattr(retention, "discard", watch)
    run_to(tmp_path, 3, keep=1)
    assert seen == [2, 3]


def test_a_failed_save_prunes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, save_freq=1, keep=1) as manager:
        manager.save(1, files_of(1))
        with monkeypatch.context() as patch:
            patch.setattr(store, "commit_record", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(CheckpointError):
                manager.save(2, files_of(2))
        assert steps(tmp_path) == [1]


def test_a_torn_checkpoint_pushes_no_good_one_out(tmp_path: Path) -> None:
    run_to(tmp_path, 2)
    (tmp_path / "global_step_2" / "trainer_state.json").unlink()
    run_to(tmp_path, 3, first=3, keep=2)
    assert steps(tmp_path) == [1, 2, 3]  # 1 and 3 are the two good ones; 2 is not deleted


def test_nobody_elses_files_are_pruned(tmp_path: Path) -> None:
    (tmp_path / "global_step_0").mkdir()
    (tmp_path / "global_step_0" / "weights").write_text("mine")
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / "foreign.pt").write_bytes(b"mine")
    before = {name: (tmp_path / name).is_dir() for name in os.listdir(tmp_path)}
    run_to(tmp_path, 4, keep=1)
    for name in before:
        assert (tmp_path / name).exists()
    assert (tmp_path / "global_step_0" / "weights").read_text() == "mine"


def test_a_failing_prune_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, save_freq=1, keep=1) as manager:
        manager.save(1, files_of(1))

        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        with monkeypatch.context() as patch:
            patch.setattr(retention, "remove", refuse)
            saved = manager.save(2, files_of(2))
        assert manager.failed is None
        assert "Permission denied" in " ".join(saved.notes)
        assert steps(tmp_path) == [2]
    with CheckpointManager(tmp_path, save_freq=1):
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_bad_newer_ones_are_kept_aside_and_their_names_are_free(tmp_path: Path) -> None:
    run_to(tmp_path, 4)
    (tmp_path / "global_step_3" / "trainer_state.json").write_bytes(b"rotten")
    (tmp_path / "global_step_4.pt").write_bytes(b"")
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        loaded = manager.load_latest()
        assert loaded is not None
        assert loaded.step == 2
        assert {name for name, _ in loaded.skipped} == {"global_step_3.pt", "global_step_4.pt"}
        assert steps(tmp_path) == [1, 2, 3, 4]  # looking changes nothing
        assert manager.go_on() == tmp_path / "aside-1"
        assert manager.go_on() is None
        manager.save(3, files_of(33))
        assert steps(tmp_path) == [1, 2, 3]
    assert sorted(os.listdir(tmp_path / "aside-1")) == [
        "global_step_3",
        "global_step_3.pt",
        "global_step_4",
        "global_step_4.pt",
    ]
    assert load(tmp_path / "aside-1" / "global_step_4").step == 4


@pytest.mark.parametrize("explicit", [True, False], ids=["go_on", "first_save"])
def test_going_back_keeps_the_later_ones_aside(tmp_path: Path, explicit: bool) -> None:
    run_to(tmp_path, 5)
    with CheckpointManager(tmp_path, save_freq=1, keep=3) as manager:
        loaded = manager.load("2")
        assert loaded.json["trainer_state.json"] == 2
        assert steps(tmp_path) == [1, 2, 3, 4, 5]
        if explicit:
            assert manager.go_on() == tmp_path / "aside-1"
            assert (tmp_path / POINTER).read_text() == "2"
        manager.save(3, files_of(103))
    assert steps(tmp_path) == [1, 2, 3]
    loaded = find_valid(tmp_path)
    assert loaded is not None
    assert loaded.json["trainer_state.json"] == 103
    assert [load(tmp_path / "aside-1" / f"global_step_{step}").json["trainer_state.json"] for step in (3, 4, 5)] == [3, 4, 5]


def test_a_resume_that_is_refused_afterwards_has_changed_nothing(tmp_path: Path) -> None:
    """The fingerprint is compared between `load` and `go_on`; a run that ends there has lost no progress."""
    run_to(tmp_path, 5)
    before = sorted(os.listdir(tmp_path))
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        manager.load(2)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_same_command_after_a_kill_goes_on_and_not_back_again(tmp_path: Path) -> None:
    run_to(tmp_path, 5)
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        manager.load(2)
        manager.save(3, files_of(103))
        manager.save(4, files_of(104))
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        loaded = manager.load(2)
        assert loaded.json["trainer_state.json"] == 104
        assert "already went back to 2" in " ".join(loaded.notes)
        manager.save(5, files_of(105))
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        assert manager.load(2).json["trainer_state.json"] == 105  # and once more
        assert manager.load(3).json["trainer_state.json"] == 103  # to another place it does go back


def test_after_a_plain_resume_going_back_means_going_back(tmp_path: Path) -> None:
    run_to(tmp_path, 3)
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        manager.load(2)
        manager.save(3, files_of(103))
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        manager.load_latest()
        manager.save(4, files_of(104))
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        assert manager.load(2).step == 2


def test_from_another_runs_directory(tmp_path: Path) -> None:
    run_to(tmp_path / "a", 4)
    run_to(tmp_path / "b", 2, mark=100)
    with CheckpointManager(tmp_path / "b", save_freq=1) as manager:
        loaded = manager.load(f"{tmp_path / 'a' / 'global_step_3'}/")
        assert loaded.json["trainer_state.json"] == 3
        assert manager.go_on() == tmp_path / "b" / "aside-1"
        manager.save(4, files_of(204))
    assert steps(tmp_path / "b") == [4]
    assert steps(tmp_path / "b" / "aside-1") == [1, 2]
    assert steps(tmp_path / "a") == [1, 2, 3, 4]


def test_starting_over_moves_everything_that_is_named(tmp_path: Path) -> None:
    run_to(tmp_path, 2)
    (tmp_path / "metrics.jsonl").write_text("old\n")
    (tmp_path / "torn.pt").write_bytes(b"")
    (tmp_path / "run.log").write_text("mine")
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        assert manager.start_over(also=["metrics.jsonl", "reward.png"]) == tmp_path / "aside-1"
        assert manager.load_latest() is None
        assert sorted(os.listdir(tmp_path)) == [".lease", "aside-1", "run.log"]
        assert manager.start_over(also=["metrics.jsonl"]) is None
        manager.save(1, files_of(1))
        assert manager.start_over() == tmp_path / "aside-2"
    assert (tmp_path / "aside-1" / "metrics.jsonl").read_text() == "old\n"
    assert (tmp_path / "aside-1" / POINTER).read_text() == "2"


def test_set_aside_by_step(tmp_path: Path) -> None:
    run_to(tmp_path, 4)
    (tmp_path / "global_step_4.pt").write_bytes(b"torn")  # its step is known by its name
    (tmp_path / "global_step_9").mkdir()
    (tmp_path / "torn.pt").write_bytes(b"torn")  # and this one's is not
    assert set_aside(tmp_path, 10) is None
    aside = set_aside(tmp_path, 2)
    assert aside is not None
    assert {name for name in os.listdir(aside) if not name.endswith(".pt")} == {
        "global_step_3",
        "global_step_4",
        "global_step_9",
    }
    assert (tmp_path / "torn.pt").exists()
    assert (tmp_path / POINTER).read_text() == "2"


def test_leftovers_of_the_dead_go_away_at_the_start(tmp_path: Path) -> None:
    run_to(tmp_path, 2)
    mark = "ab" * 16
    (tmp_path / f".global_step_3.{mark}.tmp" / "actor").mkdir(parents=True)
    (tmp_path / f".{POINTER}.{mark}.tmp").write_text("3")
    (tmp_path / f".metrics.jsonl.{mark}.tmp").write_text("half")
    shutil.copytree(tmp_path / "global_step_2", tmp_path / "global_step_4")
    (tmp_path / f".global_step_4.pt.{mark}.tmp").write_text("staged")
    shutil.copytree(tmp_path / "global_step_2", tmp_path / "global_step_5")  # a person's copy: no hidden record beside it
    with CheckpointManager(tmp_path, save_freq=1):
        names = set(os.listdir(tmp_path))
    assert not [name for name in names if name.endswith(".tmp")]
    assert "global_step_4" not in names
    assert "global_step_5" in names


def test_random_runs_are_never_without_a_valid_checkpoint(tmp_path: Path) -> None:
    """Saves, restarts, rot in the newest, going back and changes of `keep`, 60 operations with a fixed seed."""
    rng = random.Random(1)
    manager = CheckpointManager(tmp_path, save_freq=1, keep=3)
    manager.save(1, files_of(1))
    step = 1
    for _ in range(60):
        action = rng.choice(["save", "save", "save", "restart", "rot", "back"])
        if action == "save":
            step += 1
            manager.save(step, files_of(step))
        elif action == "restart":
            manager.close()
            manager = CheckpointManager(tmp_path, save_freq=1, keep=rng.choice([2, 3, 5]))
        elif action == "back":
            step = rng.choice(steps(tmp_path))
            step = manager.load(step).step
            manager.go_on()
        elif len(steps(tmp_path)) > 1:
            (tmp_path / f"global_step_{step}" / "trainer_state.json").write_bytes(b"rot")
        loaded = manager.load_latest()
        assert loaded is not None
        if action == "rot":
            assert (loaded.skipped != ()) == (loaded.step < step)
            step = loaded.step
            manager.go_on()
        assert loaded.step == step
        assert loaded.json["trainer_state.json"] == step
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    manager.close()


def with_metric(mark: int, value: float | None) -> CheckpointFiles:
    plain = files_of(mark)
    metrics = {} if value is None else {"val-core/x/reward/mean@1": value}
    return CheckpointFiles(plain.tensors, json=plain.json, extra={"attempt": 1, "metrics": metrics})


def test_the_best_one_is_kept_and_can_be_resumed_from(tmp_path: Path) -> None:
    scores = {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: float("nan"), 6: 0.8}
    with CheckpointManager(tmp_path, save_freq=1, keep=1, best_by="val-core/x/reward/mean@1") as manager:
        for step, value in scores.items():
            manager.save(step, with_metric(step, value))
        assert steps(tmp_path) == [2, 6]
        assert manager.load("best").step == 2
        manager.save(3, with_metric(30, 0.1))
    assert sorted(path.name for path in tmp_path.glob("aside-1/*.pt")) == ["global_step_6.pt"]
    with CheckpointManager(tmp_path, save_freq=1) as manager:  # the same command again goes on, and not back once more
        loaded = manager.load("best")
        assert loaded.step == 3
        assert loaded.notes


def test_best_where_nobody_measured_says_what_would_help(tmp_path: Path) -> None:
    run_to(tmp_path, 2)
    with CheckpointManager(tmp_path, save_freq=1) as manager, pytest.raises(CheckpointError, match=r"trainer\.keep_best_by"):
        manager.load("best")


def test_multiples_of_a_step_stay_for_good(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_freq=1, keep=2, keep_every=3) as manager:
        for step in range(1, 9):
            manager.save(step, files_of(step))
    assert steps(tmp_path) == [3, 6, 7, 8]


def test_auto_saves_at_once_to_measure_and_then_as_seldom_as_it_may(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_freq="auto", keep=2) as manager:
        saved = []
        for step in range(1, 60):
            saving = manager.should_save(step, is_last=step == 59)
            if saving:
                manager.save(step, files_of(step))
                saved.append(step)
            manager.observe(1.0, 0.001 if saving else None)
        assert saved[0] == 1
        assert saved[-1] == 59
        assert manager.choice is not None
        assert manager.choice.steps > 1
        assert len(saved) < 30
        assert f"every {manager.choice.steps} steps" in manager.choice.why


def test_a_url_is_a_run_directory_too(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run"
    with CheckpointManager(url, save_freq=1, keep=2, staging_parent=tmp_path / "first") as manager:
        assert manager.load_latest() is None
        for step in range(1, 5):
            manager.save(step, files_of(step))
        (manager.root / "metrics.jsonl").write_text("a line\n")
    with CheckpointManager(url, save_freq=1, keep=2, staging_parent=tmp_path / "second") as manager:  # another host
        loaded = manager.load_latest()
        assert loaded is not None
        assert loaded.step == 4
        assert (manager.root / "metrics.jsonl").read_text() == "a line\n"
        manager.save(5, files_of(5))
        manager.save(6, files_of(6))  # 3 goes, which was never fetched; 4 stays as the last verified one
        assert manager.load(5).step == 5
        manager.save(6, files_of(60))
    with CheckpointManager(url, save_freq=1, staging_parent=tmp_path / "third") as manager:
        assert sorted(path.stem for path in manager.root.glob("*.pt")) == ["global_step_5", "global_step_6"]
        loaded = manager.load_latest()
        assert loaded is not None
        assert loaded.json == files_of(60).json
        with pytest.raises(CheckpointError, match="is in use by pid"):
            CheckpointManager(url, save_freq=1, staging_parent=tmp_path / "fourth")


def test_lost_workers_go_on_with_what_the_run_began_with(tmp_path: Path) -> None:
    run_to(tmp_path / "other", 3)
    run_to(tmp_path / "mine", 2)
    with CheckpointManager(tmp_path / "mine", save_freq=1) as manager:
        manager.load(str(tmp_path / "other" / "global_step_3"))
        manager.go_on()
        again = manager.load_again()  # workers died before anything was saved here
        assert again is not None
        assert again.step == 3
        manager.save(4, files_of(4))
        again = manager.load_again()
        assert again is not None
        assert again.step == 4
        manager.save(5, files_of(5))
    with CheckpointManager(tmp_path / "mine", save_freq=1) as manager:  # and the same command still goes on, not back
        assert manager.load(str(tmp_path / "other" / "global_step_3")).step == 5


def test_what_is_done_again_is_saved_again(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_freq=-1) as manager:
        manager.save(1, files_of(1))
        manager.save(2, files_of(2))
        (tmp_path / "global_step_2" / "trainer_state.json").unlink()
        again = manager.load_again()
        assert again is not None
        assert again.step == 1
        manager.go_on()
        assert manager.should_save(2, is_last=True)
        manager.save(2, files_of(20))
    assert steps(tmp_path) == [1, 2]


def test_a_push_that_failed_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(f"memory://{tmp_path.name}/again", save_freq=1, staging_parent=tmp_path) as manager:
        assert manager.mirror is not None

        def refused(*args: object) -> None:
            raise CheckpointError("the server says no")

        with monkeypatch.context() as patch:
            patch.setattr(manager.mirror, "push", refused)
            with pytest.raises(CheckpointError, match="says no"):
                manager.save(1, files_of(1))
        assert manager.save(1, files_of(1)).step == 1
