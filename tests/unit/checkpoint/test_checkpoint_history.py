"""attempts.jsonl: what a run knows of its earlier starts, after any death and with any line torn."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from agentlightning.checkpoint import history as history_module
from agentlightning.checkpoint.history import HISTORY_FILE, FailureSummary, RunHistory

T0 = 1_700_000_000.0


class Clock:
    """A time that only the test moves."""

    def __init__(self, at: float = T0):
        self.at = at

    def __call__(self) -> float:
        return self.at

    def forward(self, seconds: float) -> None:
        self.at += seconds


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / HISTORY_FILE).read_text().splitlines()]


def test_one_attempt_from_start_to_end(tmp_path: Path) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    assert history.summary() == FailureSummary(0, 0.0)
    assert not (tmp_path / HISTORY_FILE).exists()  # reading leaves nothing behind
    history.begin(1, previous_died_at=None)
    clock.forward(100)
    assert history.summary() == FailureSummary(0, 100.0)
    assert history.summary(T0 + 40) == FailureSummary(0, 40.0)
    history.end("finished", step=7)
    clock.forward(1000)
    assert history.summary() == FailureSummary(0, 100.0)
    assert lines(tmp_path) == [
        {"event": "start", "attempt": 1, "at": T0, "host": socket.gethostname(), "pid": os.getpid()},
        {"event": "end", "attempt": 1, "at": T0 + 100, "how": "finished", "step": 7},
    ]
    assert RunHistory(tmp_path, clock).summary() == FailureSummary(0, 100.0)


@pytest.mark.parametrize(("how", "failures"), [("finished", 0), ("preempted", 0), ("failed", 1), ("killed", 1)])
def test_which_endings_are_failures(tmp_path: Path, how: Any, failures: int) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    history.begin(1, previous_died_at=None)
    clock.forward(10)
    history.end(how, step=3)
    clock.forward(500)  # between attempts nothing runs
    again = RunHistory(tmp_path, clock)
    again.begin(2, previous_died_at=clock.at)  # a lease says nothing about an attempt whose end is known
    clock.forward(5)
    assert again.summary() == FailureSummary(failures, 15.0)
    assert [line["event"] for line in lines(tmp_path)] == ["start", "end", "start"]


@pytest.mark.parametrize(
    ("died_at", "recorded"),
    [(None, T0 + 30), (T0 + 80, T0 + 80), (T0 + 10, T0 + 30), (T0 + 9999, T0 + 200)],
    ids=["unknown: its last line", "the heartbeat", "before its last line", "after now"],
)
def test_a_killed_attempt_is_ended_by_the_next(tmp_path: Path, died_at: float | None, recorded: float) -> None:
    clock = Clock()
    killed = RunHistory(tmp_path, clock)
    killed.begin(1, previous_died_at=None)
    clock.forward(30)
    killed.worker_died()
    clock.forward(170)
    history = RunHistory(tmp_path, clock)
    history.begin(2, previous_died_at=died_at)
    assert lines(tmp_path)[2] == {"event": "end", "attempt": 1, "at": recorded, "how": "killed", "step": None}
    assert history.summary() == FailureSummary(2, recorded - T0)  # the worker and the kill
    assert RunHistory(tmp_path, clock).summary() == history.summary()


def test_every_worker_that_died_counts(tmp_path: Path) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    history.begin(1, previous_died_at=None)
    for _ in range(3):
        clock.forward(10)
        history.worker_died()
    assert history.summary() == FailureSummary(3, 30.0)
    history.end("finished", step=5)
    history.worker_died()  # they all go at the end
    history.end("failed", step=5)  # an exit handler that knows less than what was said before it
    assert RunHistory(tmp_path, clock).summary() == FailureSummary(3, 30.0)
    assert len(lines(tmp_path)) == 5


def test_many_attempts_add_up(tmp_path: Path) -> None:
    clock = Clock()
    for attempt, how in enumerate(["failed", None, "preempted", None, "finished"], start=1):
        history = RunHistory(tmp_path, clock)
        history.begin(attempt, previous_died_at=clock.at - 50)
        clock.forward(60)
        if how is not None:
            history.end(how, step=attempt)  # type: ignore[arg-type]
        clock.forward(50)  # the heartbeat of a killed one stops 60 seconds after its start
    assert RunHistory(tmp_path, clock).summary() == FailureSummary(3, 300.0)


def test_an_attempt_whose_end_nobody_wrote_was_killed_at_its_last_line(tmp_path: Path) -> None:
    events = [
        {"event": "start", "attempt": 1, "at": T0},
        {"event": "restart", "attempt": 1, "at": T0 + 20},
        {"event": "start", "attempt": 2, "at": T0 + 100},
        {"event": "end", "attempt": 2, "at": T0 + 140, "how": "finished", "step": 9},
    ]
    (tmp_path / HISTORY_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    assert RunHistory(tmp_path).summary(T0 + 500) == FailureSummary(2, 60.0)


def test_a_clock_that_was_set_back_makes_no_negative_time(tmp_path: Path) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    history.begin(1, previous_died_at=None)
    clock.forward(-500)
    assert history.summary() == FailureSummary(0, 0.0)
    history.end("finished", step=1)
    again = RunHistory(tmp_path, clock)
    again.begin(2, previous_died_at=T0 + 3)
    clock.forward(10)
    assert again.summary() == FailureSummary(0, 10.0)


def test_a_number_that_comes_twice_is_two_attempts(tmp_path: Path) -> None:
    clock = Clock()
    for _ in range(2):
        history = RunHistory(tmp_path, clock)
        history.begin(1, previous_died_at=None)
        clock.forward(10)
        history.end("failed", step=2)
    assert RunHistory(tmp_path, clock).summary() == FailureSummary(2, 20.0)


def test_an_end_is_written_once_also_if_a_number_came_twice(tmp_path: Path) -> None:
    starts = [{"event": "start", "attempt": 1, "at": T0}, {"event": "start", "attempt": 1, "at": T0 + 50}]
    (tmp_path / HISTORY_FILE).write_text("".join(json.dumps(event) + "\n" for event in starts))
    clock = Clock(T0 + 100)
    RunHistory(tmp_path, clock).begin(2, previous_died_at=None)
    RunHistory(tmp_path, clock).begin(3, previous_died_at=None)
    assert [(line["event"], line["attempt"]) for line in lines(tmp_path)[2:]] == [
        *[("end", 1), ("end", 1), ("start", 2)],
        *[("end", 2), ("start", 3)],
    ]


def test_torn_at_any_byte_it_is_read_and_goes_on(tmp_path: Path) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    history.begin(1, previous_died_at=None)
    clock.forward(10)
    history.end("failed", step=4)
    whole = (tmp_path / HISTORY_FILE).read_bytes()
    end_of_start = whole.index(b"\n")
    for cut in range(len(whole) + 1):
        root = tmp_path / str(cut)
        root.mkdir()
        (root / HISTORY_FILE).write_bytes(whole[:cut])
        again = RunHistory(root, clock)
        again.begin(2, previous_died_at=T0 + 10)
        clock.forward(5)
        again.end("finished", step=6)
        # A line is known when its last brace is there, its newline or not. A lost end is a kill, and a kill is a failure too.
        expected = FailureSummary(1, 15.0) if cut >= end_of_start else FailureSummary(0, 5.0)
        assert RunHistory(root, clock).summary() == expected, cut
        assert b"}{" not in (root / HISTORY_FILE).read_bytes()
        clock.forward(-5)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"7",
        b"{}",
        b'{"event": "paused", "attempt": 1, "at": 1700000050}',
        b'{"event": "end", "attempt": 1, "at": 1700000050, "how": "eaten"}',
        b'{"event": "end", "attempt": 1, "at": 1700000050}',
        b'{"event": "end", "attempt": 1, "at": 1700000050, "how": ["failed"]}',
        b'{"event": "end", "attempt": 9, "at": 1700000050, "how": "failed"}',
        b'{"event": "restart", "attempt": 9, "at": 1700000050}',
        b'{"event": "restart", "attempt": true, "at": 1700000050}',
        b'{"event": "restart", "attempt": 1, "at": NaN}',
        b'{"event": "restart", "attempt": 1, "at": 1e999}',
        b'{"event": "restart", "attempt": 1, "at": -1}',
        b'{"event": "restart", "attempt": 1, "at": 1' + b"0" * 400 + b"}",
        b'{"event": "restart", "attempt": 1, "at": "today"}',
        b'{"event": "restart", "at": 1700000050}',
    ],
    ids=lambda line: line[:60].decode(errors="replace") or "empty",
)
def test_a_line_that_says_nothing_known_is_passed_over(tmp_path: Path, line: bytes) -> None:
    start = json.dumps({"event": "start", "attempt": 1, "at": T0}).encode()
    end = json.dumps({"event": "end", "attempt": 1, "at": T0 + 60, "how": "finished", "step": 1}).encode()
    (tmp_path / HISTORY_FILE).write_bytes(b"\n".join([start, line, end, b""]))
    assert RunHistory(tmp_path).summary(T0 + 100) == FailureSummary(0, 60.0)


def test_a_line_is_one_write_at_the_end_and_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *given: (calls.append("write"), write(*given))[1])
    monkeypatch.setattr(os, "fsync", lambda *given: (calls.append("fsync"), fsync(*given))[1])
    history = RunHistory(tmp_path, Clock())
    history.begin(1, previous_died_at=None)
    assert calls == ["write", "fsync", "fsync"]  # a new file: its name too
    del calls[:]
    history.worker_died()
    assert calls == ["write", "fsync"]
    del calls[:]
    RunHistory(tmp_path, Clock()).begin(2, previous_died_at=None)
    assert calls == ["write", "fsync"]  # the end of the killed one and the start together


def test_a_full_disk_is_the_callers_to_judge_and_this_process_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(descriptor: int, data: bytes) -> int:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(history_module.os, "write", refuse)
        with pytest.raises(OSError, match="No space"):
            history.begin(1, previous_died_at=None)
        with pytest.raises(OSError, match="No space"):
            history.worker_died()
    clock.forward(10)
    assert history.summary() == FailureSummary(1, 10.0)
    history.end("failed", step=2)  # of an attempt whose start is not in the file
    again = RunHistory(tmp_path, clock)
    again.begin(2, previous_died_at=None)
    assert again.summary() == FailureSummary(0, 0.0)


def test_a_line_that_the_disk_cut_short_is_healed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    history.begin(1, previous_died_at=None)
    write, written = os.write, []

    def half(descriptor: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(len(data))
        return write(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(history_module.os, "write", half)
        with pytest.raises(OSError, match="No space"):
            history.worker_died()
    clock.forward(10)
    history.end("finished", step=2)
    assert RunHistory(tmp_path, clock).summary() == FailureSummary(0, 10.0)


def test_a_file_that_cannot_be_read_is_not_an_empty_history(tmp_path: Path) -> None:
    (tmp_path / HISTORY_FILE).mkdir()
    with pytest.raises(IsADirectoryError):
        RunHistory(tmp_path)


def test_an_attempt_begins_before_it_ends(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="begin"):
        RunHistory(tmp_path).end("finished", step=1)


def test_a_heartbeat_belongs_to_the_attempt_just_before(tmp_path: Path) -> None:
    events = [
        {"event": "start", "attempt": 1, "at": T0},
        {"event": "restart", "attempt": 1, "at": T0 + 20},
        {"event": "start", "attempt": 2, "at": T0 + 100},
    ]
    (tmp_path / HISTORY_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    history = RunHistory(tmp_path, Clock(T0 + 500))
    history.begin(3, previous_died_at=T0 + 130)
    assert [(line["attempt"], line["at"]) for line in lines(tmp_path)[3:5]] == [(1, T0 + 20), (2, T0 + 130)]
    assert history.summary() == FailureSummary(3, 50.0)


def test_lines_out_of_order_of_time_count_to_the_latest(tmp_path: Path) -> None:
    clock = Clock()
    history = RunHistory(tmp_path, clock)
    history.begin(1, previous_died_at=None)
    clock.forward(20)
    history.worker_died()
    clock.forward(-10)
    history.end("finished", step=1)
    assert history.summary() == FailureSummary(1, 20.0)
