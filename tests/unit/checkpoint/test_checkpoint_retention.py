"""What stays and why: the newest, the best by a metric, every k-th, the last verified one; and only ours ever go."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from agentlightning.checkpoint import CheckpointFiles, read_record, save
from agentlightning.checkpoint.record import list_records
from agentlightning.checkpoint.retention import (
    VERIFIED,
    RetentionPolicy,
    last_verified,
    mark_verified,
    metric_of,
    prune,
    reasons_to_keep,
    verified_at,
)
from agentlightning.errors import CheckpointError

ACC = "val-core/sums/acc/mean@1"


def save_step(root: Path, step: int, metrics: Mapping[str, float] | None = None) -> str:
    """Commit one checkpoint; returns its name."""
    extra = {"attempt": 1, "epoch": 0} | ({} if metrics is None else {"metrics": dict(metrics)})
    files = CheckpointFiles({"actor/adapter_model.safetensors": {"x": np.full(2, step, np.float32)}}, extra=extra)
    return save(root, f"global_step_{step}", step, files).name


def save_run(root: Path, accuracies: list[float | None]) -> None:
    """Steps 1, 2, ...; None: no validation at that step."""
    for step, accuracy in enumerate(accuracies, start=1):
        save_step(root, step, {"critic/score/mean": step / 10} | ({} if accuracy is None else {ACC: accuracy}))


def mark(root: Path, step: int) -> None:
    record = read_record(root / f"global_step_{step}.pt")
    assert record.digest is not None
    mark_verified(root, record.name, record.digest)


def steps(root: Path) -> list[int]:
    return sorted(int(name.removeprefix("global_step_")) for name in os.listdir(root) if (root / f"{name}.pt").is_file())


def reasons(root: Path, policy: RetentionPolicy) -> dict[int, tuple[str, ...]]:
    return {kept.step: kept.reasons for kept in reasons_to_keep(root, policy)}


def test_each_reason_is_named(tmp_path: Path) -> None:
    save_run(tmp_path, [0.1, 0.9, 0.2, 0.3, None, 0.4])
    mark(tmp_path, 3)
    assert reasons(tmp_path, RetentionPolicy(keep=2, best_by=ACC, every=4)) == {
        6: ("newest 2",),
        5: ("newest 2",),
        4: ("every 4",),
        3: ("last verified",),
        2: (f"best by {ACC}",),
        1: (),
    }
    assert list(reasons(tmp_path, RetentionPolicy())) == [6, 5, 4, 3, 2, 1]
    assert reasons(tmp_path, RetentionPolicy())[3] == ("all are kept", "last verified")
    assert reasons(tmp_path / "nothing", RetentionPolicy(1)) == {}


def test_prune_removes_exactly_what_has_no_reason(tmp_path: Path) -> None:
    save_run(tmp_path, [0.1, 0.9, 0.2, 0.3, None, 0.4])
    mark(tmp_path, 3)
    policy = RetentionPolicy(keep=1, best_by=ACC, every=4)
    assert prune(tmp_path, policy, None, dry_run=True) == ["global_step_5", "global_step_1"]
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert prune(tmp_path, policy, None) == ["global_step_5", "global_step_1"]
    assert steps(tmp_path) == [2, 3, 4, 6]
    assert prune(tmp_path, policy, None) == []
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_without_a_number_nothing_goes(tmp_path: Path) -> None:
    save_run(tmp_path, [0.1, 0.2])
    assert prune(tmp_path, RetentionPolicy(best_by=ACC, every=7), "global_step_2") == []


def test_the_one_just_saved_stays_whatever_its_step(tmp_path: Path) -> None:
    save_run(tmp_path, [None] * 4)
    assert prune(tmp_path, RetentionPolicy(1), "global_step_2") == ["global_step_3", "global_step_1"]
    assert steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ("best_by", "values", "best"),
    [
        (ACC, [0.5, 0.9, 0.1], 2),
        (f"-{ACC}", [0.5, 0.9, 0.1], 3),
        (ACC, [0.5, 0.9, 0.9], 3),  # of equals the one that has trained longer
        (f"-{ACC}", [0.5, 0.5, 0.9], 2),
        (ACC, [0.5, math.nan, None], 1),
        (ACC, [None, None, None], None),
        ("val-core/other", [0.5, 0.9, 0.1], None),
        (ACC, [-math.inf, math.inf, 0.1], 2),
    ],
)
def test_best_by_a_metric(tmp_path: Path, best_by: str, values: list[float | None], best: int | None) -> None:
    save_run(tmp_path, values)
    found = reasons(tmp_path, RetentionPolicy(keep=1, best_by=best_by))
    assert [step for step, why in found.items() if f"best by {best_by}" in why] == ([] if best is None else [best])


@pytest.mark.parametrize("extra", [{}, {"metrics": None}, {"metrics": 3}, {"metrics": {ACC: "0.5"}}, {"metrics": {ACC: True}}])
def test_a_record_without_the_metric_is_no_candidate(tmp_path: Path, extra: dict) -> None:
    saved = save(tmp_path, "global_step_1", 1, CheckpointFiles({}, {"a.json": 1}, extra=extra))
    assert metric_of(read_record(tmp_path / f"{saved.name}.pt"), ACC) is None
    assert reasons(tmp_path, RetentionPolicy(1, ACC)) == {1: ("newest 1",)}


def test_the_best_outlives_a_restart_and_is_replaced_by_a_better_one(tmp_path: Path) -> None:
    """No state is carried from save to save: each prune sees only the disk."""
    policy = RetentionPolicy(keep=1, best_by=ACC)
    seen: list[list[int]] = []
    for step, accuracy in enumerate([0.2, 0.8, 0.5, 0.1, 0.9, 0.3], start=1):
        prune(tmp_path, policy, save_step(tmp_path, step, {ACC: accuracy}))
        seen.append(steps(tmp_path))
    assert seen == [[1], [2], [2, 3], [2, 4], [5], [5, 6]]


def test_every_kth_stays_for_good(tmp_path: Path) -> None:
    for step in range(1, 12):
        prune(tmp_path, RetentionPolicy(keep=2, every=3), save_step(tmp_path, step))
    assert steps(tmp_path) == [3, 6, 9, 10, 11]


def test_the_last_verified_stays_until_a_newer_one_is_verified(tmp_path: Path) -> None:
    save_run(tmp_path, [None] * 3)
    mark(tmp_path, 1)
    assert prune(tmp_path, RetentionPolicy(1), "global_step_3") == ["global_step_2"]
    mark(tmp_path, 3)
    save_step(tmp_path, 4)
    assert prune(tmp_path, RetentionPolicy(1), "global_step_4") == ["global_step_1"]
    mark(tmp_path, 4)
    assert list(json.loads((tmp_path / VERIFIED).read_text())) == ["global_step_3", "global_step_4"]  # 1 is gone


def test_a_verified_one_that_was_torn_since_does_not_count(tmp_path: Path) -> None:
    save_run(tmp_path, [None] * 4)
    mark(tmp_path, 1)
    mark(tmp_path, 3)
    (tmp_path / "global_step_3" / "actor" / "adapter_model.safetensors").write_bytes(b"torn")
    assert prune(tmp_path, RetentionPolicy(1), "global_step_4") == ["global_step_2"]
    assert steps(tmp_path) == [1, 3, 4]


def test_a_mark_holds_for_one_digest(tmp_path: Path) -> None:
    save_run(tmp_path, [None, None])
    mark(tmp_path, 1)
    mark(tmp_path, 2)
    shutil.rmtree(tmp_path / "global_step_2")
    (tmp_path / "global_step_2.pt").unlink()
    save_step(tmp_path, 2, {ACC: 0.5})  # the run went back and saved another step 2
    records = [record for _, record in list_records(tmp_path)[0]]
    assert last_verified(tmp_path, records) == "global_step_1"
    assert list(verified_at(tmp_path, records)) == ["global_step_1"]


@pytest.mark.parametrize(
    "text",
    [b"", b'{"global_step_1": {"dig', b"\xff\x00", b"[1]", b'{"global_step_1": "yes"}', b'{"global_step_1": {}}', b"[" * 99999],
)
def test_a_torn_or_foreign_file_of_marks_counts_as_empty(tmp_path: Path, text: bytes) -> None:
    save_run(tmp_path, [None, None])
    (tmp_path / VERIFIED).write_bytes(text)
    assert last_verified(tmp_path, [record for _, record in list_records(tmp_path)[0]]) is None
    mark(tmp_path, 1)
    assert reasons(tmp_path, RetentionPolicy(1)) == {2: ("newest 1",), 1: ("last verified",)}


def test_marks_that_cannot_be_read_stop_the_prune(tmp_path: Path) -> None:
    """Not knowing what was verified is no reason to remove it."""
    save_run(tmp_path, [None, None])
    (tmp_path / VERIFIED).mkdir()
    with pytest.raises(OSError, match=r"verified\.json"):
        prune(tmp_path, RetentionPolicy(1), "global_step_2")
    assert steps(tmp_path) == [1, 2]


def test_torn_and_foreign_ones_neither_count_nor_go(tmp_path: Path) -> None:
    import torch

    save_run(tmp_path, [None] * 4)
    (tmp_path / "global_step_3" / "actor" / "adapter_model.safetensors").unlink()
    torch.save({"batch": 9, "state_path": "elsewhere"}, tmp_path / "000009.pt")
    shutil.copy(tmp_path / "global_step_4.pt", tmp_path / "global_step_7.pt")  # a record under another's name
    (tmp_path / "global_step_8.pt").write_bytes(b"torn")
    assert prune(tmp_path, RetentionPolicy(2), "global_step_4") == ["global_step_1"]
    assert steps(tmp_path) == [2, 3, 4]
    assert {"000009.pt", "global_step_7.pt", "global_step_8.pt"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"keep": 0}, "trainer.max_actor_ckpt_to_keep=0; expected at least 1"),
        ({"every": 0}, "trainer.keep_every=0; expected at least 1"),
        ({"best_by": ""}, "trainer.keep_best_by=; expected a metric"),
        ({"best_by": "-"}, "trainer.keep_best_by=-; expected a metric"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(policy: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        RetentionPolicy(**policy)
