"""metrics.jsonl over kills and resumes, reward.png, and W&B offline."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from agentlightning.errors import ConfigError, DataError
from agentlightning.verl import tracking as tracking_module
from agentlightning.verl import tracking_wandb
from agentlightning.verl.metrics import ATTEMPT, SCORE, STEP
from agentlightning.verl.plot import draw_reward_curve, resumed_at, series, smoothed
from agentlightning.verl.tracking import MetricsFile, Tracking


def steps_in(run_dir: Path) -> list[int]:
    return [json.loads(line)[STEP] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run_steps(run_dir: Path, resume_at: int, until: int) -> Tracking:
    tracking = Tracking(run_dir)
    tracking.resume(resume_at)
    for step in range(resume_at + 1, until + 1):
        tracking.log(step, {SCORE: step / 10})
    return tracking


def test_each_step_once_after_a_kill_and_a_resume_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 7)
    again = Tracking(tmp_path)
    assert again.resume(5) == 2
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    again.log(6, {SCORE: 0.0})
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [line[ATTEMPT] for line in again.history] == [1, 1, 1, 1, 1, 2]


def test_the_line_of_the_checkpointed_step_is_written_if_the_kill_came_before_it(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 3)
    tracking = Tracking(tmp_path)
    assert tracking.resume(4, {SCORE: 0.44, ATTEMPT: 1}) == 0
    assert tracking.history[-1] == {STEP: 4, ATTEMPT: 1, SCORE: 0.44}
    assert Tracking(tmp_path).history == tracking.history


def test_a_line_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 4)
    Tracking(tmp_path).resume(4, {SCORE: 99.0})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert Tracking(tmp_path).history[-1][SCORE] == 0.4


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_passed_over_and_then_removed(tmp_path: Path, cut: int) -> None:
    run_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    tracking = Tracking(tmp_path)
    assert tracking.resume(3, {SCORE: 0.3}) == 0
    assert steps_in(tmp_path) == [1, 2, 3]
    assert tracking.history[-1][SCORE] == 0.3


def test_a_new_run_drops_the_lines_of_one_that_never_saved(tmp_path: Path) -> None:
    first = Tracking(tmp_path)
    first.resume(0)
    first.log(0, {"val-core/x/reward/mean@1": 0.1})
    first.log(1, {SCORE: 0.1})
    second = Tracking(tmp_path)
    assert second.resume(0) == 2
    second.log(0, {"val-core/x/reward/mean@1": 0.1})
    assert steps_in(tmp_path) == [0]


def test_truncating_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_steps(tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Tracking(tmp_path).resume(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_step_cannot_come_twice(tmp_path: Path) -> None:
    tracking = run_steps(tmp_path, 0, 2)
    with pytest.raises(ValueError, match="already has a line of step 2"):
        tracking.log(2, {})


def test_numpy_numbers_and_nan_become_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"a": np.float32(0.5), "b": np.int64(3), "c": float("nan"), "d": np.inf, "e": 2})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {STEP: 1, "a": 0.5, "b": 3, "c": None, "d": None, "e": 2}
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"training/global_step": 1}\nnonsense\n{"training/global_step": 3}\n', "line 2 is not JSON"),
        ('{"training/global_step": 1}\n{"loss": 2}\n', "line 2 has no training/global_step"),
        ('{"training/global_step": 2}\n{"training/global_step": 1}\n', "step 1 follows step 2"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_with_the_way_out(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=complaint) as error:
        Tracking(tmp_path)
    assert "trainer.default_local_dir=" in str(error.value)


def test_reward_png_is_drawn_at_the_end_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = run_steps(tmp_path, 0, 4)
    assert not tracking.picture.exists()
    tracking.finish()
    picture = tracking.picture.read_bytes()
    assert picture.startswith(b"\x89PNG")

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    tracking.log(5, {SCORE: 1.0})
    with pytest.raises(KeyboardInterrupt):
        tracking.draw()
    assert tracking.picture.read_bytes() == picture


def test_reward_png_is_drawn_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_module, "_SECONDS_BETWEEN_PICTURES", -1.0)
    tracking = run_steps(tmp_path, 0, 1)
    tracking.log(2, {SCORE: 0.5})  # waits for the picture before it draws the next one
    assert tracking.picture.exists()


def test_a_picture_that_could_not_be_drawn_is_told_with_a_later_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_module, "_SECONDS_BETWEEN_PICTURES", -1.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tracking_module, "draw_reward_curve", full)
        tracking = run_steps(tmp_path, 0, 1)
    tracking.log(2, {SCORE: 0.5})
    assert tracking.trouble == f"{tmp_path / 'reward.png'} could not be drawn (No space left on device)"
    tracking.log(3, {SCORE: 0.5})
    assert tracking.trouble is None
    tracking.finish()
    assert tracking.picture.exists()


def test_a_run_without_a_step_draws_nothing(tmp_path: Path) -> None:
    draw_reward_curve([{STEP: 0, "val-core/x/reward/mean@1": 0.1}], tmp_path / "reward.png", "title")
    assert not (tmp_path / "reward.png").exists()


def test_the_marks_stand_where_a_further_attempt_began() -> None:
    lines = [{STEP: 0}] + [{STEP: step, ATTEMPT: attempt} for step, attempt in [(1, 1), (2, 1), (3, 2), (4, 4), (5, 4)]]
    assert resumed_at(lines) == [3, 4]


def test_series_and_smoothing_by_hand() -> None:
    steps, values = series([{STEP: 1, "x": 1.0}, {STEP: 2}, {STEP: 3, "x": None}, {STEP: 4, "x": 3.0}], "x")
    assert steps.tolist() == [1, 3, 4]
    assert np.array_equal(values, [1.0, np.nan, 3.0], equal_nan=True)
    assert smoothed(np.array([1.0, 2.0, 3.0, 7.0]), width=3).tolist() == [1.0, 1.5, 2.0, 4.0]


class FakeWandbRun:
    """Stands for the service: W&B's own process is exercised by the offline test below."""

    offline = False

    def __init__(self, step: int) -> None:
        self.step = step
        self.logged: list[int] = []
        self.exit_code: int | None = None

    def log(self, metrics: dict[str, object], step: int) -> None:
        self.logged.append(step)
        self.step = step + 1

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_wandb_gets_no_step_twice_and_the_same_run_id_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []
    run = FakeWandbRun(step=6)  # the service already has steps up to 5

    def start(_: object, run_id: str) -> FakeWandbRun:
        ids.append(run_id)
        return run

    monkeypatch.setattr(tracking_wandb, "_start_wandb", start)
    Tracking(tmp_path, logger=["wandb"])  # killed before its first checkpoint
    tracking = Tracking(tmp_path, logger=["wandb"])
    tracking.resume(3)
    for step in range(4, 8):
        tracking.log(step, {SCORE: 0.0})
    tracking.finish(exit_code=1)
    assert ids[0] == ids[1] == tracking.wandb_run_id
    assert run.logged == [6, 7]
    assert run.exit_code == 1
    assert Tracking(tmp_path, logger=["wandb"], wandb_run_id="fromckpt").wandb_run_id == "fromckpt"


def test_wandb_offline_runs_under_the_kept_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = Tracking(tmp_path, logger=["wandb"], project_name="p", experiment_name="e", config={"seed": 1})
    tracking.resume(0)
    tracking.log(1, {SCORE: 0.5})
    tracking.finish()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{tracking.wandb_run_id}/run-{tracking.wandb_run_id}.wandb"))


def test_wandb_without_a_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def no_login(**_: object) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty).")

    monkeypatch.setattr(wandb, "init", no_login)
    with pytest.raises(ConfigError, match=r"trainer\.logger=") as error:
        Tracking(tmp_path, logger=["console", "wandb"])
    assert "WANDB_MODE=offline" in str(error.value)
    assert "trainer.logger=[console]" in str(error.value)


def test_a_full_disk_costs_no_line(tmp_path, monkeypatch):
    tracking = Tracking(tmp_path)
    tracking.resume(0)
    tracking.log(1, {"a": 1})
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        tracking.log(2, {"a": 2})
        assert tracking.trouble is not None
        assert "No space left" in tracking.trouble
        tracking.log(3, {"a": 3})
    assert os.fsync is real
    tracking.log(4, {"a": 4})
    assert tracking.trouble is None
    assert [line["a"] for line in MetricsFile(tmp_path / "metrics.jsonl").lines] == [1, 2, 3, 4]
