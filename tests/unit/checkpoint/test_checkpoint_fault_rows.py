"""What goes wrong when others checkpoint, a test for each: the name tells the fault, the body what happens here instead.

Each asserts the core only; the files beside this one look closer. First the faults of committing, then those of resuming that a
store, a worker or the start of a run can show.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agentlightning
from agentlightning.checkpoint import CheckpointFiles, CheckpointManager, LoadedCheckpoint, find_valid, load
from agentlightning.checkpoint.manifest import FileEntry
from agentlightning.errors import CheckpointError
from agentlightning.types import Batch, LoraShape, MicroBatches, Prompt, SamplingParams
from agentlightning.verl.batching import MiniBatchPlan, make_batch
from agentlightning.verl.config import load_config
from agentlightning.verl.fingerprint import check_config, run_fingerprint
from agentlightning.verl.launch import launch
from agentlightning.verl.state import TrainerState, checkpoint_files, worker_state
from agentlightning.workers.messages import WorkerState
from agentlightning.workers.settings import ActorSettings, OptimSettings, RolloutSettings, WorkerSettings
from agentlightning.workers.worker import Worker

ADAPTER, STATE = "actor/adapter_model.safetensors", "trainer_state.json"


def files_of(step: int, **extra: Any) -> CheckpointFiles:
    return CheckpointFiles({ADAPTER: {"lora_A": np.full(6, step, np.float32)}}, json={STATE: {"step": step}}, extra=extra)


def run_to(root: Path, last: int, first: int = 1, keep: int | None = None) -> None:
    with CheckpointManager(root, save_freq=1, keep=keep) as manager:
        for step in range(first, last + 1):
            manager.save(step, files_of(step))


def latest(root: Path) -> LoadedCheckpoint:
    loaded = find_valid(root)
    assert loaded is not None
    assert loaded.json[STATE] == {"step": loaded.step}
    np.testing.assert_array_equal(loaded.tensors[ADAPTER]["lora_A"], np.full(6, loaded.step, np.float32))
    return loaded


def steps(root: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("global_step_")) for path in root.glob("*.pt"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run directory with steps 1 to 3."""
    run_to(tmp_path / "run", 3)
    return tmp_path / "run"


# ---- committing


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 torn", b"another program's"], ids=["empty", "torn", "foreign"])
def test_row_written_straight_into_the_final_directory_with_a_pointer_that_may_be_empty(root: Path, data: bytes) -> None:
    (root / "latest_checkpointed_iteration.txt").write_bytes(b"")
    (root / "global_step_4").mkdir()  # half of a checkpoint: without its record it is none
    (root / "global_step_5.pt").write_bytes(data)
    loaded = latest(root)
    assert loaded.step == 3
    assert [name for name, _ in loaded.skipped] == ["global_step_5.pt"]


def test_row_no_fsync_no_manifest_no_checksum_no_fallback(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    run_to(root, 4, first=4)
    for name in ("adapter_model.safetensors", STATE, "manifest.json"):
        assert any(".tmp/" in path and path.endswith(name) for path in synced), "staged, and durable before it has its name"
    data = bytearray((root / "global_step_4" / ADAPTER).read_bytes())
    data[-1] ^= 1
    (root / "global_step_4" / ADAPTER).write_bytes(data)
    loaded = latest(root)
    assert loaded.step == 3
    assert loaded.skipped == (("global_step_4.pt", f"{ADAPTER} does not match its digest"),)


def test_row_broken_checkpoint_means_training_from_scratch_over_the_old_steps(root: Path) -> None:
    for path in root.glob("global_step_*/" + STATE):
        path.unlink()
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    with CheckpointManager(root, save_freq=1) as manager, pytest.raises(CheckpointError) as caught:
        manager.load_latest()
    for step in (1, 2, 3):
        assert f"global_step_{step}.pt: {STATE} is missing" in str(caught.value)
    assert "trainer.resume_mode=disable" in str(caught.value)
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before
    with CheckpointManager(root, save_freq=1) as manager:  # on purpose
        assert manager.start_over() == root / "aside-1"
        assert manager.load_latest() is None


def test_row_old_checkpoint_deleted_before_the_new_one_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(root, save_freq=1, keep=1) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse(errno.EIO))
            with pytest.raises(CheckpointError):
                manager.save(4, files_of(4))
        assert steps(root) == [1, 2, 3], "what failed pushes nothing out"
        (root / "global_step_3" / STATE).write_bytes(b"torn")
        manager.load_latest()  # 2 is the last one that is known to be good
        manager.save(3, files_of(3))
        assert steps(root) == [2, 3], "and 1, of an earlier start, went"


def test_row_asynchronous_save_never_writes_the_pointer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go = threading.Event(), threading.Event()
    real = os.fsync

    def held_up(descriptor: int) -> None:
        reached.set()
        assert go.wait(60)
        real(descriptor)

    with CheckpointManager(root, save_freq=1) as manager, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", held_up)
        manager.start_save(4, files_of(4))
        assert reached.wait(60)
        assert manager.collect() == [], "training is not held up"
        assert latest(root).step == 3, "its bytes are not durable, so it does not count"
        go.set()
        assert [outcome.step for outcome in manager.drain()] == [4]
    assert latest(root).step == 4
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "4"


def refuse(code: int) -> Any:
    """Stands in for a function of os."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def test_row_background_failures_only_logged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(root, save_freq=10) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse(errno.EIO))
            manager.start_save(10, files_of(10))
            (outcome,) = manager.drain()
        assert "global_step_10 was not saved: Input/output error" in str(outcome.error), "for the console, at the next step"
        assert manager.failed == str(outcome.error), "for the exit code, if it is the last"
        assert manager.should_save(11, is_last=False), "tried again at once"
        manager.save(11, files_of(11))
        assert manager.failed is None


def test_row_the_rest_is_saved_when_a_part_cannot_be(root: Path) -> None:
    class HalfAPart:
        bytes = 8

        def __call__(self, staging: Path, algorithm: str) -> Mapping[str, FileEntry]:
            (staging / "half").write_bytes(b"half")  # of 8 bytes
            return {"half": FileEntry(8, algorithm, "0" * 32)}

    with CheckpointManager(root, save_freq=1) as manager:
        with pytest.raises(CheckpointError, match=r"a worker wrote half \(8 bytes\), but it is not in "):
            manager.save(4, replace(files_of(4), parts=HalfAPart()))
        with pytest.raises(ValueError, match="no plain value"):
            manager.save(4, CheckpointFiles({}, json={STATE: {"position": object()}}))
    assert latest(root).skipped == ()
    assert not [name for name in os.listdir(root) if "global_step_4" in name]


def test_row_half_written_directories_loaded_and_saving_and_pruning_collide(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader looks before each step that makes, renames or removes something, of two saves that prune."""
    seen: list[int] = []

    def watched(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            loaded = latest(root)
            assert loaded.skipped == ()
            seen.append(loaded.step)
            return real(*args, **kwargs)

        return call

    with CheckpointManager(root, save_freq=1, keep=1) as manager, monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, watched(name))
        manager.start_save(4, files_of(4))
        manager.start_save(5, files_of(5))
        assert [outcome.error for outcome in manager.drain()] == [None, None]
    assert set(seen) == {3, 4, 5}
    assert seen == sorted(seen)


def test_row_a_rolling_save_that_ends_after_the_final_one_is_the_last_record(root: Path) -> None:
    with CheckpointManager(root, save_freq=1) as manager:
        manager.save(9, files_of(9))  # the final one
        manager.save(4, files_of(4))  # came in later
    assert latest(root).step == 9, "ordered by what they hold"
    shutil.rmtree(root / "global_step_9")
    loaded = latest(root)
    assert loaded.step == 4, "a record whose checkpoint is gone does not count"
    assert [name for name, _ in loaded.skipped] == ["global_step_9.pt"]


def test_row_a_torn_last_line_makes_resuming_impossible(root: Path) -> None:
    good = (root / "global_step_3.pt").read_bytes()
    for length in (0, 1, len(good) // 2, len(good) - 1):
        (root / "global_step_3.pt").write_bytes(good[:length])
        assert latest(root).step == 2, "one file a record: the others do not mind"


def test_row_two_jobs_resume_one_directory_and_interleave(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from agentlightning.checkpoint.lease import Lease\n"
        "lease = Lease(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(agentlightning.__file__).parents[1])}
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"{root} is in use by pid {first.pid} on "):
            CheckpointManager(root, save_freq=1)
    finally:
        first.kill()
        first.communicate()
    with CheckpointManager(root, save_freq=1) as manager:  # a dead holder is taken over
        assert manager.lease.previous is not None
        assert manager.lease.previous.pid == first.pid


def test_row_newest_by_file_time(root: Path, tmp_path: Path) -> None:
    for path in (root / "global_step_1.pt", root / "global_step_1"):
        os.utime(path, (2e9, 2e9))  # an old file, touched
    assert latest(root).step == 3
    shutil.copytree(root, tmp_path / "copied", copy_function=shutil.copyfile)
    assert latest(tmp_path / "copied").step == 3


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_row_loading_a_checkpoint_can_run_code(root: Path, tmp_path: Path) -> None:
    torch.save({"batch": 9, "state_path": "global_step_3", "more": RunsCode(tmp_path / "ran")}, root / "global_step_9.pt")
    loaded = latest(root)
    assert loaded.step == 3
    assert [name for name, _ in loaded.skipped] == ["global_step_9.pt"]
    assert not (tmp_path / "ran").exists()
    suffixes = {path.suffix for path in (root / "global_step_3").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=["full", "quota", "read-only"])
def test_row_disk_full_quota_read_only(root: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with CheckpointManager(root, save_freq=10, keep=1) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse(code))
            with pytest.raises(
                CheckpointError, match=rf"{os.strerror(code)} at .*{root.name}.* needs [\d,]+ bytes, [\d,]+ are"
            ):
                manager.save(4, files_of(4))
        assert latest(root).step == 3
        assert manager.should_save(5, is_last=False)
        manager.save(5, files_of(5))
    assert latest(root).step == 5


def test_row_directory_removed_under_the_run(root: Path) -> None:
    with CheckpointManager(root, save_freq=1) as manager:
        shutil.rmtree(root)
        manager.save(4, files_of(4))
    assert latest(root).step == 4


# ---- resuming


@pytest.fixture
def signals() -> Iterator[None]:
    """The handlers of this process come back: a launch sets its own."""
    known = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in known}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_row_a_finished_run_started_again_trains_an_extra_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    config = load_config(
        [
            f"trainer.default_local_dir={root}",
            "trainer.backend=inprocess",
            "trainer.total_training_steps=3",
            "trainer.logger=[]",
        ]
    )
    with CheckpointManager(root, save_freq=1) as manager:
        manager.save(3, replace(files_of(3), fingerprint=run_fingerprint(config, None)))
    assert launch(config) == 0
    assert "already complete: 3 steps are done" in " ".join(capsys.readouterr().out.split())
    assert steps(root) == [3]
    with CheckpointManager(root, save_freq=1) as manager:  # with more steps asked for it goes on
        loaded = manager.load_latest()
        assert loaded is not None
        assert [step for step in range(loaded.step + 1, 5) if manager.should_save(step, step == 4)] == [4]


@pytest.mark.parametrize(
    "form", ["2", "global_step_2", "{root}/global_step_2", "{root}/global_step_2/", "{root}/global_step_2.pt"]
)
def test_row_resume_from_path_with_a_slash_or_a_folder_fails(root: Path, form: str) -> None:
    for given in (form, form + "actor") if form.endswith("/") else (form,):
        with CheckpointManager(root, save_freq=1) as manager:
            assert manager.load(given.format(root=root)).step == 2


def test_row_resume_from_path_best(tmp_path: Path) -> None:
    metric = "val-core/calculator/acc/mean@1"
    with CheckpointManager(tmp_path, save_freq=1, keep=1, best_by=metric) as manager:
        for step, score in enumerate((0.2, 0.9, 0.5), start=1):
            manager.save(step, files_of(step, metrics={metric: score}))
        assert manager.load("best").step == 2
        assert steps(tmp_path) == [2, 3]


def test_row_the_checkpoint_labelled_3_holds_5_steps(root: Path) -> None:
    record = torch.load(root / "global_step_3.pt", weights_only=True)
    assert (record["step"], record["batch"]) == (3, 3), "the next batch, counted from 0"
    assert load(root / "global_step_3").json[STATE] == {"step": 3}


def test_row_model_shape_data_or_batch_size_changed_unseen(tmp_path: Path) -> None:
    saved = load_config(["data.train_batch_size=16"])
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        manager.save(1, replace(files_of(1), fingerprint=run_fingerprint(saved, None)))
    loaded = load(tmp_path / "global_step_1")
    assert check_config(loaded, saved) == []
    changed = load_config(["data.train_batch_size=16", "actor_rollout_ref.actor.optim.lr=0.125"])
    (warning,) = check_config(loaded, changed)
    assert warning.startswith("actor_rollout_ref.actor.optim.lr: saved ")
    assert warning.endswith(", now 0.125")
    with pytest.raises(CheckpointError, match=r"data\.train_batch_size: saved 16, now 8"):
        check_config(loaded, load_config(["data.train_batch_size=8"]))


SETTINGS = WorkerSettings(
    model_path=str(Path(agentlightning.__file__).parent / "calculator" / "base"),
    dtype="float32",
    device="cpu",
    gradient_checkpointing=False,
    lora=LoraShape(4, 12),
    seed=0,
    num_threads=1,
    actor=ActorSettings(
        optim=OptimSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0),
        micro_batch=MicroBatches(64),
        log_prob_micro_batch=MicroBatches(64),
        ref_micro_batch=MicroBatches(64),
        temperature=1.0,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        clip_ratio_c=3.0,
        loss_agg_mode="token-mean",
        entropy_coeff=0.0,
        kl_loss_coef=0.0,
        kl_loss_type="low_var_kl",
    ),
    rollout=RolloutSettings(max_num_seqs=64, tool="agentlightning.calculator.task:calculate"),
)


class TwoWriters:
    """The state of one worker, written as two workers would."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.bytes = sum(worker.snapshot(writer, writer, 2) for writer in (0, 1))

    def __call__(self, staging: Path, algorithm: str) -> Mapping[str, FileEntry]:
        entries: dict[str, FileEntry] = {}
        for buffer in (0, 1):
            entries |= self.worker.write_snapshot(buffer, str(staging), algorithm)
        return entries


@pytest.fixture(scope="module")
def batch(prompts: list[Prompt]) -> Batch:
    completions = Worker(SETTINGS).generate(prompts[:2], SamplingParams(2, 16, 1, 16), 0, 1, 0)
    made = make_batch(prompts, completions, np.zeros(len(completions)))
    advantages = np.random.default_rng(0).normal(size=(made.mask_BT.shape[0], 1))
    return made.with_columns(advantages=np.where(made.mask_BT, advantages, 0.0).astype(np.float32))


def train(worker: Worker, batch: Batch, step: int) -> dict[str, np.ndarray]:
    """One step; the weights after it."""
    worker.update_actor(batch, MiniBatchPlan(2, 2, 1, shuffle=False, seq_norm=16.0).mini_batches(batch, 0, step), step)
    worker.update_weights(step)
    return dict(worker.state().actor.weights)


@pytest.fixture(scope="module")
def trained(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A run directory with a real step 1 that two workers wrote, and the weights of the uninterrupted run after step 2."""
    root = tmp_path_factory.mktemp("trained")
    worker = Worker(SETTINGS)
    train(worker, batch, 1)
    with CheckpointManager(root, save_freq=1) as manager:
        files = checkpoint_files(TwoWriters(worker), worker.adapter_configs(), TrainerState(global_step=1), {}, {})
        manager.save(1, files)
    return root, train(worker, batch, 2)


def resumed(root: Path) -> WorkerState:
    return worker_state(load(root / "global_step_1"), uses_critic=False)


def equal(mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    assert mine.keys() == theirs.keys()
    return all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_row_adam_is_cold_after_a_resume(trained: tuple[Path, dict[str, np.ndarray]], batch: Batch) -> None:
    root, uninterrupted = trained
    warm, cold = Worker(SETTINGS), Worker(SETTINGS)
    fresh = cold.state().actor.optimizer
    state = resumed(root)
    warm.load_state(state)
    assert equal(train(warm, batch, 2), uninterrupted)
    cold.load_state(replace(state, actor=replace(state.actor, optimizer=fresh)))
    assert not equal(train(cold, batch, 2), uninterrupted), "weights only: else the test could not see it"


def test_row_another_number_of_workers_cannot_read_it(trained: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = trained
    parts = [path.name for path in sorted((root / "global_step_1" / "actor").glob("optimizer-*"))]
    assert parts == ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    state = resumed(root).actor
    assert {name.split(".", 1)[1] for name in state.optimizer} == set(state.weights), "by parameter, from both files"


def test_row_lora_alpha_is_lost(trained: tuple[Path, dict[str, np.ndarray]]) -> None:
    config = json.loads((trained[0] / "global_step_1" / "actor" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)


def test_row_a_lora_run_writes_the_whole_model(trained: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, weights = trained
    written = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    assert written < 3.5 * sum(array.nbytes for array in weights.values()) + 100_000, "the adapter and its two moments"
    assert set(load(root / "global_step_1").tensors[ADAPTER]) == set(weights)
