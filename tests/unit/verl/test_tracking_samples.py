"""Which samples are shown, and the files of trainer.rollout_data_dir."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from agentlightning.verl.metrics import SCORE
from agentlightning.verl.tracking import Tracking
from agentlightning.verl.tracking_samples import GenerationSample, choose_samples, write_rollouts

SAMPLE = GenerationSample("2+2?", "4", "4", 1.0, "sums", {"format": 0.5})


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_same_samples_are_chosen_each_time_for_ever() -> None:
    assert choose_samples(4, 100, seed=1) == [5, 7, 39, 75]
    assert choose_samples(4, 100, seed=2) != choose_samples(4, 100, seed=1)
    assert set(choose_samples(4, 100, seed=1)) < set(choose_samples(9, 100, seed=1))
    assert choose_samples(5, 3, seed=1) == [0, 1, 2]
    assert choose_samples(0, 3, seed=1) == choose_samples(2, 0, seed=1) == []


def test_each_sample_is_chosen_about_as_often() -> None:
    counts = np.bincount([i for seed in range(2000) for i in choose_samples(2, 8, seed)], minlength=8)
    assert counts.sum() == 4000
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_verl_s_layout(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path / "a" / "b", 12, [SAMPLE, GenerationSample("é\n", "\ud800 x", ["1", 2], 0.0)])
    assert path == tmp_path / "a" / "b" / "12.jsonl"
    assert lines_of(path) == [
        {"input": "2+2?", "output": "4", "gts": "4", "score": 1.0, "step": 12, "data_source": "sums", "format": 0.5},
        {"input": "é\n", "output": "\ud800 x", "gts": ["1", 2], "score": 0.0, "step": 12, "data_source": ""},
    ]
    assert "é" in path.read_text(encoding="utf-8")


def test_what_json_does_not_know(tmp_path: Path) -> None:
    extra = {
        "n": np.float32(0.5),
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "step": 99,
        "where": Path("x"),
        "v": np.arange(2),
    }
    path = write_rollouts(tmp_path, 1, [GenerationSample("a", "b", {"k": (1, float("inf"))}, 1.0, "s", extra)])
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (line,) = lines_of(path)
    assert line["gts"] == {"k": [1, None]}
    assert line["step"] == 1  # ours
    assert [line[name] for name in ("n", "nan", "inf", "where", "v")] == [0.5, None, None, "x", [0, 1]]


def test_a_step_done_again_rewrites_its_file_and_no_other(tmp_path: Path) -> None:
    for step in (1, 2):
        write_rollouts(tmp_path, step, [SAMPLE, SAMPLE])
    write_rollouts(tmp_path, 2, [SAMPLE])
    assert sorted(os.listdir(tmp_path)) == ["1.jsonl", "2.jsonl"]
    assert [len(lines_of(tmp_path / name)) for name in ("1.jsonl", "2.jsonl")] == [2, 1]


def test_a_relative_directory_is_taken_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rollouts(Path("rollouts"), 1, [SAMPLE])
    assert (tmp_path / "rollouts" / "1.jsonl").is_file()


def test_a_full_disk_is_told_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rollouts = tmp_path / "rollouts"
    tracking = Tracking(tmp_path / "run", rollout_data_dir=rollouts)
    tracking.resume(0)
    tracking.log_rollouts(1, [SAMPLE])
    before = (rollouts / "1.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        tracking.log_rollouts(1, [SAMPLE, SAMPLE])
    tracking.log(1, {SCORE: 0.0})
    assert tracking.trouble is not None
    assert "samples of step 1" in tracking.trouble
    assert os.listdir(rollouts) == ["1.jsonl"]
    assert (rollouts / "1.jsonl").read_bytes() == before
    tracking.log(2, {SCORE: 0.0})
    assert tracking.trouble is None


def test_without_a_directory_nothing_is_written(tmp_path: Path) -> None:
    Tracking(tmp_path).log_rollouts(1, [SAMPLE])
    assert os.listdir(tmp_path) == []


def test_a_lone_surrogate_becomes_what_every_logger_can_encode() -> None:
    cells = GenerationSample("\ud800", "b", 3, np.float32(0.5).item(), "s").cells
    assert cells == ["?", "b", "3", 0.5, "s"]
