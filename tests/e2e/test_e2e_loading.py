"""On Ray, while the workers load the model: one that dies is started again. What else may happen is in test_launch.py."""

import os
import signal

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_worker_that_dies_while_it_loads_the_model_is_started_again(references, new_run):
    run = new_run()
    worker = run.hold_in("load", step=1, durable=False)
    assert worker in {member.pid for member, _ in run.family}
    os.kill(worker, signal.SIGKILL)
    run.plan.unlink()
    run.ends()
    assert "starting the workers again, 1 of trainer.max_restarts=3" in run.stdout
    assert "warning: a worker died" in run.stdout
    assert str(run.directory / "logs" / "worker_0.log") in run.stdout
    assert not psutil.pid_exists(worker)
    assert "Traceback" not in run.output
    assert '"event": "restart"' in (run.directory / "attempts.jsonl").read_text()
    run.equals(references["ray"])
    run.leaves_nobody_behind()
