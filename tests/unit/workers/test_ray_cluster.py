"""What a run asks of a cluster, the waiting for it, and the signs of life, without a cluster."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from agentlightning.checkpoint.preemption import Preempted, Preemption
from agentlightning.errors import ConfigError
from agentlightning.verl.assembly import Placement, _suits, choose_placement
from agentlightning.verl.config import load_config
from agentlightning.verl.console import _shown
from agentlightning.verl.rules import check_job_directory
from agentlightning.workers import ray_cluster, signs_of_life
from agentlightning.workers.cluster import Demand, Node, describe, fitting_workers, room, too_little
from agentlightning.workers.ray_backend import RayWorkers, joins_cluster
from agentlightning.workers.ray_cluster import NotPlacedError, ProcessId, end_process
from agentlightning.workers.signs_of_life import IDLE, SignsOfLife

TWO_BY_EIGHT = Demand(groups=2, size=8, gpus=1, cpus=1)
GPU_NODES = [Node("a", "10.0.0.1", 8, 64), Node("b", "10.0.0.2", 8, 64)]


# ---- what is asked for


def test_a_demand_in_rays_words_and_in_ours():
    assert TWO_BY_EIGHT.bundle == {"CPU": 8.0, "GPU": 8.0}
    assert Demand(1, 2, gpus=0, cpus=1).bundle == {"CPU": 2.0}
    assert str(TWO_BY_EIGHT) == "2 x 8 GPU"
    assert str(Demand(3, 1, gpus=0, cpus=2)) == "3 x 2 CPU"
    assert TWO_BY_EIGHT.single(5) == Demand(5, 1, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "gpus", "demand"),
    [
        (["trainer.nnodes=2", "trainer.n_gpus_per_node=4"], 8, Demand(2, 4, 1, 1)),
        (["trainer.n_gpus_per_node=4"], 8, Demand(1, 4, 1, 1)),
        ([], 6, Demand(6, 1, 1, 1)),  # wherever they are
        ([], 0, Demand(1, 1, 0, 1)),
        (["trainer.nnodes=2", "trainer.n_gpus_per_node=2", "trainer.device=cpu"], 8, Demand(2, 2, 0, 1)),
    ],
)
def test_the_workers_of_a_configuration(overrides, gpus, demand):
    assert choose_placement(load_config(overrides), gpus, cores=8).demand == demand


def test_gpus_that_are_not_there_are_waited_for_where_the_cluster_grows():
    config = load_config(["trainer.device=cuda", "trainer.nnodes=2", "trainer.n_gpus_per_node=2"])
    assert choose_placement(config, 0, cores=8, grows=True) == Placement(4, "cuda", 1, 2)
    with pytest.raises(ConfigError, match="4 GPUs was asked for and there are 0"):
        choose_placement(config, 0, cores=8)
    with pytest.raises(ConfigError, match="there are 0"):  # how many would be "what the cluster has"?
        choose_placement(load_config(["trainer.device=cuda"]), 0, cores=8, grows=True)


def test_room_counts_whole_groups_on_one_node():
    assert room(TWO_BY_EIGHT, GPU_NODES) == 2
    assert room(Demand(1, 5, 1, 1), GPU_NODES) == 2
    assert room(TWO_BY_EIGHT, [Node(f"{i}", "x", 4, 64) for i in range(8)]) == 0
    assert room(Demand(1, 2, 1, 8), [Node("a", "x", 8, 40)]) == 2  # the cores are the limit
    assert room(Demand(1, 1, 0, 1), [Node("a", "x", 0, 3), Node("b", "y", 0, 0)]) == 3


def test_workers_that_fit_into_what_is_free():
    assert fitting_workers(TWO_BY_EIGHT, GPU_NODES, {"GPU": 11.0, "CPU": 100.0}) == 11
    assert fitting_workers(TWO_BY_EIGHT, GPU_NODES[:1], {"GPU": 16.0, "CPU": 100.0}) == 8  # Ray still counts a dead node
    assert fitting_workers(TWO_BY_EIGHT, GPU_NODES, {"CPU": 100.0}) == 0
    assert fitting_workers(Demand(4, 1, 0, 1), [Node("a", "x", 0, 4)], {"CPU": 2.5}) == 2


@pytest.mark.parametrize(
    ("nodes", "mended"),
    [
        (GPU_NODES[:1], "trainer.nnodes=1 trainer.n_gpus_per_node=8"),
        ([Node("a", "x", 4, 64), Node("b", "y", 2, 64)], "trainer.nnodes=1 trainer.n_gpus_per_node=4"),
        ([Node("a", "x", 0, 64)], "trainer.device=cpu"),
    ],
)
def test_too_little_names_what_there_is_and_an_override_that_fits(nodes, mended):
    said = str(too_little(TWO_BY_EIGHT, nodes))
    assert "16 workers need 16 GPUs, as 2 x 8 GPU" in said
    assert describe(nodes) in said
    assert f"mend it with {mended}, or trainer.n_gpus_per_node=null" in said


def test_a_large_cluster_is_described_in_a_line():
    said = describe([Node(f"{i}", f"10.0.0.{i}", 8, 64) for i in range(128)])
    assert said.startswith("the cluster has 1024 GPU and 8192 CPU on 128 nodes (10.0.0.0: 8 GPU 64 CPU, ")
    assert said.endswith(" and 124 more)")
    assert len(said) < 200


# ---- the run directory of a job


@pytest.mark.parametrize(
    ("given", "environment", "cwd"),
    [
        ("checkpoints/a/b", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "/home/me"),
        ("checkpoints/a/b", {}, "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1"),
        ("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/b", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "/x"),
    ],
)
def test_a_run_directory_that_the_next_job_would_not_find_is_refused(given, environment, cwd):
    with pytest.raises(ConfigError, match=r"mend it with trainer\.default_local_dir=/shared/b"):
        check_job_directory(Path(given), environment, Path(cwd))


@pytest.mark.parametrize(
    ("given", "environment", "cwd"),
    [
        ("/shared/b", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "/tmp/ray/session_1/runtime_resources/working_dir_files/p"),
        ("checkpoints/a/b", {"RAY_ADDRESS": "auto"}, "/home/me"),
    ],
)
def test_other_run_directories_are_not(given, environment, cwd):
    check_job_directory(Path(given), environment, Path(cwd))


def test_a_finished_job_whose_working_directory_is_gone_still_says_where_the_run_is(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path / "package")
    (tmp_path / "package").rmdir()
    assert _shown(Path("/shared/run")) == "/shared/run"


def test_which_starts_join_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not joins_cluster({"num_cpus": 4})
    assert joins_cluster({"address": "auto"})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert joins_cluster({})


# ---- waiting for places


class Group:
    """A placement group that is ready after so many looks; `clock` goes on by ten seconds at each."""

    def __init__(self, looks: int, clock: list[float]) -> None:
        self.looks, self.clock = looks, clock

    def wait(self, _seconds: float) -> bool:
        self.looks -= 1
        self.clock[0] += 10.0
        return self.looks <= 0


@pytest.fixture
def placing(monkeypatch):
    """`placing(looks)`: a cluster of two nodes that has places after so many looks. Returns the groups given back."""

    def prepare(looks: int) -> list[Group]:
        clock, removed = [0.0], []
        monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(ray_cluster, "living_nodes", lambda: GPU_NODES)
        monkeypatch.setattr(ray_cluster.ray, "available_resources", lambda: {"GPU": 3.0, "CPU": 120.0})
        monkeypatch.setattr(ray_cluster, "placement_group", lambda bundles, strategy: Group(looks, clock))
        monkeypatch.setattr(ray_cluster, "remove_placement_group", removed.append)
        return removed

    return prepare


def test_fewer_workers_are_a_number_that_the_run_can_be_done_by():
    config = load_config(["data.train_batch_size=4", "trainer.exact_elastic=false"])
    assert [number for number in range(1, 8) if _suits(config, number)] == [1, 2, 3, 4]


def test_a_wait_says_for_what_every_half_minute(placing):
    removed, said = placing(looks=9), []
    ray_cluster.reserve(TWO_BY_EIGHT, Preemption(), said.append, 1000.0, grows=True)
    assert len(said) == 3  # at 10, 40 and 70 s
    assert said[0].startswith("waiting for 2 x 8 GPU; the cluster has 16 GPU and 128 CPU on 2 nodes (")
    assert said[0].endswith("of which 3 GPU and 120 CPU are free")
    assert removed == []


def test_a_wait_ends_at_its_time_out_and_gives_the_places_back(placing):
    removed = placing(looks=100)
    with pytest.raises(NotPlacedError, match=r"no 2 x 8 GPU free within 60 s.*trainer\.resources_timeout_s=3600"):
        ray_cluster.reserve(TWO_BY_EIGHT, Preemption(), lambda _: None, 60.0, grows=True)
    assert len(removed) == 1


def test_a_wait_ends_when_the_run_shall_leave(placing):
    removed, stop = placing(looks=100), Preemption()
    stop.request("SIGTERM")
    with pytest.raises(Preempted):
        ray_cluster.reserve(TWO_BY_EIGHT, stop, lambda _: None, None, grows=True)
    assert len(removed) == 1


def test_a_cluster_of_ones_own_that_is_too_small_is_not_waited_for(placing):
    placing(looks=100)
    with pytest.raises(ConfigError, match="32 workers need 32 GPUs, as 4 x 8 GPU"):
        ray_cluster.reserve(Demand(4, 8, 1, 1), Preemption(), lambda _: None, None, grows=False)


def test_what_is_there_is_taken_one_less_at_a_time(placing, monkeypatch):
    placing(looks=0)
    asked = []

    def reserve(demand, stop, say, timeout_s, grows):
        asked.append(demand.world_size)
        if demand.world_size > 2:
            raise NotPlacedError("not free after all")
        return "group"

    monkeypatch.setattr(ray_cluster, "reserve", reserve)
    for numbers, tried in ((range(15, 0, -1), [3, 2]), ([8, 4, 2, 1], [2]), ([1], [1])):  # three GPUs are free
        asked.clear()
        taken = ray_cluster.reserve_what_is_there(TWO_BY_EIGHT, numbers, Preemption(), lambda _: None, None)
        assert taken == (Demand(tried[-1], 1, 1, 1), "group")
        assert asked == tried


# ---- signs of life


class Beside:
    """Stands for an actor that answers as `answers` says: None for no answer, or where it is."""

    def __init__(self, answers: dict, name: str) -> None:
        self.answers, self.name, self.stack = answers, name, self

    def options(self, concurrency_group: str):
        return self

    def remote(self):
        return self.name


@pytest.fixture
def two_workers(monkeypatch):
    clock, answers = [0.0], {"a": IDLE, "b": IDLE}
    monkeypatch.setattr(signs_of_life.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        signs_of_life.ray,
        "wait",
        lambda refs, num_returns, timeout: ([r for r in refs if answers[r]], [r for r in refs if not answers[r]]),
    )
    monkeypatch.setattr(signs_of_life.ray, "get", lambda refs: [answers[r] for r in refs])
    return SignsOfLife([Beside(answers, "a"), Beside(answers, "b")], timeout_s=40.0), clock, answers


def test_workers_that_answer_are_never_silent(two_workers):
    life, clock, _ = two_workers
    for second in range(0, 1000, 5):
        clock[0] = float(second)
        assert life.silent() == []


def test_a_worker_that_stops_answering_is_named_within_the_time_out(two_workers):
    life, clock, answers = two_workers
    answers["b"] = None
    noticed = next(second for second in range(1000) if clock.__setitem__(0, float(second)) or life.silent())
    assert 30 <= noticed <= 40
    assert life.silent() == [1]


def test_one_late_answer_is_forgiven(two_workers):
    life, clock, answers = two_workers
    answers["b"] = None
    for second in range(0, 36):
        clock[0] = float(second)
        assert life.silent() == []
    answers["b"] = IDLE
    for second in range(36, 100):
        clock[0] = float(second)
        assert life.silent() == []


def test_one_that_lives_and_stands_still_is_named_once_and_not_silent(two_workers):
    life, clock, answers = two_workers
    answers["b"] = "in tool, line 7"
    named = []
    for second in range(200):
        clock[0] = float(second)
        answers["a"] = f"in forward, line {second // 30}"  # slow, but it moves
        assert life.silent() == []
        named += [(second, rank) for rank in life.stuck()]
    [(second, rank)] = named
    assert rank == 1
    assert 40 <= second <= 60
    assert life.places[rank].stack == "in tool, line 7"


def test_one_that_waits_for_its_next_call_does_not_stand_still(two_workers):
    life, clock, _ = two_workers
    for second in range(200):
        clock[0] = float(second)
        life.silent()
        assert life.stuck() == []


@pytest.mark.parametrize(("sees", "blind"), [([True, True, True], []), ([True, False, False], ["10.0.0.2"])])
def test_nodes_of_which_no_worker_sees_the_run_directory_are_named(tmp_path, monkeypatch, sees, blind):
    workers = object.__new__(RayWorkers)
    workers.world_size = 3
    addresses = ["10.0.0.1", "10.0.0.1", "10.0.0.2"]
    workers._identities = [ProcessId(f"n{rank}", address, rank, 0.0) for rank, address in enumerate(addresses)]
    monkeypatch.setattr(workers, "call", lambda method, arguments: sees if method == "sees" else None)
    monkeypatch.setattr(workers, "_wait", lambda references: references)
    (tmp_path / ".lease").write_text("{}")
    assert workers.blind_nodes(tmp_path / ".lease") == blind


# ---- processes


def test_a_stopped_process_is_ended_and_another_with_its_number_is_not(sleeper):
    os.kill(sleeper.pid, signal.SIGSTOP)
    started = psutil.Process(sleeper.pid).create_time()
    end_process(ProcessId("here", "10.0.0.1", sleeper.pid, started - 100), "here")
    assert sleeper.poll() is None
    end_process(ProcessId("here", "10.0.0.1", sleeper.pid, started), "here")
    assert sleeper.wait(10) == -signal.SIGKILL
