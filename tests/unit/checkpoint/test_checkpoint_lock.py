"""One run in one directory: the second is told who holds it, and death lets the next one in."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentlightning.checkpoint import CheckpointManager, RunLock
from agentlightning.errors import CheckpointError

HOLD = """
import sys, time
from pathlib import Path
from agentlightning.checkpoint.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def holder(root: Path) -> subprocess.Popen[str]:
    """A process that holds `root` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_within_a_second_and_death_lets_it_in(tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = holder(root)
    try:
        started = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            CheckpointManager(root, save_freq=1)
        assert time.monotonic() - started < 1
        message = str(caught.value)
        assert f"pid {process.pid} on {socket.gethostname()} since 2" in message
        assert "trainer.default_local_dir" in message
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with CheckpointManager(root, save_freq=1):  # at once, and there was nothing to clear by hand
        text = (root / ".lock").read_text()
        assert re.search(rf'"pid": {os.getpid()}\b', text)
        assert text.count("\n") == 1


def test_a_run_that_is_just_dying_is_waited_for(tmp_path: Path) -> None:
    process = holder(tmp_path)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.15; kill -9 {process.pid}"])
    try:
        with RunLock(tmp_path, wait_seconds=20):
            pass
    finally:
        killer.wait()
        process.communicate()


def test_release_and_reuse_in_one_process(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(CheckpointError, match=f"pid {os.getpid()} "):
        RunLock(tmp_path, wait_seconds=0)
    with RunLock(tmp_path, wait_seconds=0):
        pass


def test_a_torn_text_does_not_matter(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text('{"host": ')
        with pytest.raises(CheckpointError, match="in use by another run"):
            RunLock(tmp_path, wait_seconds=0)
    (tmp_path / ".lock").write_text("x" * 1000)
    with RunLock(tmp_path, wait_seconds=0):
        assert len((tmp_path / ".lock").read_text()) < 300


def test_the_lock_of_a_dead_run_is_no_checkpoint_and_no_leftover(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("{}")
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        assert manager.load_latest() is None
        assert (tmp_path / ".lock").exists()
