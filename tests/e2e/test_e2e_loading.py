"""On Ray, while the workers load the model: one that dies or is stopped is started again, what the user must mend is not."""

import os
import signal

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_goes_while_it_loads_the_model_is_started_again(number, references, new_run):
    stopped = ("trainer.worker_timeout_s=6",) if number == signal.SIGSTOP else ()
    run = new_run(*stopped)
    worker = run.hold_in("load", step=1, durable=False)
    assert worker in {member.pid for member, _ in run.family}
    os.kill(worker, number)
    run.plan.unlink()
    run.ends()
    assert "starting the workers again, 1 of trainer.max_restarts=3" in run.stdout
    assert "warning: a worker died" in run.stdout or f"(pid {worker} on node" in run.stdout
    assert str(run.directory / "logs" / "worker_0.log") in run.stdout
    assert not psutil.pid_exists(worker)
    assert "Traceback" not in run.output
    assert '"event": "restart"' in (run.directory / "attempts.jsonl").read_text()
    run.equals(references["ray"])
    run.leaves_nobody_behind()


def test_a_worker_that_dies_once_too_often_while_it_loads_ends_the_run(new_run):
    run = new_run("trainer.max_restarts=0")
    os.kill(run.hold_in("load", step=1, durable=False), signal.SIGKILL)
    run.ends(1)
    assert "error: a worker died" in run.stderr
    assert str(run.directory / "logs" / "worker_0.log") in run.stderr
    run.leaves_nobody_behind()


def test_what_fails_in_every_worker_that_loads_ends_the_run_at_once(new_run):
    run = new_run("actor_rollout_ref.rollout.multi_turn.tool=no_such_module:fn")
    run.start().ends(2)
    assert "error: no tool at 'no_such_module:fn'" in run.stderr
    assert "starting the workers again" not in run.output
    assert "Traceback" not in run.output
