"""A loop of one's own: what it saves comes back, what would not come back is refused first, and a kill loses nothing.

Run as a program, `python test_checkpoint_utils.py SCENARIO=BASE...`, it is the process that is killed: see `kill_everywhere`.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agentlightning
from agentlightning import checkpoint_utils
from agentlightning.checkpoint import CheckpointFiles, find_valid
from agentlightning.checkpoint import save as save_to_store
from agentlightning.checkpoint.record import MAX_RECORD_BYTES, read_plain
from agentlightning.checkpoint_utils import (
    CheckpointRecord,
    get_last_checkpoint,
    list_checkpoints,
    save_checkpoint,
    save_checkpoint_async,
)
from agentlightning.errors import CheckpointError

RUN = "tinker://sess0:train:0"


@dataclass
class Result:
    path: str | None


@dataclass
class Future:
    """As simple as a future can be: `result_async()` gives the path, or raises."""

    outcome: Callable[[], str | None]

    async def result_async(self, timeout: float | None = None) -> Result:
        return Result(self.outcome())


@dataclass
class RemoteClient:
    """Answers as the `tinker` SDK does; `asked` is what it was asked for."""

    asked: list[tuple[str, str, int | None]] = field(default_factory=list)

    async def save_state_async(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Future:
        self.asked.append(("state", name, ttl_seconds))
        return Future(lambda: f"{RUN}/weights/{name}")

    async def save_weights_for_sampler_async(self, name: str, ttl_seconds: int | None = None) -> Future:
        self.asked.append(("sampler", name, ttl_seconds))
        return Future(lambda: f"{RUN}/sampler_weights/{name}")


@dataclass
class LocalClient:
    """Saves real checkpoint directories below `root`, as an in-process client does; each save of a name is a new one."""

    root: Path
    batch: int = 0

    def _save(self, name: str, kind: str) -> str:
        place = self.root / f"{name}-{kind}-{len(os.listdir(self.root)) if self.root.exists() else 0}"
        files = CheckpointFiles({"actor/adapter_model.safetensors": {"lora_A": np.full(4, self.batch, np.float32)}})
        return str(save_to_store(place, "weights", self.batch, files).path)

    async def save_state_async(self, name: str, ttl_seconds: int | None = None) -> Future:
        return Future(lambda: self._save(name, "state"))

    async def save_weights_for_sampler_async(self, name: str, ttl_seconds: int | None = None) -> Future:
        return Future(lambda: self._save(name, "sampler"))


class NoClient:
    """Fails the test that touches it."""

    async def save_state_async(self, name: str, ttl_seconds: int | None = None) -> Future:
        raise AssertionError("something was saved")

    save_weights_for_sampler_async = save_state_async


def save_batch(log_path: Path, batch: int, client: Any = None, **state: Any) -> dict[str, str]:
    client = RemoteClient() if client is None else client
    return save_checkpoint(client, f"{batch:06d}", log_path, {"batch": batch, **state})


def last(log_path: Path, required_key: str = "state_path") -> CheckpointRecord:
    record = get_last_checkpoint(log_path, required_key)
    assert record is not None
    return record


def plain_record(path: Path, **values: Any) -> None:
    """As a person's own loop writes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path)


# ---- saving, and what comes back


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("state", {"state_path": f"{RUN}/weights/final"}),
        ("sampler", {"sampler_path": f"{RUN}/sampler_weights/final"}),
        ("both", {"state_path": f"{RUN}/weights/final", "sampler_path": f"{RUN}/sampler_weights/final"}),
        ("metadata", {}),
    ],
)
def test_each_kind_saves_what_it_says(tmp_path: Path, kind: checkpoint_utils.Kind, paths: dict[str, str]) -> None:
    client = RemoteClient()
    given = asyncio.run(
        save_checkpoint_async(
            training_client=client, name="final", log_path=tmp_path, kind=kind, loop_state={"batch": 7}, ttl_seconds=60
        )
    )
    assert given == paths
    assert client.asked == [(key.removesuffix("_path"), "final", 60) for key in paths]
    assert os.listdir(tmp_path) == ["final.pt"]
    assert last(tmp_path, "batch").to_dict() == {"name": "final", "kind": kind, "batch": 7, "ttl_seconds": 60, **paths}
    assert (get_last_checkpoint(tmp_path) is None) == ("state_path" not in paths)
    assert (get_last_checkpoint(tmp_path, "sampler_path") is None) == ("sampler_path" not in paths)


def test_metadata_needs_no_client(tmp_path: Path) -> None:
    assert save_checkpoint(None, "notes", tmp_path, {"seen": 3}, kind="metadata") == {}
    assert last(tmp_path, "seen")["seen"] == 3
    with pytest.raises(ValueError, match="needs a training_client"):
        save_checkpoint(None, "more", tmp_path, {"batch": 1})


def test_unknown_keys_come_back_as_they_were(tmp_path: Path) -> None:
    own = {
        "lr": 1e-4,
        "big": 2**80,
        "tags": ["a", None, (1, True)],
        "deep": {"b": {3: float("inf")}},
        "raw": b"\0\xff",
        "ü": "",
    }
    save_batch(tmp_path, 3, epoch=1, final=True, **own)
    record = last(tmp_path)
    assert record.extra == own
    assert type(record["tags"][2]) is tuple
    assert dict(record) == record.to_dict() == {**own, **{key: record[key] for key in record if key not in own}}
    assert (record.name, record.kind, record.batch, record.epoch, record.final) == ("000003", "state", 3, 1, True)
    assert (record["batch"], record.state_path, record.sampler_path) == (3, f"{RUN}/weights/000003", None)
    assert (record.get("lr"), record.get("none"), record.get("none", 5)) == (1e-4, None, 5)
    assert ("lr" in record, "sampler_path" in record, record.has("lr"), record.has("sampler_path")) == (
        True,
        False,
        True,
        False,
    )
    with pytest.raises(KeyError, match=r"none .*000003 holds .*batch"):
        record["none"]
    save_checkpoint(RemoteClient(), "again", tmp_path, {"batch": 4, **record.extra})
    assert last(tmp_path).extra == own


def test_the_state_is_that_of_the_call_whatever_the_loop_does_meanwhile(tmp_path: Path) -> None:
    state = {"batch": 1, "losses": [0.5]}

    class Meanwhile(RemoteClient):
        async def save_state_async(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Future:
            state["batch"] = 2
            state["losses"].append(0.25)
            return await super().save_state_async(name, ttl_seconds)

    save_checkpoint(Meanwhile(), "a", tmp_path, state)
    assert (last(tmp_path)["batch"], last(tmp_path)["losses"]) == (1, [0.5])


def test_saved_inside_a_running_loop(tmp_path: Path) -> None:
    async def loop() -> tuple[dict[str, str], CheckpointRecord]:
        saved = save_checkpoint(RemoteClient(), "a", tmp_path, {"batch": 1})
        with pytest.raises(ValueError, match="'b/c'"):
            save_checkpoint(NoClient(), "b/c", tmp_path, {"batch": 1})
        return saved, last(tmp_path)

    saved, record = asyncio.run(loop())
    assert saved == {"state_path": record.state_path}


def test_the_snippet_of_a_loop(tmp_path: Path) -> None:
    """Start, save now and then, die, resume at the batch after the last save, finish, and find nothing left to do."""
    trained: list[int] = []

    async def run(until: int) -> None:
        resume_info = get_last_checkpoint(tmp_path)
        start_batch = resume_info["batch"] if resume_info else 0
        for batch in range(start_batch, until):
            trained.append(batch)
            if (batch + 1) % 2 == 0:
                await save_checkpoint_async(
                    training_client=RemoteClient(), name=f"{batch + 1:06d}", log_path=tmp_path, loop_state={"batch": batch + 1}
                )

    for until in (3, 6, 6):
        asyncio.run(run(until))
    assert trained == [0, 1, 2, 2, 3, 4, 5]


def test_local_paths_count_from_the_record_so_that_a_run_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = LocalClient(Path("run/store"), batch=3)
    given = save_checkpoint(client, "a", "run", {"batch": 3}, kind="both")
    assert read_plain(Path("run/a.pt"))["state_path"] == os.path.relpath(given["state_path"], "run")
    Path("run").rename("moved")
    record = last(Path("moved"))
    assert record["state_path"] == given["state_path"].replace("run", "moved", 1)
    assert Path(record["sampler_path"]).is_dir()


def test_a_path_outside_the_directory_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_batch(Path("run"), 1, LocalClient(Path("elsewhere"), batch=1))
    monkeypatch.chdir("/")
    assert Path(last(tmp_path / "run")["state_path"]).is_relative_to(tmp_path / "elsewhere")


@pytest.mark.parametrize("path", ["/not/here", "", None])
def test_a_path_that_leads_nowhere_gets_no_record(tmp_path: Path, path: str | None) -> None:
    class Elsewhere(RemoteClient):
        async def save_state_async(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Future:
            return Future(lambda: path)

    with pytest.raises(CheckpointError, match=r"not there|gave no state_path"):
        save_batch(tmp_path, 1, Elsewhere())
    assert os.listdir(tmp_path) == []


# ---- refused before anything is saved


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "../a", "/a", "a\\b", "a\n", "a b", "a\0", "x" * 129, 7])
def test_a_name_that_is_no_plain_segment_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        save_checkpoint(NoClient(), name, tmp_path / "run", {"batch": 1})
    assert os.listdir(tmp_path) == []


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        *[({"batch": 1, key: "x"}, f"keys {key},") for key in checkpoint_utils.RESERVED_KEYS],
        ({"batch": 1, "x": torch.zeros(2)}, r"loop_state\['x'\] is a torch.Tensor.*tolist"),
        ({"batch": 1, "x": {"y": [1, np.float64(2)]}}, r"loop_state\['x'\]\['y'\]\[1\] is a numpy.float64"),
        ({"batch": 1, "x": Path("a")}, "Path"),
        ({"batch": 1, "x": {1, 2}}, "set"),
        ({"batch": 1, "x": open}, "builtin"),
        ({"batch": 1, "x": {None: 1}}, "strings or whole numbers"),
        ({"batch": 1, "x": CYCLE}, "holds itself"),
        ({"batch": 1, 5: 1}, "expected strings"),
        ({"batch": "1"}, "next batch"),
        ({"batch": -1}, "next batch"),
        ({"batch": True}, "next batch"),
        ({"batch": np.int64(1)}, "numpy.int64"),
        ({"batch": 1, "x": "x" * MAX_RECORD_BYTES}, "save less"),
        ([("batch", 1)], "expected a dict"),
    ],
)
def test_a_loop_state_that_would_not_come_back_is_refused(tmp_path: Path, state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        save_checkpoint(NoClient(), "a", tmp_path, state)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [({"kind": "all"}, "state, sampler, both, metadata"), ({"ttl_seconds": 0}, "seconds"), ({"ttl_seconds": 1.5}, "seconds")],
)
def test_other_arguments_are_checked_first(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        save_checkpoint(NoClient(), "a", tmp_path, {"batch": 1}, **given)


@pytest.mark.parametrize("log_path", ["s3://bucket/run", "", "tinker://x"])
def test_a_log_path_that_is_no_local_directory_is_refused(log_path: str) -> None:
    for use in (get_last_checkpoint, list_checkpoints, lambda path: save_checkpoint(NoClient(), "a", path, {"batch": 1})):
        with pytest.raises(CheckpointError, match="expected a local directory"):
            use(log_path)


def test_a_log_path_that_cannot_be_used_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(CheckpointError, match="log_path="):
        save_checkpoint(NoClient(), "a", tmp_path / "file", {"batch": 1})
    with pytest.raises(CheckpointError, match="in the way"):
        save_checkpoint(NoClient(), "a", tmp_path, {"batch": 1})
    with pytest.raises(CheckpointError, match="log_path="):
        get_last_checkpoint(tmp_path / "file")


# ---- which record is the last


def test_an_empty_or_missing_directory_is_a_fresh_start(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        assert get_last_checkpoint(root) is None
        assert list_checkpoints(root) == []
    assert os.listdir(tmp_path) == []


def test_what_is_plainly_no_record_does_not_stop_a_fresh_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "value_head.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with open(tmp_path / "large.pt", "wb") as file:
        file.truncate(MAX_RECORD_BYTES + 1)
    assert get_last_checkpoint(tmp_path) is None
    assert all(name in caplog.text for name in ("value_head.pt", "list.pt", "large.pt"))


def test_epochs_go_first_where_all_records_hold_one(tmp_path: Path) -> None:
    """Supervised loops count batches within the epoch, and end with (num_epochs, 0)."""
    for name, epoch, batch in [("a", 1, 4), ("final", 2, 0), ("b", 0, 9)]:
        plain_record(tmp_path / f"{name}.pt", name=name, epoch=epoch, batch=batch, state_path=f"{RUN}/weights/{name}")
    assert [record.name for record in list_checkpoints(tmp_path)] == ["b", "a", "final"]
    assert last(tmp_path).name == "final"
    plain_record(tmp_path / "c.pt", batch=5, state_path=f"{RUN}/weights/c")
    assert last(tmp_path).name == "b"


def test_a_loop_that_counts_steps_is_ordered_by_them(tmp_path: Path) -> None:
    for step in (20, 3):
        save_checkpoint(RemoteClient(), f"step-{step}", tmp_path, {"step": step, "final": step == 3})
    assert last(tmp_path)["step"] == 20


def test_a_plain_dict_of_torch_save_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    plain_record(tmp_path / "mine.pt", batch=3, state_path="state", mood="good", sampler_path=None)
    record = last(tmp_path)
    assert dict(record) == {"name": "mine", "batch": 3, "state_path": str(tmp_path / "state"), "mood": "good"}
    assert record.kind is None


def test_the_trainers_run_directory_is_read(tmp_path: Path) -> None:
    for step in (1, 2):
        files = CheckpointFiles(
            {"actor/adapter_model.safetensors": {"x": np.ones(3, np.float32)}}, extra={"metrics": {"a": step}}
        )
        save_to_store(tmp_path, f"global_step_{step}", step, files)
    record = last(tmp_path)
    state = tmp_path / "global_step_2"
    assert dict(record) == {
        **{"name": "global_step_2", "batch": 2, "step": 2, "metrics": {"a": 2}},
        **{"state_path": str(state), "sampler_path": str(state / "actor")},
    }
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "global_step_1", state)
    assert last(tmp_path).batch == 1


def test_the_store_reads_a_loops_record(tmp_path: Path) -> None:
    save_batch(tmp_path, 4, LocalClient(tmp_path / "store", batch=4), note="x")
    loaded = find_valid(tmp_path)
    assert loaded is not None
    assert (loaded.record.batch, loaded.record.extra["note"]) == (4, "x")


def test_a_record_whose_sampler_is_gone_still_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = LocalClient(tmp_path / "store", batch=4)
    given = save_checkpoint(client, "a", tmp_path, {"batch": 4}, kind="both")
    shutil.rmtree(given["sampler_path"])
    assert "sampler_path" not in last(tmp_path)
    assert [record.state_path for record in list_checkpoints(tmp_path)] == [given["state_path"]]
    assert caplog.text.count(f"{given['sampler_path']} is gone") == 2
    with pytest.raises(CheckpointError, match="sampler_path is needed"):
        get_last_checkpoint(tmp_path, "sampler_path")


def test_a_flipped_bit_or_a_missing_byte_anywhere_in_a_record_counts(tmp_path: Path) -> None:
    save_batch(tmp_path, 1)
    path = tmp_path / "000001.pt"
    good = path.read_bytes()
    for position in range(0, len(good), 9):
        for damaged in (good[:position], good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"000001\.pt"):
                get_last_checkpoint(tmp_path)
    plain_record(tmp_path / "newer.pt", schema="agentlightning.loop/2", batch=1, state_path="x")
    with pytest.raises(CheckpointError, match="this version reads"):
        get_last_checkpoint(tmp_path)


# ---- saving a name again, and two saves at once


def test_a_name_saved_again_takes_the_place_of_the_old_record_which_stays_aside(tmp_path: Path) -> None:
    for note in ("first", "second", "third"):
        save_batch(tmp_path, 10, note=note)
    assert last(tmp_path)["note"] == "third"
    assert len(list_checkpoints(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == ["000010.pt", "000010.pt.aside-1", "000010.pt.aside-2"]
    (tmp_path / "000010.pt.aside-1").rename(tmp_path / "back.pt")
    (tmp_path / "000010.pt").unlink()
    assert last(tmp_path)["note"] == "first"


def test_two_saves_at_once(tmp_path: Path) -> None:
    """Many of different names, and many of one: each is whole, none is lost, and the client's saves overlap."""
    both_begun = threading.Barrier(2, timeout=10)

    class Slow(RemoteClient):
        async def save_state_async(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Future:
            await asyncio.to_thread(both_begun.wait)  # neither goes on before the other one has come
            return await super().save_state_async(name, ttl_seconds)

    async def saves() -> None:
        await asyncio.gather(*(save_checkpoint_async(Slow(), f"{batch:06d}", tmp_path, {"batch": batch}) for batch in (1, 2)))
        await asyncio.gather(
            *(save_checkpoint_async(RemoteClient(), "same", tmp_path, {"batch": batch}) for batch in range(3, 9))
        )

    asyncio.run(saves())
    names = set(os.listdir(tmp_path))
    assert names == {"000001.pt", "000002.pt", "same.pt", *(f"same.pt.aside-{number}" for number in range(1, 6))}
    for number in range(1, 6):
        (tmp_path / f"same.pt.aside-{number}").rename(tmp_path / f"same{number}.pt")
    assert [record.batch for record in list_checkpoints(tmp_path)] == list(range(1, 9))


def test_what_a_killed_save_left_goes_with_a_later_save_and_nothing_else_does(tmp_path: Path) -> None:
    mark = "0123456789abcdef" * 2
    dead = [f".a.loop.{mark}.tmp", f".a.pt.aside-1.{mark}.tmp"]
    others = [f".global_step_3.pt.{mark}.tmp", f".global_step_3.{mark}.tmp", ".mine.tmp", f".young.loop.{mark}.tmp"]
    for name in (*dead, *others):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0) if "young" not in name else None)
    save_batch(tmp_path, 1)
    assert set(os.listdir(tmp_path)) == {*others, "000001.pt"}


# ---- importing


def test_it_is_light_to_import() -> None:
    """No heavy module, and nothing that takes longer than a tenth of a second in an interpreter that has started."""
    code = (
        "import json, sys, time; before = set(sys.modules); start = time.process_time()\n"
        "import agentlightning.checkpoint_utils\n"
        "seconds = time.process_time() - start\n"
        "sys.stdout.write(json.dumps([seconds, sorted(set(sys.modules) - before)]))"
    )
    package = Path(agentlightning.__file__).parents[1]
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=package)) for _ in range(3)]
    heavy = {"torch", "ray", "transformers", "numpy", "asyncio", "xxhash", "fsspec", "peft", "tinker"}
    assert heavy.isdisjoint(runs[0][1])
    assert {name for name in runs[0][1] if name.startswith("agentlightning.")} == {
        "agentlightning.checkpoint_utils",
        "agentlightning.errors",
    }
    assert min(seconds for seconds, _ in runs) < 0.1


# ---- the faults that others have, a test for each, as far as a loop's records can show them


def test_row_written_straight_into_the_final_directory_with_a_pointer_that_may_be_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_batch(tmp_path, 1)
    for name, data in [("empty.pt", b""), ("torn.pt", b"PK\x03\x04 torn"), ("foreign.pt", b"another program's")]:
        (tmp_path / name).write_bytes(data)
    assert last(tmp_path).batch == 1
    assert all(name in caplog.text for name in ("empty.pt", "torn.pt", "foreign.pt"))


def test_row_no_checksum_and_no_fallback_to_an_older_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for batch in (1, 2, 3):
        given = save_batch(tmp_path, batch, LocalClient(tmp_path / "store", batch=batch))
        if batch == 3:
            (tmp_path / "000003.pt").write_bytes((tmp_path / "000003.pt").read_bytes()[:-40])
        if batch == 2:
            file = Path(given["state_path"]) / "actor/adapter_model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1  # the size stays
            file.write_bytes(data)
    assert last(tmp_path).batch == 1
    assert "000003.pt" in caplog.text
    assert "000002.pt" in caplog.text
    assert "adapter_model.safetensors does not match its digest" in caplog.text


@pytest.mark.parametrize("fault", ["torn", "gone"])
def test_row_training_from_scratch_exit_0(tmp_path: Path, fault: str) -> None:
    given = save_batch(tmp_path, 1, LocalClient(tmp_path / "store"))
    save_checkpoint(RemoteClient(), "sampler", tmp_path, {"batch": 2}, kind="sampler")  # usable, but not to resume from
    if fault == "torn":
        (tmp_path / "000001.pt").write_bytes(b"")
    else:
        shutil.rmtree(given["state_path"])
    with pytest.raises(CheckpointError) as error:
        get_last_checkpoint(tmp_path)
    assert "000001.pt" in str(error.value)
    assert ("is empty" if fault == "torn" else f"{given['state_path']} is gone") in str(error.value)
    assert "log_path=DIR" in str(error.value)
    assert last(tmp_path, "sampler_path").name == "sampler"


def test_row_async_save_never_writes_the_pointer(tmp_path: Path) -> None:
    """The record is there as soon as, and not before, the client says that the weights are."""
    seen: list[list[str]] = []

    class Watching(RemoteClient):
        async def save_state_async(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Future:
            return Future(lambda: seen.append(os.listdir(tmp_path)) or f"{RUN}/weights/{name}")

    save_batch(tmp_path, 1, Watching())
    assert seen == [[]]
    assert os.listdir(tmp_path) == ["000001.pt"]


def test_row_background_save_failures_only_logged(tmp_path: Path) -> None:
    """An error of either save reaches the loop, once both have ended, and there is no record of half a checkpoint."""
    ended: list[str] = []

    class Slower(Future):
        async def result_async(self, timeout: float | None = None) -> Result:
            for _ in range(5):  # turns of the loop: the failure comes first
                await asyncio.sleep(0)
            return await super().result_async(timeout)

    class Failing(RemoteClient):
        async def save_state_async(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Future:
            return Future(lambda: (_ for _ in ()).throw(ConnectionError("the server is gone")))

        async def save_weights_for_sampler_async(self, name: str, ttl_seconds: int | None = None) -> Future:
            return Slower(lambda: ended.append(name) or f"{RUN}/sampler_weights/{name}")

    with pytest.raises(ConnectionError, match="the server is gone"):
        save_checkpoint(Failing(), "a", tmp_path, {"batch": 1}, kind="both")
    assert ended == ["a"]
    assert os.listdir(tmp_path) == []


def test_row_saves_the_rest_when_the_data_position_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="iterator"):
        save_checkpoint(NoClient(), "a", tmp_path, {"batch": 1, "data": iter([1])}, kind="both")
    assert os.listdir(tmp_path) == []


def test_row_half_written_directories_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for batch in (1, 2):
        given = save_batch(tmp_path, batch, LocalClient(tmp_path / "store", batch=batch))
    file = Path(given["state_path"]) / "actor/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert last(tmp_path).batch == 1
    assert [record.batch for record in list_checkpoints(tmp_path)] == [1]
    assert "000002.pt" in caplog.text


def test_row_rolling_save_that_finishes_after_final(tmp_path: Path) -> None:
    """Later in time is not later in training; and where both are of the same batch, the one that stays for good."""
    save_checkpoint(RemoteClient(), "final", tmp_path, {"batch": 9, "final": True}, kind="both")
    save_checkpoint(RemoteClient(), "000008", tmp_path, {"batch": 8, "rolling": True}, ttl_seconds=7200)
    assert last(tmp_path).name == "final"
    save_checkpoint(RemoteClient(), "000009", tmp_path, {"batch": 9, "rolling": True}, ttl_seconds=7200)
    save_checkpoint(RemoteClient(), "expires", tmp_path, {"batch": 9}, ttl_seconds=7200)
    assert last(tmp_path).name == "final"
    save_checkpoint(RemoteClient(), "000010", tmp_path, {"batch": 10, "rolling": True}, ttl_seconds=7200)
    assert last(tmp_path).name == "000010"


def test_row_a_rolling_save_that_was_deleted_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_batch(tmp_path, 8, LocalClient(tmp_path / "store", batch=8))
    rolling = save_batch(tmp_path, 9, LocalClient(tmp_path / "store", batch=9), rolling=True)
    shutil.rmtree(rolling["state_path"])
    assert last(tmp_path).batch == 8
    assert f"000009.pt: passed over: its state_path {rolling['state_path']} is gone" in caplog.text


def test_row_torn_last_line_makes_every_resume_impossible(tmp_path: Path) -> None:
    """One small file a record: what tears one leaves the others."""
    for batch in (1, 2, 3):
        save_batch(tmp_path, batch)
    assert len(list(tmp_path.glob("*.pt"))) == 3
    (tmp_path / "000003.pt").write_bytes((tmp_path / "000003.pt").read_bytes()[:100])
    assert last(tmp_path).batch == 2


def test_row_newest_by_file_time(tmp_path: Path) -> None:
    for batch, written in [(1, 3_000), (3, 1_000), (2, 2_000)]:
        save_batch(tmp_path, batch)
        os.utime(tmp_path / f"{batch:06d}.pt", (written, written))
    assert [record.batch for record in list_checkpoints(tmp_path)] == [1, 2, 3]
    for name, written in [("tie_old", 1_000), ("tie_new", 4_000)]:
        plain_record(tmp_path / f"{name}.pt", batch=3, state_path=f"{RUN}/weights/{name}")
        os.utime(tmp_path / f"{name}.pt", (written, written))
    assert last(tmp_path).name == "tie_new"


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_row_a_checkpoint_can_run_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trap, run = tmp_path / "trap", tmp_path / "run"
    save_batch(run, 1)
    plain_record(run / "bomb.pt", batch=99, state_path=RUN, bomb=RunsCode(trap))
    assert last(run).batch == 1
    assert not trap.exists()
    assert "bomb.pt" in caplog.text


def test_row_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_batch(tmp_path, 1)
    before = set(os.listdir(tmp_path))
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if str(tmp_path) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    for batch in (1, 2):
        with pytest.raises(CheckpointError) as error:
            save_batch(tmp_path, batch)
        assert all(words in str(error.value) for words in ("No space left", f"{batch:06d}.pt", f"{RUN}/weights/{batch:06d}"))
    monkeypatch.undo()
    assert set(os.listdir(tmp_path)) == before
    assert last(tmp_path).batch == 1
    save_batch(tmp_path, 2)
    assert last(tmp_path).batch == 2


# ---- SIGKILL before each operation on the file system


def save_second(root: Path) -> None:
    """The template holds batch 1."""
    save_checkpoint(LocalClient(root / "store", batch=2), "000002", root, {"batch": 2})


def save_first_again(root: Path) -> None:
    save_checkpoint(RemoteClient(), "000001", root, {"batch": 5})


SCENARIOS = {"second": save_second, "again": save_first_again, "save_torn": save_first_again}


def kill_everywhere(scenario: str, base: Path) -> None:
    """For each k a forked child dies before its k-th operation (`save_torn`: in the middle of its k-th write)."""
    spec = importlib.util.spec_from_file_location("kill_driver", Path(__file__).parent / "checkpoint" / "kill_driver.py")
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    driver.SCENARIOS.update(SCENARIOS)
    driver.kill_everywhere(scenario, base)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """By scenario: one directory per operation at which the loop died there, and last the one that came through."""
    bases = {name: tmp_path_factory.mktemp(name) for name in SCENARIOS}
    for base in bases.values():
        save_batch(base / "template", 1, LocalClient(base / "template" / "store", batch=1))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(agentlightning.__file__).parents[1])}
    command = [sys.executable, __file__, *(f"{name}={base}" for name, base in bases.items())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return {
        name: sorted((path for path in base.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
        for name, base in bases.items()
    }


def test_row_killed_before_any_operation_of_a_save_the_loop_resumes_and_goes_on(
    killed: dict[str, list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    resumed: list[int | None] = []
    for root in killed["second"]:
        resumed.append(last(root).batch)
        save_second(root)
        assert [record.batch for record in list_checkpoints(root)] == [1, 2]
    assert resumed == sorted(resumed, key=int)  # once committed it stays so
    assert resumed.count(1) > 15  # the counting saw the client's operations and those of the record
    assert resumed.count(2) >= 2  # before the last fsync, and unharmed
    assert caplog.text == ""  # nothing half-made was ever seen as a record


@pytest.mark.parametrize("scenario", ["again", "save_torn"])
def test_row_the_old_one_is_deleted_before_the_new_one_is_written(killed: dict[str, list[Path]], scenario: str) -> None:
    """Saving a name again, killed anywhere: there is the old record or the new one, whole, and the old one is never lost."""
    resumed: list[int | None] = []
    for root in killed[scenario]:
        record = last(root)
        resumed.append(record.batch)
        if record.batch == 5:
            (root / "000001.pt.aside-1").rename(root / "old.pt")
            assert [found.batch for found in list_checkpoints(root)] == [1, 5]
        for path in root.glob(".*.tmp"):
            os.utime(path, (0, 0))
        save_first_again(root)
        assert last(root).batch == 5
        assert not list(root.glob(".*.tmp"))
    assert resumed == sorted(resumed, key=int)
    assert set(resumed) == {1, 5}
    assert len(resumed) >= (3 if scenario == "save_torn" else 8)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        scenario, _, directory = argument.partition("=")
        kill_everywhere(scenario, Path(directory))
