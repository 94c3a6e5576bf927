"""A checkpoint comes back as it was saved, is found by its step, and is not there before its record is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from agentlightning.checkpoint import CheckpointFiles, find_valid, load, resolve, save
from agentlightning.errors import CheckpointError


def files_of(step: int) -> CheckpointFiles:
    weights = {"lora_A": np.full((2, 3), step, np.float32), "count": np.array([step], np.int64)}
    return CheckpointFiles({"actor/adapter_model.safetensors": weights}, {"trainer_state.json": {"step": step}})


def save_steps(root: Path, *steps: int) -> None:
    for step in steps:
        save(root, f"global_step_{step}", step, files_of(step))


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    arrays = {
        "float32": np.array([0.0, -0.0, np.nan, np.inf, 1e-45], np.float32),
        "float64": np.array([[0.1, 1 / 3]]),
        "int64": np.array([-(2**63), 2**63 - 1]),
        "bool": np.array([True, False]),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "strided": np.arange(10, dtype=np.int32)[::3],
    }
    state = {
        "text": "é \ud800 \n",
        "big": 10**30,
        "float": 0.1,
        "nan_like": [None, True, {"deep": [1, [2]]}],
        "inf": float("inf"),
    }
    fingerprint = {"breaking": {"lora": {"r": 8}}, "harmless": {"gpu": "none"}}
    files = CheckpointFiles(
        {"deep/er/a.safetensors": arrays}, {"trainer_state.json": state, "b/c.json": []}, fingerprint, {"attempt": 2}
    )
    saved = save(tmp_path / "made" / "run", "final", 7, files)
    loaded = load(saved.path)
    assert loaded.tensors.keys() == {"deep/er/a.safetensors"}
    for name, array in arrays.items():
        back = loaded.tensors["deep/er/a.safetensors"][name]
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert back.tobytes() == array.tobytes()  # bits, so that -0.0 and NaN count
    assert loaded.json == {"trainer_state.json": state, "b/c.json": []}
    assert loaded.fingerprint == fingerprint
    assert loaded.record.extra == {"attempt": 2}
    assert (loaded.step, loaded.record.batch, loaded.record.name) == (7, 7, "final")
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.rglob("*") if path.is_file())


def test_the_adapter_lies_where_peft_looks_for_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    loaded = find_valid(tmp_path)
    assert loaded is not None
    assert loaded.record.sampler_path == str(tmp_path / "global_step_1" / "actor")
    with safetensors.safe_open(tmp_path / "global_step_1" / "actor" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {"lora_A", "count"}


def test_newest_by_step_and_not_by_name_or_time(tmp_path: Path) -> None:
    save_steps(tmp_path, 9, 100, 10)
    os.utime(tmp_path / "global_step_9.pt", (4e9, 4e9))  # a clock step, or a restored directory
    os.utime(tmp_path / "global_step_100.pt", (1, 1))
    loaded = find_valid(tmp_path)
    assert loaded is not None
    assert loaded.step == 100


def test_file_time_breaks_a_tie(tmp_path: Path) -> None:
    for name, when in (("b", 1000), ("a", 3000), ("c", 2000)):
        save(tmp_path, name, 5, files_of(5))
        os.utime(tmp_path / f"{name}.pt", (when, when))
    loaded = find_valid(tmp_path)
    assert loaded is not None
    assert loaded.record.name == "a"


def test_a_fresh_or_missing_directory_holds_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert find_valid(tmp_path) is None
    assert find_valid(tmp_path / "not" / "there") is None


def test_a_directory_that_cannot_be_read_is_no_fresh_start(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be read.*default_local_dir"):
        find_valid(root)


def test_a_copied_or_moved_run_is_whole(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", 1, 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    loaded = find_valid(tmp_path / "b")
    assert loaded is not None
    assert loaded.path == tmp_path / "b" / "global_step_2"


def test_a_directory_without_record_is_no_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "global_step_2.pt").unlink()
    loaded = find_valid(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    (tmp_path / "global_step_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"without its record global_step_1\.pt"):
        find_valid(tmp_path)  # two copies without records are no reason to start from scratch unasked
    assert load(tmp_path / "global_step_2").step == 2  # asked for by name, the manifest vouches for it


def test_nothing_is_written_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"not written over.*resume_mode=disable"):
        save_steps(tmp_path, 1)
    (tmp_path / "global_step_2").mkdir()
    (tmp_path / "global_step_2" / "notes.txt").write_text("mine")
    save_steps(tmp_path, 2)
    assert (tmp_path / "aside-1" / "global_step_2" / "notes.txt").read_text() == "mine"
    assert load(tmp_path / "global_step_2").step == 2


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "/x"])
def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        save(tmp_path, name, 1, files_of(1))


def test_paths_that_leave_the_directory_are_not_written(tmp_path: Path) -> None:
    for relative in ("../x.json", "/x.json", "a/../../x.json", "a//x.json", "./x.json", "a\\x.json", "manifest.json"):
        with pytest.raises(CheckpointError, match="plain path"):
            save(tmp_path / "run", "n", 1, CheckpointFiles({}, {relative: 1}))
    assert list(tmp_path.iterdir()) == []


def test_values_that_would_not_come_back_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer_state\.json holds something that is no plain value"):
        save(tmp_path, "n", 1, CheckpointFiles({}, {"trainer_state.json": {"lr": np.float32(1)}}))
    with pytest.raises(ValueError, match=r"must end with \.safetensors"):
        save(tmp_path, "n", 1, CheckpointFiles({"adapter.bin": {}}))
    assert list(tmp_path.iterdir()) == []


def test_resolve_takes_all_that_a_person_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    save_steps(root, 10)
    save(root, "best", 10, files_of(10))
    step, best = root / "global_step_10", root / "best"
    assert resolve(root, 10) == step
    for given in (
        "10",
        " 10 ",
        "global_step_10",
        "global_step_10.pt",
        f"{step}",
        f"{step}/",
        f"{step}.pt",
        f"{step}/actor",
        f"{step}/actor/",
        f"{step}/manifest.json",
    ):
        assert resolve(root, given) == step, given
    for given in ("best", "best.pt", "best/", str(best)):
        assert resolve(root, given) == best, given
    monkeypatch.chdir(tmp_path)
    assert resolve(tmp_path / "another", "run/global_step_10/") == step
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(tmp_path / "another", "~/run/global_step_10") == step


@pytest.mark.parametrize("given", ["11", "worst", "/not/there", "", "run", "."])
def test_resolve_says_what_there_is(tmp_path: Path, given: str) -> None:
    save_steps(tmp_path / "run", 10)
    with pytest.raises(CheckpointError, match=r"resume_from_path") as caught:
        resolve(tmp_path / "run", given)
    assert given == "" or "holds: global_step_10" in str(caught.value)


def test_a_name_leads_by_its_record(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    shutil.copy(tmp_path / "global_step_3.pt", tmp_path / "best.pt")  # a bookmark
    assert resolve(tmp_path, "best") == tmp_path / "global_step_3"


_sets = st.dictionaries(st.sampled_from("abc"), st.lists(st.floats(width=32), max_size=4), max_size=3)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    _sets,
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=8),
)
def test_any_state_comes_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, list[float]], state: object) -> None:
    arrays = {name: np.array(value, np.float32) for name, value in values.items()}
    saved = save(tmp_path_factory.mktemp("any"), "n", 1, CheckpointFiles({"a.safetensors": arrays}, {"s.json": state}))
    loaded = load(saved.path)
    assert loaded.json["s.json"] == state
    assert {name: array.tobytes() for name, array in loaded.tensors["a.safetensors"].items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


def test_the_manifest_names_every_file_and_the_versions(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    manifest = json.loads((tmp_path / "global_step_1" / "manifest.json").read_text())
    assert manifest["files"].keys() == {"actor/adapter_model.safetensors", "trainer_state.json"}
    assert {"agentlightning", "python", "torch", "safetensors"} <= manifest["versions"].keys()


def test_importing_and_saving_need_torch_only_for_the_record(tmp_path: Path) -> None:
    code = """
import sys
import agentlightning.checkpoint, agentlightning.checkpoint.manager
from pathlib import Path
loaded = sorted(name for name in ("torch", "ray", "transformers", "hydra", "pydantic") if name in sys.modules)
assert not loaded, loaded
assert agentlightning.checkpoint.find_valid(Path(sys.argv[1])) is None
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
