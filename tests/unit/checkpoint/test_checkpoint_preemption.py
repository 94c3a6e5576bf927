"""Signals and deadlines as a flag: looked at, deferred, interrupting, and the second signal that leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agentlightning.checkpoint.preemption import EXIT_CODE, SIGNALS, Preempted, Preemption


@pytest.fixture
def installed() -> Iterator[Preemption]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = Preemption()
    stop.install()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_flag(installed: Preemption, number: signal.Signals) -> None:
    installed.check()
    os.kill(os.getpid(), number)
    assert installed.reason == number.name
    with pytest.raises(Preempted, match=number.name):
        installed.check()


def test_what_is_deferred_is_done_whole(installed: Preemption) -> None:
    with installed.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        installed.check()
    with pytest.raises(Preempted):
        installed.check()


def test_users_code_is_interrupted_and_cannot_swallow_it(installed: Preemption) -> None:
    def users_code() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Exception:  # noqa: BLE001 - what a user writes
            pytest.fail("swallowed")

    with pytest.raises(Preempted, match="SIGINT"), installed.interrupting():
        users_code()


def test_a_deadline_leaves_time_for_the_save() -> None:
    now = 1000.0
    stop = Preemption(max_run_seconds=100, must_save_by=1050, now=lambda: now)
    stop.expect_save(4.0)
    now = 1040.0
    assert stop.reason is None
    now = 1041.5
    assert stop.reason == "trainer.must_save_by"
    now = 0.0
    late = Preemption(max_run_seconds=10, now=lambda: now)
    now = 8.0
    late.check()
    late.expect_save(1.0)
    with pytest.raises(Preempted, match="max_run_seconds"):
        late.check()


def test_the_first_reason_stays_and_a_workers_word_is_no_second_signal(installed: Preemption) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    installed.request("SIGTERM to a worker")
    assert installed.reason == "SIGUSR1"


def test_the_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from agentlightning.checkpoint.preemption import Preemption\n"
        "Preemption().install()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"  # the same request, which came twice
        "print('still here', flush=True)\n"
        "time.sleep(1.1)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == "still here\n"
    assert "a second signal" in done.stderr


def test_the_exit_code_is_sysexits_tempfail() -> None:
    assert os.EX_TEMPFAIL == EXIT_CODE
