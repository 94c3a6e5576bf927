"""One run in one directory: the second is told who holds it, death lets the next one in, and who lost it saves nothing."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentlightning.checkpoint import lease as module
from agentlightning.checkpoint.lease import LEASE_FILE, Lease, LeaseLostError
from agentlightning.errors import CheckpointError

HOLD = """
import os, sys
from pathlib import Path
from agentlightning.checkpoint.lease import Lease, LeaseLostError
lease = Lease(Path(sys.argv[1]))
if "fork" in sys.argv and os.fork() == 0:
    sys.stdin.read()  # outlives its parent
    os._exit(0)
print("held", flush=True)
for line in sys.stdin:
    try:
        with lease.committing():
            print("committed", flush=True)
    except LeaseLostError as error:
        print("lost:", error, flush=True)
"""
ELSEWHERE = {
    "host": "node7",
    "pid": 4242,
    "boot_id": "11111111-2222-3333-4444-555555555555",
    "token": "f" * 32,
    "since": "2025-01-31T12:00:00+01:00",
    "started": 1738321200.0,
}


@contextmanager
def holder(root: Path, *how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `root` until it is killed, and commits when it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root), *how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("commit\n")
    process.stdin.flush()
    return process.stdout.readline()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def forge(root: Path, silent: float = 0.0, **changes: Any) -> Path:
    """A lease that somebody wrote who has no lock that can be seen here, `silent` seconds ago; its path."""
    root.mkdir(exist_ok=True)
    path = root / LEASE_FILE
    path.write_text(json.dumps({**ELSEWHERE, **changes}) + "\n")  # in place
    now = time.time()
    os.utime(path, (now - silent, now - silent))
    return path


def told(root: Path) -> dict[str, Any]:
    return json.loads((root / LEASE_FILE).read_text())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_process_is_refused_within_a_second_and_death_lets_it_in(tmp_path: Path) -> None:
    root = tmp_path / "a" / "run"
    with holder(root) as process:
        assert ask(process) == "committed\n"
        before = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            Lease(root)
        assert time.monotonic() - before < 1
        message = str(caught.value)
        assert f"{root} is in use by pid {process.pid} on {socket.gethostname()} since 2" in message
        assert message.endswith("stop that run, or give this one another directory with trainer.default_local_dir=DIR")
        kill(process)
        with Lease(root, wait_seconds=0) as lease:  # at once, and there was nothing to clear by hand
            assert lease.previous is not None
            assert lease.previous.pid == process.pid
            assert lease.previous.host == socket.gethostname()
            assert abs(lease.previous.last_beat - time.time()) < 60
            assert lease.previous.started < lease.previous.last_beat + 1
            assert told(root)["pid"] == os.getpid()
    assert os.listdir(root) == [LEASE_FILE]


def test_a_run_that_is_just_dying_is_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.15; kill -9 {process.pid}"])
        with Lease(tmp_path, wait_seconds=20):
            pass
        killer.wait()


def test_a_child_that_outlives_the_holder_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as process:
        kill(process)
        with Lease(tmp_path, wait_seconds=5) as lease:  # a child that was just forked may not have closed the file yet
            assert lease.previous is not None


def test_release_and_reuse_in_one_process(tmp_path: Path) -> None:
    with Lease(tmp_path) as first:
        assert first.previous is None
        with pytest.raises(CheckpointError, match=f"in use by pid {os.getpid()} on "):
            Lease(tmp_path, wait_seconds=0)
    first.release()
    with Lease(tmp_path, wait_seconds=0) as second:
        assert second.previous is None
        with pytest.raises(LeaseLostError, match="was released"), first.committing():
            pytest.fail("committed")
        first.release()
        assert not first.lost
        with second.committing():
            pass
    assert (tmp_path / LEASE_FILE).read_text().count("\n") == 1


def test_a_lease_that_nobody_refers_to_is_free(tmp_path: Path) -> None:
    Lease(tmp_path)
    gc.collect()
    with Lease(tmp_path, wait_seconds=0) as lease:
        assert lease.previous is not None
        assert lease.previous.pid == os.getpid()


def test_a_child_can_neither_release_nor_commit(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                lease.release()
                lease.__exit__(None, None, None)
                try:
                    with lease.committing():
                        pass
                except CheckpointError as error:
                    code = 0 if f"belongs to process {os.getppid()}" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(CheckpointError, match=f"in use by pid {os.getpid()} "):
            Lease(tmp_path, wait_seconds=0)
        with lease.committing():
            pass
        assert "released" not in told(tmp_path)


@pytest.mark.parametrize("skew", [0.0, 86400.0, -86400.0])
def test_a_holder_on_another_host_is_judged_by_its_heartbeat_whatever_the_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    forge(tmp_path, silent=20)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    before = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        Lease(tmp_path)
    assert time.monotonic() - before < 1
    assert "is in use by pid 4242 on node7 since 2025-01-31T12:00:00+01:00 (" in str(caught.value)
    assert "last heartbeat is 20 s old, and it is taken over 60 s after its last heartbeat)" in str(caught.value)
    assert told(tmp_path) == ELSEWHERE
    assert os.listdir(tmp_path) == [LEASE_FILE]  # no probe is left
    with Lease(tmp_path, lapse_s=15) as lease:
        assert lease.previous is not None
        assert (lease.previous.host, lease.previous.pid, lease.previous.token) == ("node7", 4242, "f" * 32)
        assert abs(now() - 20 - lease.previous.last_beat) < 5


def test_a_heartbeat_far_in_the_future_is_not_waited_for(tmp_path: Path) -> None:
    forge(tmp_path, silent=-86400)
    with Lease(tmp_path):
        pass


def test_another_mount_of_the_same_host_is_another_host(tmp_path: Path) -> None:
    """Two containers that have each mounted a bucket: one kernel, and locks that do not meet."""
    boot_id = module._boot_id()
    forge(tmp_path, boot_id=boot_id, pid=os.getpid(), device=-1)
    with pytest.raises(CheckpointError, match="last heartbeat"):
        Lease(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    for changes in ({"pid": os.getpid(), "device": os.stat(tmp_path).st_dev}, {"pid": gone.pid, "device": -1}):
        forge(tmp_path, boot_id=boot_id, **changes)
        with Lease(tmp_path, wait_seconds=0) as lease:
            assert lease.previous is not None


def test_a_lock_that_the_file_server_keeps_for_a_dead_host_has_a_way_out(tmp_path: Path) -> None:
    with holder(tmp_path):
        path = forge(tmp_path, silent=5)
        with pytest.raises(CheckpointError, match=r"on node7 .* heartbeat is 5 s old, and it is taken over"):
            Lease(tmp_path, wait_seconds=0)
        forge(tmp_path, silent=3600)
        with pytest.raises(CheckpointError, match=rf"3600 s old, but the file system still keeps its lock; .* remove {path}"):
            Lease(tmp_path, wait_seconds=0)
        path.unlink()
        with Lease(tmp_path, wait_seconds=0):
            pass


def test_the_heart_beats_and_a_lost_lease_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / LEASE_FILE
    with Lease(tmp_path, lapse_s=0.06) as lease:
        for _ in range(3):
            os.utime(path, (1, 1))
            wait_until(lambda: path.stat().st_mtime > 1)
        assert not lease.lost
        forge(tmp_path)
        os.utime(path, (1, 1))
        wait_until(lambda: lease.lost)
        assert path.stat().st_mtime == 1
        with pytest.raises(LeaseLostError, match="taken over by pid 4242 on node7"), lease.committing():
            pytest.fail("committed")
    assert told(tmp_path) == ELSEWHERE
    assert path.stat().st_mtime == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_failed_heartbeat_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def utime(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / LEASE_FILE
    with Lease(tmp_path, beat_s=0.01):
        with monkeypatch.context() as patch:
            patch.setattr(os, "utime", utime)
            wait_until(lambda: "no heartbeat" in caplog.text)
        os.utime(path, (1, 1))
        wait_until(lambda: path.stat().st_mtime > 1)


def test_who_lost_the_lease_cannot_commit_and_never_can_again(tmp_path: Path) -> None:
    path = tmp_path / LEASE_FILE
    with Lease(tmp_path) as lease:
        with lease.committing():
            mine = path.read_text()
        forge(tmp_path)
        assert not lease.lost
        for text in ("", mine):
            with pytest.raises(LeaseLostError, match="node7") as caught, lease.committing():
                pytest.fail("committed")
            assert isinstance(caught.value, CheckpointError)
            assert "trainer.default_local_dir" in str(caught.value)
            assert lease.lost
            path.write_text(text)
    assert path.read_text() == mine  # and it released nothing


def test_a_run_that_came_and_went_meanwhile_counts_too(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        forge(tmp_path, released=True)
        with pytest.raises(LeaseLostError), lease.committing():
            pytest.fail("committed")
    with Lease(tmp_path) as after:
        assert after.previous is None


def test_a_holder_that_slept_through_its_lapse_cannot_commit(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        path = forge(tmp_path)
        os.utime(path, (1, 1))
        os.kill(process.pid, signal.SIGCONT)
        answer = ask(process)
        assert answer.startswith("lost: ")
        assert "taken over by pid 4242 on node7" in answer
        assert path.stat().st_mtime == 1


def test_a_holder_that_sleeps_on_the_same_host_keeps_its_lease(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        os.utime(tmp_path / LEASE_FILE, (1, 1))
        with pytest.raises(CheckpointError, match=f"in use by pid {process.pid} "):
            Lease(tmp_path, wait_seconds=0)
        os.kill(process.pid, signal.SIGCONT)
        assert ask(process) == "committed\n"


def test_a_directory_that_was_removed_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with Lease(root, beat_s=0.01) as lease:
        token = told(root)["token"]
        for what in (lambda: shutil.rmtree(root), (root / LEASE_FILE).unlink, lambda: (root / LEASE_FILE).write_text("")):
            what()
            with lease.committing():
                assert told(root)["token"] == token
            with pytest.raises(CheckpointError, match=f"in use by pid {os.getpid()} "):
                Lease(root, wait_seconds=0)
            os.utime(root / LEASE_FILE, (1, 1))
            wait_until(lambda: (root / LEASE_FILE).stat().st_mtime > 1)
        assert not lease.lost
        shutil.rmtree(root)
    assert not root.exists()


def test_a_directory_that_was_copied_back_is_still_ours(tmp_path: Path) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy"
    with Lease(root) as lease:
        shutil.copytree(root, copy)
        root.rename(tmp_path / "old")
        copy.rename(root)
        with lease.committing():
            pass
        with pytest.raises(CheckpointError, match="in use"):
            Lease(root, wait_seconds=0)
        with Lease(tmp_path / "old", wait_seconds=0):  # and only there
            pass
        with lease.committing():
            pass


def test_a_directory_that_another_run_made_again_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with Lease(root) as lease:
        shutil.rmtree(root)
        with Lease(root, wait_seconds=0) as other:
            with pytest.raises(LeaseLostError, match=f"taken over by pid {os.getpid()} "), lease.committing():
                pytest.fail("committed")
            lease.release()
            with other.committing():
                pass


def test_the_next_run_waits_for_the_end_of_a_commit(tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    with lease.committing():
        thread = threading.Thread(target=lease.release)
        thread.start()
        with pytest.raises(CheckpointError, match="in use"):
            Lease(tmp_path, wait_seconds=0.1)
        assert thread.is_alive()
    thread.join(10)
    with Lease(tmp_path, wait_seconds=0) as following:
        assert following.previous is None


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_heartbeat_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Lease(tmp_path) as lease:
        assert caplog.text.count("has no locks") == 1
        before = time.monotonic()
        with pytest.raises(CheckpointError, match=f"in use by pid {os.getpid()} on .* last heartbeat is [01] s old"):
            Lease(tmp_path)
        assert time.monotonic() - before < 1
        os.utime(tmp_path / LEASE_FILE, (1, 1))
        with Lease(tmp_path, wait_seconds=0) as next_one:
            assert next_one.previous is not None
            with pytest.raises(LeaseLostError), lease.committing():
                pytest.fail("committed")
    with Lease(tmp_path) as after:
        assert after.previous is None
    forge(tmp_path)
    with pytest.raises(CheckpointError, match="node7"):
        Lease(tmp_path)
    (tmp_path / LEASE_FILE).write_text("")
    with pytest.raises(CheckpointError, match=r"in use by another run \(its last heartbeat"):
        Lease(tmp_path)
    os.utime(tmp_path / LEASE_FILE, (1, 1))
    with Lease(tmp_path):
        pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    forge(tmp_path, pid=gone.pid, boot_id=module._boot_id(), pid_space="pid:[1]")  # of another container: who knows
    with pytest.raises(CheckpointError, match="last heartbeat"):
        Lease(tmp_path)
    forge(tmp_path, pid=gone.pid, boot_id=module._boot_id(), pid_space=module._pid_space())
    with Lease(tmp_path, wait_seconds=0) as lease:
        assert lease.previous is not None
        assert lease.previous.pid == gone.pid


def test_of_two_that_take_over_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other host's text lands right after ours."""
    path = forge(tmp_path, silent=100)
    fsync = os.fsync

    def fsync_then_another(descriptor: int) -> None:
        fsync(descriptor)
        path.write_text(json.dumps({**ELSEWHERE, "host": "node8", "token": "e" * 32}) + "\n")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_then_another)
        with pytest.raises(CheckpointError, match="in use by pid 4242 on node8 "):
            Lease(tmp_path)
    assert told(tmp_path)["host"] == "node8"


def test_torn_texts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0)  # there are hundreds of them
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = tmp_path / LEASE_FILE
    with Lease(tmp_path) as lease:
        whole = path.read_bytes()
        path.write_bytes(whole[:20])
        with pytest.raises(CheckpointError, match="in use by another run;"):
            Lease(tmp_path, wait_seconds=0)
    assert not lease.lost
    texts = [whole[:n] for n in range(len(whole) - 1)]
    texts += [bytes(100), b"\xff" * 400, b"x" * 10_000, b"[]", b'"pid"', b"{}", whole.replace(b'"pid": ', b'"pid": -')]
    texts += [whole.replace(b'"pid": ', b'"pid": 1e999, "was": ')]
    for text in texts:
        path.write_bytes(text)
        with Lease(tmp_path, wait_seconds=0) as lease, lease.committing():
            assert lease.previous is None
            assert told(tmp_path)["pid"] == os.getpid()
    path.write_bytes(whole + b'en": "old"}\n')  # a longer one was overwritten, and not yet cut off
    with Lease(tmp_path, wait_seconds=0) as lease:
        assert lease.previous is not None
        assert lease.previous.pid == os.getpid()


def test_what_cannot_be_written_is_named_with_the_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match=r"cannot be written .*trainer\.default_local_dir=DIR"):
            Lease(root)

    def broken(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        with pytest.raises(CheckpointError, match="cannot be written"):
            Lease(root)
    with Lease(root, wait_seconds=0) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", broken)
            with pytest.raises(OSError, match="Input") as caught, lease.committing():
                pytest.fail("committed")
        assert not isinstance(caught.value, LeaseLostError)
        with lease.committing():  # the file server is back
            pass


def test_a_lock_without_its_text_yet_names_nobody(tmp_path: Path) -> None:
    with Lease(tmp_path):
        forge(tmp_path, **told(tmp_path), released=True)
        with pytest.raises(CheckpointError, match="in use by another run;"):
            Lease(tmp_path, wait_seconds=0)


def test_the_file_is_not_handed_to_programs_that_are_started(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        assert not os.get_inheritable(lease._file.fileno())
