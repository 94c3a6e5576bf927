"""Programs are run against tests, and can do little else. Every test runs real processes."""

import ctypes
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from agentlightning.rewards import code
from agentlightning.rewards.code import Limits, compute_score, run


def _can_unshare() -> bool:
    """Whether the kernel gives an unprivileged process namespaces of its own."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) == 0 else 1)
    return os.waitpid(pid, 0)[1] == 0


def _has_landlock() -> bool:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 4


needs_namespaces = pytest.mark.skipif(not _can_unshare(), reason="the kernel allows no user namespaces")
needs_landlock = pytest.mark.skipif(not _has_landlock(), reason="the kernel has no Landlock with network rules")


@pytest.fixture
def no_new_children():
    """The test leaves no process behind; those of tests before it in this process (a logger's service) may live on."""
    before = _children()
    yield
    assert _children() <= before


def _children():
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


def _fenced(program):
    return f"Here it is:\n```python\n{program}\n```\nDone."


def test_standard_input_and_output():
    truth = {"inputs": ["1\n", "41\n"], "outputs": ["2", "42\n\n"]}
    assert compute_score("apps", _fenced("print(int(input()) + 1, ' ')"), truth) == {"score": 1.0, "passed": 1.0}
    assert compute_score("apps", _fenced("print(2)"), truth) == {"score": 0.0, "passed": 0.5}


def test_asserts_see_the_programs_names():
    truth = '{"asserts": ["assert double(2) == 4", "assert double(3) == 7"]}'
    answer = _fenced("def double(x):\n    print('noise')\n    return 2 * x")
    assert compute_score("mbpp", answer, truth) == {"score": 0.0, "passed": 0.5}


@pytest.mark.parametrize("program", ["import os; os._exit(0)", "raise SystemExit(0)", "def double(:", ""])
def test_a_program_that_ends_early_passes_nothing(program):
    assert compute_score("mbpp", _fenced(program), {"asserts": ["assert double(2) == 4"]})["score"] == 0.0


def test_the_last_block_counts():
    answer = _fenced("print(1)") + _fenced("print(2)")
    assert code.program_in(answer) == "print(2)\n"
    assert code.program_in("print(3)") == "print(3)"


def test_after_a_test_that_takes_too_long_the_rest_is_not_run(monkeypatch):
    runs = []

    def slow(program, stdin):
        runs.append(stdin)
        return run("while True: pass", stdin, Limits(wall_s=0.3))

    monkeypatch.setattr(code, "run", slow)
    assert compute_score("apps", "", {"inputs": ["1", "2"], "outputs": ["1", "2"]}) == {"score": 0.0, "passed": 0.0}
    assert runs == ["1"]


@pytest.mark.parametrize("truth", ["[1]", {}, {"inputs": ["1"]}, {"inputs": ["1"], "outputs": []}, {"asserts": []}])
def test_a_ground_truth_that_holds_no_tests(truth):
    with pytest.raises(ValueError, match="the ground truth of a program is"):
        compute_score("apps", "", truth)


# ---- the fence


def test_a_loop_ends_with_the_wall_time_and_leaves_nothing(tmp_path, monkeypatch, no_new_children):
    monkeypatch.setattr(code.tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    assert run("while True: pass", "", Limits(wall_s=0.3)).status is None
    assert time.monotonic() - began < 2
    assert list(tmp_path.iterdir()) == []


def test_a_loop_ends_with_the_cpu_time():
    assert run("while True: pass", "", Limits(cpu_s=1)).status in (128 + signal.SIGKILL, 128 + signal.SIGXCPU, -signal.SIGKILL)


def test_a_memory_bomb():
    done = run("try:\n    x = bytearray(1 << 32)\nexcept MemoryError:\n    print('no')", "")
    assert (done.status, done.output) == (0, "no\n")


def test_a_huge_file_and_a_huge_output():
    program = "try:\n    open('f', 'wb').write(bytes(1 << 20))\nexcept OSError:\n    print('no')"
    assert run(program, "", Limits(file_bytes=1 << 16)).output == "no\n"
    assert len(run("while True: print('x' * 999)", "", Limits(file_bytes=1 << 16)).output) <= 1 << 16


@needs_namespaces
def test_many_files():
    program = (
        "try:\n    for i in range(9): open(f'f{i}', 'wb').write(bytes(1 << 20))\nexcept OSError as e:\n    print(e.strerror)"
    )
    assert run(program, "", Limits(scratch_bytes=4 << 20)).output == "No space left on device\n"


@needs_namespaces
def test_a_fork_bomb(no_new_children):
    program = (
        "import os, time\nn = 0\ntry:\n    while os.fork():\n        n += 1\n    time.sleep(60)\nexcept OSError:\n    print(n)"
    )
    done = run(program, "", Limits(processes=5))
    assert (done.status, done.output) == (0, "5\n")


@needs_namespaces
def test_a_process_that_leaves_the_group_ends_as_well():
    done = run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(47)\nprint('left')", "")
    assert done.output == "left\n"
    assert not [p for p in psutil.process_iter(["cmdline"]) if "program.py" in (p.info["cmdline"] or [])]


def test_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert "secret" not in run("import os; print(dict(os.environ))", "").output


@needs_landlock
def test_files_and_the_trainers_own_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("secret")
    tmp_path.chmod(0o777)
    attempts = [str(tmp_path / "token"), f"/proc/{os.getpid()}/environ", "/etc/passwd"]
    program = f"""
for path in {attempts!r}:
    try:
        print(open(path).read())
    except PermissionError:
        print('no')
try:
    open({str(tmp_path / "new")!r}, 'w')
except PermissionError:
    print('no')
"""
    assert run(program, "").output == "no\n" * 4
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not (_can_unshare() or _has_landlock()), reason="the kernel lets nobody take the network away")
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            f"import socket\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 1)\nexcept OSError:\n    print('no')"
        )
        assert run(program, "").output == "no\n"


def test_only_the_standard_library_and_the_same_hashes():
    assert run("import numpy", "").status == 1
    assert run("print(hash('a'))", "").output == run("print(hash('a'))", "").output


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch, no_new_children):
    monkeypatch.setattr(code.tempfile, "tempdir", str(tmp_path))

    class Stop(BaseException):
        pass

    def raise_stop(number, frame):
        raise Stop

    def when_it_runs():
        while not any("program.py" in " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, raise_stop)
    watcher = threading.Thread(target=when_it_runs)
    try:
        watcher.start()
        with pytest.raises(Stop):
            run("while True: pass", "", Limits(wall_s=30.0))
    finally:
        watcher.join()
        signal.signal(signal.SIGUSR2, before)
    assert list(Path(tmp_path).iterdir()) == []
