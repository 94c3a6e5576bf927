"""The blocking half of a save: one copy, laid out as the library would read it; the views of a load; writing behind the run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from agentlightning.checkpoint import CheckpointFiles, CheckpointManager, find_valid
from agentlightning.checkpoint.layout import Layout, views
from agentlightning.checkpoint.manifest import FileEntry
from agentlightning.checkpoint.snapshot import HostSnapshot
from agentlightning.checkpoint.writer import BackgroundWriter
from agentlightning.errors import CheckpointError

ADAPTER = "actor/adapter_model.safetensors"


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "step": torch.tensor(float(seed)),
        "counts": torch.arange(5, dtype=torch.int64),
        "empty": torch.zeros(0, 2),
        "flag": torch.tensor([True, False]),
    }


def test_the_library_reads_what_was_copied(tmp_path: Path) -> None:
    snapshot = HostSnapshot()
    live = tensors(1)
    snapshot.copy_from({ADAPTER: live})
    expected = {name: tensor.clone() for name, tensor in live.items()}
    live["a"].zero_()  # training goes on
    entries = snapshot.write(tmp_path, "xxh3_128")
    read = safetensors.torch.load_file(tmp_path / ADAPTER)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
    assert entries[ADAPTER].size == (tmp_path / ADAPTER).stat().st_size == snapshot.bytes


def test_a_second_copy_reuses_the_buffer_and_other_shapes_make_a_new_one(tmp_path: Path) -> None:
    snapshot = HostSnapshot()
    snapshot.copy_from({ADAPTER: tensors(1)})
    buffer = snapshot.files()[ADAPTER]
    snapshot.copy_from({ADAPTER: tensors(2)})
    assert snapshot.files()[ADAPTER] is buffer
    assert views(ADAPTER, buffer)["step"] == 2.0
    snapshot.copy_from({ADAPTER: {"a": torch.ones(2)}, "critic/value_head.safetensors": {"w": torch.zeros(1)}})
    snapshot.write(tmp_path, "sha256")
    assert safetensors.numpy.load_file(tmp_path / ADAPTER)["a"].tolist() == [1, 1]


def test_nothing_to_write_is_no_error(tmp_path: Path) -> None:
    snapshot = HostSnapshot()
    snapshot.copy_from({})
    assert snapshot.write(tmp_path, "xxh3_128") == {}
    snapshot.copy_from({ADAPTER: {}})  # an optimizer that has not stepped yet
    snapshot.write(tmp_path, "xxh3_128")
    assert safetensors.numpy.load_file(tmp_path / ADAPTER) == {}


def test_a_type_that_the_format_has_not_is_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="complex64"):
        HostSnapshot().copy_from({ADAPTER: {"x": torch.zeros(2, dtype=torch.complex64)}})


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["a"].update(data_offsets=[0, 4]),
        lambda table: table["a"].update(data_offsets=[-8, 0]),
        lambda table: table["a"].update(data_offsets=[8, 1 << 60]),
        lambda table: table["a"].update(shape=[3]),
        lambda table: table["a"].update(shape=[True, 2]),
        lambda table: table["a"].update(dtype="BF16"),
        lambda table: table["a"].update(dtype=None),
        lambda table: table.update(b=table["a"]),
        lambda table: table.pop("a"),
        lambda table: table.update(a=[]),
    ],
)
def test_a_header_that_does_not_fit_is_refused(change) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    good = json.dumps(header).encode()
    assert views("x", np.frombuffer(len(good).to_bytes(8, "little") + good + bytes(8), np.uint8))["a"].tolist() == [0, 0]
    change(header)
    text = json.dumps(header).encode()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        views("x", np.frombuffer(len(text).to_bytes(8, "little") + text + bytes(8), np.uint8))


@pytest.mark.parametrize("length", [0, 4, 8, 30])
def test_a_file_that_is_cut_is_refused(length: int) -> None:
    data = safetensors.numpy.save({"a": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match="no safetensors file"):
        views("x", np.frombuffer(data[:length], np.uint8))


def test_the_layout_is_the_librarys_own() -> None:
    arrays = {"b": np.arange(3, dtype=np.float32), "a": np.ones((2, 2), np.float64)}
    plan = Layout.of({name: (array.dtype, array.shape) for name, array in arrays.items()})
    buffer = np.zeros(plan.size, np.uint8)
    buffer[: len(plan.header)] = np.frombuffer(plan.header, np.uint8)
    for name, array in arrays.items():
        plan.slots[name].view(buffer)[...] = array
    read = safetensors.numpy.load(buffer.tobytes())
    assert all((read[name] == array).all() for name, array in arrays.items())


# ---- behind the run


class Held:
    """Parts that are not written before somebody says so."""

    bytes = 10

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.snapshot = HostSnapshot()
        self.snapshot.copy_from({ADAPTER: {"x": torch.ones(2)}})

    def __call__(self, staging: Path, algorithm: str) -> dict[str, FileEntry]:
        self.begun.set()
        assert self.go.wait(30)
        return self.snapshot.write(staging, algorithm)


def test_a_save_does_not_wait_and_a_third_one_does_not_pass_two(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        first, second = Held(), Held()
        assert manager.free_buffer() == 0
        manager.start_save(1, CheckpointFiles({}, parts=first), buffer=0)
        assert manager.is_safe(1)
        assert manager.collect() == []
        assert manager.free_buffer() == 1
        manager.start_save(2, CheckpointFiles({}, parts=second), buffer=1)
        free: list[int] = []
        waiter = threading.Thread(target=lambda: free.append(manager.free_buffer()))
        waiter.start()
        assert first.begun.wait(30)
        assert free == []
        first.go.set()
        waiter.join(30)
        assert free == [0]
        second.go.set()
        assert [outcome.step for outcome in manager.drain()] == [1, 2]
    loaded = find_valid(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    assert loaded.tensors[ADAPTER]["x"].tolist() == [1, 1]


def test_row_teardown_kills_a_write_in_flight_closing_waits_for_it(tmp_path: Path) -> None:
    held = Held()
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        manager.start_save(1, CheckpointFiles({}, parts=held), buffer=0)
        assert held.begun.wait(30)
        assert find_valid(tmp_path) is None
        held.go.set()
    assert find_valid(tmp_path) is not None


def test_parts_that_are_not_there_are_no_checkpoint(tmp_path: Path) -> None:
    class Elsewhere:
        bytes = 5

        def __call__(self, staging: Path, algorithm: str) -> dict[str, FileEntry]:
            return {ADAPTER: FileEntry(5, algorithm, "0" * 32)}

    with CheckpointManager(tmp_path, save_freq=10) as manager:
        with pytest.raises(CheckpointError, match=r"file system that all hosts share.*trainer\.default_local_dir=DIR"):
            manager.save(1, CheckpointFiles({}, parts=Elsewhere()))
        assert manager.failed is not None
        assert manager.should_save(2, is_last=False)  # tried again at the next step
        assert find_valid(tmp_path) is None


def test_a_mistake_in_a_job_is_not_swallowed() -> None:
    writer = BackgroundWriter()
    writer.submit(1, None, lambda: 1 // 0)  # pyright: ignore[reportArgumentType]
    writer.wait()
    with pytest.raises(ZeroDivisionError):
        writer.collect()
    writer.close()


def test_sha256_by_option(tmp_path: Path) -> None:
    import hashlib

    with CheckpointManager(tmp_path, save_freq=1, digest="sha256") as manager:
        saved = manager.save(1, CheckpointFiles({ADAPTER: {"x": np.ones(3, np.float32)}}))
    entry = json.loads((saved.path / "manifest.json").read_text())["files"][ADAPTER]
    assert entry["sha256"] == hashlib.sha256((saved.path / ADAPTER).read_bytes()).hexdigest()
    data = bytearray((saved.path / ADAPTER).read_bytes())
    data[-1] ^= 1
    (saved.path / ADAPTER).write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        find_valid(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_the_gpu_lands_in_pinned_memory(tmp_path: Path) -> None:
    snapshot = HostSnapshot()
    snapshot.copy_from({ADAPTER: {"x": torch.arange(1000.0, device="cuda")}})
    snapshot.write(tmp_path, "xxh3_128")
    assert safetensors.numpy.load_file(tmp_path / ADAPTER)["x"].tolist() == list(range(1000))
