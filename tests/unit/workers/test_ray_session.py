"""Folders of sessions: one's own goes, what a killed run has left goes at the next start, everybody else's stays."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from agentlightning.workers import ray_session
from agentlightning.workers.ray_session import mark_owner, mark_session, remove_session


def mark(folder: Path, pid: int, started: float, pids: str, session: str = "") -> Path:
    path = folder / f"agentlightning_owner_{pid}_{pids}"
    path.write_text(f"{pid} {started} {pids} {session}\n")
    return path


@pytest.fixture
def session(tmp_path):
    def make(began: float, pid: int) -> Path:
        folder = tmp_path / f"session_{datetime.fromtimestamp(began).strftime('%Y-%m-%d_%H-%M-%S_%f')}_{pid}"
        (folder / "logs").mkdir(parents=True)
        return folder

    return make


@pytest.mark.parametrize("came_up", [False, True])
def test_folders_of_killed_runs_are_removed_those_of_others_stay(came_up, tmp_path, sleeper, session):
    """A run may be killed at any time, also while Ray is just coming up: what says whose a session is was there before."""
    created, pids = psutil.Process(sleeper.pid).create_time(), ray_session._pid_namespace()
    sleeper_s, nobodys = session(created + 2, sleeper.pid), session(created + 2, 4194999)
    other_s = session(created - 5000, sleeper.pid)  # of `ray start`, whose own process ended long ago
    (tmp_path / "session_latest").symlink_to(sleeper_s)
    owner = mark(tmp_path, sleeper.pid, created, pids, sleeper_s.name if came_up else "")
    mark_owner(tmp_path)
    assert all(folder.exists() for folder in (sleeper_s, nobodys, other_s, owner))

    sleeper.kill()
    sleeper.wait()
    mine, joined = session(time.time(), os.getpid()), session(time.time(), os.getpid() + 1)
    mark_owner(tmp_path)
    assert [folder.exists() for folder in (sleeper_s, owner, nobodys, other_s)] == [False, False, True, True]

    if came_up:
        mark_session(mine)
    remove_session(joined)
    remove_session(mine)
    assert joined.exists()
    assert {path.name for path in tmp_path.iterdir()} == {joined.name, nobodys.name, other_s.name, "session_latest"}


def test_another_containers_session_is_not_taken_for_a_dead_one(tmp_path, sleeper, session):
    """It has mounted the same folder, and its numbers of processes say nothing here."""
    created, pids = psutil.Process(sleeper.pid).create_time(), ray_session._pid_namespace()
    sleeper.kill()
    sleeper.wait()
    alive, dead = session(created + 20, sleeper.pid), session(created + 2, sleeper.pid)
    elsewhere = mark(tmp_path, sleeper.pid, created + 19, "4026530000", alive.name)
    here = mark(tmp_path, sleeper.pid, created, pids)
    unread = tmp_path / "agentlightning_owner_1_1"
    unread.write_text("12")
    mark_owner(tmp_path)
    assert [path.exists() for path in (alive, elsewhere, unread, dead, here)] == [True, True, True, False, False]


def test_what_ray_calls_a_session_is_what_is_looked_for(tmp_path):
    mark(tmp_path, 17550, 86400.0, "1")
    (tmp_path / "session_2026-11-25_15-41-17_180508_17550").mkdir()
    (tmp_path / "session_something_else_17550").mkdir()
    owner = ray_session._Owner.read(tmp_path / "agentlightning_owner_17550_1")
    assert owner is not None
    [found] = owner.sessions(tmp_path)
    assert found.name == "session_2026-11-25_15-41-17_180508_17550"
