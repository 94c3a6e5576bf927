"""On a cluster that others have started, of two nodes: jobs that are submitted, stopped and submitted again; a node that is
killed, and the head; a worker that stands still, and one that is stopped and so says nothing more."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import agentlightning
from agentlightning.checkpoint.preemption import Preemption
from agentlightning.errors import WorkerError
from agentlightning.workers.ray_backend import RayWorkers, WorkerActor, leave_ray, start_ray
from agentlightning.workers.ray_session import own_session

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("cluster")]
PATIENCE_S = 120.0
RAY = str(Path(sys.executable).with_name("ray"))
TWO_NODES = ("trainer.nnodes=2", "trainer.n_gpus_per_node=1")


class Cluster:
    """Nodes with one CPU core each, on this machine. They are ended by their ids: `ray stop` would end everybody's."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="agl", dir="/tmp"))  # sockets must have short paths
        self.port, self.dashboard = free_port(), free_port()
        paths = [str(Path(agentlightning.__file__).parents[1]), str(Path(__file__).parent)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
            "RAY_worker_niceness": "0",
            "AGL_E2E_PLAN": str(self.folder / "no_plan"),
        }
        self.nodes: list[psutil.Process] = []

    def start(self) -> None:
        self.start_head()
        self._node(f"--address=127.0.0.1:{self.port}")

    def start_head(self) -> None:
        temporary, said = str(self.folder / "ray"), self.folder / f"node{len(self.nodes)}"
        self._node("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={temporary}")
        wait_until(lambda: "Ray runtime started" in said.read_text(), "the head")

    def _node(self, *words: str) -> None:
        agent = (f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=1", "--block", "--disable-usage-stats")
        with (self.folder / f"node{len(self.nodes)}").open("wb") as out:
            self.nodes.append(
                psutil.Popen(
                    [RAY, "start", *agent, *words], env=self.environment, stdout=out, stderr=out, start_new_session=True
                )
            )

    def kill_node(self, number: int) -> None:
        """As if the machine were gone: all its processes at once."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [self.nodes[number], *self.nodes[number].children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)

    def run(self, *words: str) -> str:
        done = subprocess.run([RAY, *words], env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(event: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:.0f} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    try:
        started.start()
        yield started
    finally:
        for number in range(len(started.nodes)):
            started.kill_node(number)
        shutil.rmtree(started.folder, ignore_errors=True)


def test_a_submitted_job_is_stopped_and_the_same_submit_goes_on(cluster, new_run):
    run = new_run(*TWO_NODES)
    jobs = ("--address", f"http://127.0.0.1:{cluster.dashboard}")

    def submit(name: str) -> None:
        environment = {"AGL_E2E_PLAN": str(run.plan), "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        submission = ("--no-wait", "--submission-id", name, "--runtime-env-json", json.dumps({"env_vars": environment}))
        cluster.run("job", "submit", *jobs, *submission, "--", *run.command("python", str(run.directory)))

    run.stop_at("reward", 3, "hold")
    submit("first")
    wait_until(run.plan.with_suffix(".reached").exists, "the reward of step 3")
    cluster.run("job", "stop", *jobs, "first")
    told = cluster.run("job", "logs", *jobs, "first")
    assert "SIGTERM: the state after step 2 is durable; exit code 75" in told
    assert run.newest_valid() == 2

    run.plan.unlink()
    submit("second")
    wait_until((run.directory / "global_step_5.pt").exists, "the last step")
    told = cluster.run("job", "logs", "--follow", *jobs, "second")
    assert "2 of 5 steps are done" in told
    assert "workers 2 x CPU process" in told
    assert run.steps == [1, 2, 3, 4, 5]
    assert [line["training/attempt"] for line in run.lines] == [1, 1, 2, 2, 2]


def test_a_run_whose_node_is_killed_goes_on_with_the_rest(cluster, new_run):
    joins = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    auth = {name: value for name, value in cluster.environment.items() if name.startswith("RAY_AUTH")}
    run = new_run(*TWO_NODES, "trainer.resize_timeout_s=5", **joins, **auth)
    run.hold_in("reward", step=3)
    cluster.kill_node(1)
    run.plan.unlink()
    run.ends()
    assert "going on with 1 of 2 workers" in run.stdout
    assert "workers 1 x CPU process" in run.stdout
    assert run.steps == [1, 2, 3, 4, 5]
    assert [line["training/attempt"] for line in run.lines] == [1, 1, 2, 2, 2]
    assert run.newest_valid() == 5


def test_a_run_whose_head_is_killed_goes_on_with_the_next_one(cluster, new_run):
    joins = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    auth = {name: value for name, value in cluster.environment.items() if name.startswith("RAY_AUTH")}
    run = new_run(**joins, **auth)
    run.hold_in("reward", step=3)
    for number in range(len(cluster.nodes)):  # the machine on which the head and the program run is gone
        cluster.kill_node(number)
    run.kill()
    run.ends(-signal.SIGKILL)
    cluster.start_head()
    run.again()
    assert run.steps == [1, 2, 3, 4, 5]
    assert [line["training/attempt"] for line in run.lines] == [1, 1, 2, 2, 2]
    assert run.newest_valid() == 5


def test_a_worker_that_stands_still_is_told_of_and_one_that_is_stopped_is_killed_and_started_again(new_run):
    run = new_run("trainer.n_gpus_per_node=2", "trainer.worker_timeout_s=4")
    worker = run.hold_in("tool", step=2)
    told = f"(pid {worker} on node "
    run.wait_until(lambda: told in run.stdout, "words on the worker that stands still")
    assert "lives, but stands at one line for 4 s (trainer.worker_timeout_s); it is waited for. It is in:" in run.stdout
    assert "e2e_user_code.py" in run.stdout
    assert "starting the workers again" not in run.stdout
    os.kill(worker, signal.SIGSTOP)
    run.plan.unlink()
    run.ends()
    assert "no sign of life for 4 s (trainer.worker_timeout_s)" in run.stdout
    assert not psutil.pid_exists(worker)
    assert run.steps == [1, 2, 3, 4, 5]
    assert [line["training/attempt"] for line in run.lines] == [1, 2, 2, 2, 2]
    run.leaves_nobody_behind()
    assert run.process is not None
    assert list(Path("/tmp/ray").glob(f"session_*_{run.process.pid}")) == []
    assert "Traceback" not in run.output


def workers_that_only_meet(timeout_s: float) -> RayWorkers:
    """Two workers without a model. Their classes are made here so that Ray sends them, and does not look for this file."""

    class Meeting:
        def connect(self, rank: int, world_size: int, address: str) -> None:
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)

        def meet(self, comes: bool) -> float:
            import torch

            if not comes:
                time.sleep(60)
            ones = torch.ones(1)
            torch.distributed.all_reduce(ones)
            return float(ones)

        def break_down(self, how: str) -> None:
            raise ValueError(how)

    class MeetingActor(WorkerActor):
        def load_libraries(self) -> None:
            import torch.distributed

            assert torch.distributed

        def build(self, settings: object) -> None:
            self.worker = Meeting()

    workers = RayWorkers(2, 0, 1, None, Preemption(), MeetingActor, timeout_s=timeout_s)
    workers.build(None)
    return workers


def test_a_worker_that_keeps_another_one_waiting_is_given_up_and_shown():
    start_ray({}, cpus=2)
    session = own_session()
    try:
        workers = workers_that_only_meet(timeout_s=3.0)
        assert all(path.is_file() and path.is_relative_to(session) for path in workers.log_paths)
        processes = [psutil.Process(workers._identity(rank).pid) for rank in (0, 1)]
        assert workers.call("meet", [(True,), (True,)]) == [2.0, 2.0]
        with pytest.raises(ValueError, match="of its own"):  # both live: it is the user's
            workers.call("break_down", [("of its own",), ("of its own",)])
        with pytest.raises(WorkerError, match=r"lost each other: [\s\S]*all_reduce[\s\S]*worker 1 is in:[\s\S]*in meet"):
            workers.call("meet", [(True,), (False,)])
        workers.close()
        assert psutil.wait_procs(processes, timeout=10)[1] == []
    finally:
        assert leave_ray(10.0)
    assert not session.exists()
    assert not (session.parent / f"agentlightning_owner_{os.getpid()}").exists()
