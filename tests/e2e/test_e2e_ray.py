"""On Ray: killed, stopped, or bereft of a worker, a run ends as one that was never stopped, and leaves no process behind."""

import os
import re
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TWO = "trainer.n_gpus_per_node=2"
# With the driver killed they try for a minute to report to a head that is gone, as everywhere with Ray, and then end.
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def test_two_runs_at_once_finish_and_leave_nobody_behind(references):
    for name in ("ray", "two"):
        assert references[name].steps == [1, 2, 3, 4, 5]
        references[name].leaves_nobody_behind()
    ours, theirs = ({member.pid for member, _ in references[name].family} for name in ("ray", "two"))
    assert not ours & theirs  # each had a cluster of its own


def test_ray_and_this_process_give_the_same_bits(references):
    references["ray"].equals(references["inprocess"])


def test_two_workers_see_the_same_prompts_and_learn_the_same(references):
    one, two = references["ray"], references["two"]
    for name in ("critic/score/mean", "prompt_length/mean", "response_length/mean", "perf/total_num_tokens"):
        assert [line[name] for line in one.lines[:2]] == [line[name] for line in two.lines[:2]]
    for step in (1, 2):
        adapter, other = (load(run.files(step)["actor/adapter_model.safetensors"]) for run in (one, two))
        assert adapter.keys() == other.keys()
        for name, weights in adapter.items():
            np.testing.assert_allclose(other[name], weights, rtol=0, atol=1e-5, err_msg=f"{name} after step {step}")


def test_a_signal_while_the_workers_load_the_model_ends_the_run_too(new_run):
    run = new_run().start()
    run.wait_until((run.directory / "logs" / "worker_0.log").exists, "the worker")
    run.look_at_family()
    run.kill(signal.SIGTERM)
    run.ends(75)
    assert "Traceback" not in run.output
    run.leaves_nobody_behind()


def test_row_flag_only_between_steps_stopped_in_a_rollout_it_ends_as_one_that_was_never_stopped(references, new_run):
    run = new_run("trainer.save_freq=-1")
    run.hold_in("tool", step=2, durable=False)  # the workers sample, the controller waits for them
    assert not list(run.directory.glob("*.pt"))
    run.signal_everyone(signal.SIGTERM)  # a scheduler stops all processes of the job at once, Ray's own among them
    run.ends(75)
    assert "the state after step 1 is durable" in run.stdout
    assert re.search(r"go on +python -m agentlightning.verl .*trainer.default_local_dir=run", run.stdout)
    assert "Traceback" not in run.output
    run.leaves_nobody_behind()
    assert run.newest_valid() == 1

    worker = run.hold_in("tool", step=3, durable=False)
    os.kill(worker, signal.SIGTERM)  # one worker alone is told to go
    run.ends(75)
    assert "SIGTERM to a worker: the state after step 2 is durable" in run.stdout
    run.leaves_nobody_behind()

    run.overrides = ()
    run.hold_in("tool", step=4)
    run.kill(signal.SIGKILL)
    run.ends(-signal.SIGKILL)
    assert run.steps == [1, 2, 3]
    run.leaves_nobody_behind(*RAYS_AGENTS)

    run.again()
    assert "3 of 5 steps are done" in run.stdout
    run.equals(references["ray"])
    assert [line["training/attempt"] for line in run.lines] == [1, 2, 3, 4, 4]


def test_row_dead_worker_aborts_the_driver_it_is_started_again_in_the_same_run(references, new_run):
    run = new_run(TWO)
    worker = run.hold_in("tool", step=2)
    assert worker in {member.pid for member, _ in run.family}
    os.kill(worker, signal.SIGKILL)
    run.plan.unlink()
    # Killed altogether while both workers compute the update: the call has been handed to them, and the controller waits.
    run.stop_at("reward", 4, "kill", ("update_actor", "_wait"))
    assert run.wait() == -signal.SIGKILL, run.output
    assert "warning: a worker died" in run.stdout
    assert str(run.directory / "logs" / "worker_0.log") in run.stdout
    assert "starting the workers again, 1 of trainer.max_restarts=3" in run.stdout
    assert run.steps == [1, 2, 3]
    run.again()
    run.equals(references["two"])
    assert [line["training/attempt"] for line in run.lines] == [1, 2, 2, 3, 3]


def test_row_other_gpu_count_and_hidden_cause_a_workers_words_then_two_workers_then_one(references, new_run):
    run = new_run("trainer.max_restarts=0")
    worker = run.hold_in("tool", step=2)
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait() == 1, run.output
    assert time.monotonic() - killed < 30
    assert "a worker died" in run.stderr
    assert str(run.directory / "logs" / "worker_0.log") in run.stderr
    run.leaves_nobody_behind()
    assert run.newest_valid() == 1

    # Another number of workers: the same prompts and samples, and in the step after the resume the same learning.
    run.again(TWO, "trainer.total_training_steps=4")
    assert "changed since the checkpoint: trainer.n_gpus_per_node: saved null, now 2" in run.stdout
    mine, theirs = run.lines[1], references["ray"].lines[1]
    for name in ("critic/score/mean", "prompt_length/mean", "response_length/mean", "perf/total_num_tokens"):
        assert mine[name] == theirs[name]
    assert mine["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=1e-4)
    # So small a state is one worker's to write; test_logical_shards.py has four write theirs.
    assert {name for name in run.files(4) if "optimizer" in name} == {"actor/optimizer-00000-of-00001.safetensors"}
    run.again()  # and back to one, which goes on from what two have learned
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.newest_valid() == 5
