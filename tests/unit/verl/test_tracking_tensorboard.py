"""Event files, read back with the reader of TensorBoard's own server."""

import errno
import html
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.util.tensor_util import make_ndarray

from agentlightning.errors import ConfigError
from agentlightning.verl import loggers as loggers_module
from agentlightning.verl.metrics import SCORE
from agentlightning.verl.tracking import Tracking
from agentlightning.verl.tracking_samples import GenerationSample
from agentlightning.verl.tracking_tensorboard import markdown_table

SAMPLE = GenerationSample("2+2?", "4", "4", 1.0, "sums")


def start(run_dir: Path) -> Tracking:
    return Tracking(run_dir, logger=["console", "tensorboard"])


def train(tracking: Tracking, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1):
        tracking.log(step, {SCORE: step / 8 + offset})


def read(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir), tensor_size_guidance={"scalars": 0, "text": 0})
    events.Reload()
    return events


def scores(run_dir: Path) -> list[tuple[int, float]]:
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in read(run_dir / "tensorboard").Tensors(SCORE)]


def shown_steps(run_dir: Path) -> list[int]:
    return [event.step for event in read(run_dir / "tensorboard" / "samples").Tensors("val/generations")]


def test_each_step_once_after_a_kill_with_the_numbers_of_the_second_time(tmp_path: Path) -> None:
    killed = start(tmp_path)
    killed.resume(0)
    train(killed, 1, 7)
    again = start(tmp_path)
    assert again.resume(5, {SCORE: 5 / 8}) == 2
    train(again, 6, 8, offset=100.0)
    again.finish()
    assert scores(tmp_path) == [(step, step / 8 + (100.0 if step > 5 else 0.0)) for step in range(1, 9)]


def test_a_step_whose_event_did_not_come_before_the_kill_is_logged(tmp_path: Path) -> None:
    killed = start(tmp_path)
    killed.resume(0)
    train(killed, 1, 3)
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-5])  # step 3, in the middle of its event
    again = start(tmp_path)
    again.resume(3, {SCORE: 3 / 8})
    train(again, 4, 4)
    assert scores(tmp_path) == [(step, step / 8) for step in range(1, 5)]


def test_workers_that_die_in_one_process(tmp_path: Path) -> None:
    tracking = start(tmp_path)
    tracking.resume(0)
    train(tracking, 1, 4)
    tracking.resume(2)
    train(tracking, 3, 5, offset=1.0)
    assert scores(tmp_path) == [(1, 0.125), (2, 0.25), (3, 1.375), (4, 1.5), (5, 1.625)]


def test_a_run_that_gets_the_logger_late_shows_its_whole_curve(tmp_path: Path) -> None:
    without = Tracking(tmp_path)
    without.resume(0)
    train(without, 1, 3)
    late = start(tmp_path)
    late.resume(3)
    train(late, 4, 4)
    assert scores(tmp_path) == [(step, step / 8) for step in range(1, 5)]


def test_a_new_run_in_the_directory_of_one_that_never_saved(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.resume(0)
    train(first, 0, 3, offset=9.0)
    second = start(tmp_path)
    second.resume(0)
    train(second, 0, 1)
    assert scores(tmp_path) == [(0, 0.0), (1, 0.125)]


def test_files_are_read_in_the_order_of_the_starts_even_if_the_clock_was_set_back(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.resume(0)
    train(first, 1, 4)
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.4000000000.host.1.0"))
    second = start(tmp_path)
    second.resume(2)
    train(second, 3, 3, offset=1.0)
    assert scores(tmp_path) == [(1, 0.125), (2, 0.25), (3, 1.375)]


def test_samples_stay_at_the_step_that_a_run_goes_on_from_and_later_ones_are_shown_once(tmp_path: Path) -> None:
    killed = start(tmp_path)
    killed.resume(0)
    for step in (1, 2, 3):
        killed.log_val_generations(step, [SAMPLE])
        killed.log(step, {SCORE: 0.0})
    again = start(tmp_path)
    again.resume(2)
    for step in (3, 4):
        again.log_val_generations(step, [SAMPLE])
        again.log(step, {SCORE: 0.0})
    assert shown_steps(tmp_path) == [1, 2, 3, 4]
    assert [step for step, _ in scores(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_is_told_once_and_the_curve_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(writer: RecordWriter, data: bytes) -> None:
        writer._writer.write(data[: len(data) // 2])  # what fitted
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loggers_module, "_SECONDS_BETWEEN_TRIES", 0.0)
    tracking = start(tmp_path)
    tracking.resume(0)
    train(tracking, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        train(tracking, 3, 3)
        assert tracking.trouble is not None
        assert re.search("tensorboard could not be written.*No space left", tracking.trouble)
        train(tracking, 4, 5)
        assert tracking.trouble is None  # told already
    train(tracking, 6, 6)
    assert tracking.trouble is None
    tracking.finish()
    assert scores(tmp_path) == [(step, step / 8) for step in range(1, 7)]
    assert [line[SCORE] for line in tracking.history] == [step / 8 for step in range(1, 7)]


def test_a_directory_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(ConfigError, match=r"trainer\.logger: given tensorboard.*trainer\.logger=\[console\]"):
        start(tmp_path)


def test_nan_is_a_gap(tmp_path: Path) -> None:
    tracking = start(tmp_path)
    tracking.resume(0)
    for step, value in enumerate([0.5, float("nan"), float("inf"), 1.5], start=1):
        tracking.log(step, {SCORE: value})
    assert scores(tmp_path) == [(1, 0.5), (4, 1.5)]


def test_samples_are_shown_as_they_are() -> None:
    wild = "<script>alert(1)</script> **bold** _it_ | `code` [a](http://x) \\n &amp;\n\n# head\r\n- item\u2028end"
    shown = markdown_to_safe_html(markdown_table([GenerationSample(wild, "| --- |", "é 漢", 0.25, "a|b")]))
    cells = re.findall(r"<td>(.*?)</td>", shown, flags=re.DOTALL)
    texts = [html.unescape(re.sub(r"<br ?/?>", "\n", cell)) for cell in cells]
    assert texts == [wild.replace("\r\n", "\n").replace("\u2028", "\n"), "| --- |", "é 漢", "0.25", "a|b"]
    assert "<script" not in shown
    assert "<strong>" not in shown
