"""The simulator gives what can be worked out by hand, and drives the real controller whole steps over many workers."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from agentlightning.checkpoint.interval import young_daly
from agentlightning.types import Batch
from agentlightning.workers.group import WorkerGroup
from agentlightning.workers.messages import ActorUpdate, MiniBatch

SCRIPTS = Path(__file__).parents[3] / "scripts"
HOUR = 3600.0


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other by name."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def goodput(scripts):
    import simulate_goodput

    return simulate_goodput


def never():
    return iter(())


def at(*instants: float):
    return iter(instants)


# ---- by hand


@pytest.mark.parametrize("interval", [1, 3])
def test_without_failures_only_saves_cost(goodput, interval):
    run = goodput.simulate(goodput.Costs(60, save_s=2), interval, never(), 30)
    assert run.saves == 30 / interval
    assert run.share == pytest.approx(60 * interval / (60 * interval + 2))


def test_a_last_save_is_waited_for(goodput):
    run = goodput.simulate(goodput.Costs(60, write_s=5), 1, never(), 4)
    assert run.wall_s == 4 * 60 + 5


def test_two_buffers_and_a_slow_disk(goodput):
    # Steps of 10 s, writes of 40 s one after the other: saves at 10, 20; that of step 3 waits for the first write, until 50.
    # Written: 50, 90, 130, and the last, saved at 90 when the second buffer is free, at 170.
    run = goodput.simulate(goodput.Costs(10, write_s=40), 1, never(), 4)
    assert run.wall_s == 170


def test_failures_at_fixed_times(goodput):
    # Steps of 10 s and saves of 1 s every second step: durable at 21 (2) and 42 (4). The failure at 38 costs all since 21,
    # the restart 5 s: on at 43 with step 3, durable at 43 + 21 = 64 (4). That at 66 costs 2 s; on at 71, saved again at 92 (6).
    run = goodput.simulate(goodput.Costs(10, save_s=1, restart_s=5), 2, at(38, 66), 6)
    assert (run.wall_s, run.failures, run.saves) == (92, 2, 3)


def test_a_failure_in_a_restart_starts_it_anew(goodput):
    run = goodput.simulate(goodput.Costs(10, restart_s=5), 1, at(12, 15), 2)
    assert (run.wall_s, run.failures) == (15 + 5 + 10, 2)


def test_a_save_that_was_not_durable_is_lost(goodput):
    # Step 1 is saved at 10 and durable at 13; the failure at 12 leaves nothing, that at 23 the same. Then 23 + 10 + 3.
    run = goodput.simulate(goodput.Costs(10, write_s=3), 1, at(12, 23), 1)
    assert (run.wall_s, run.saves) == (36, 3)


# ---- against theory


def test_exponential_failures_against_renewal(goodput):
    costs, mtbf_s, steps = goodput.Costs(60, save_s=3, write_s=7, restart_s=180), HOUR, 15_000
    for interval in (2, 8):
        run = goodput.simulate(costs, interval, goodput.preemptions(16, mtbf_s, seed=1), steps)
        assert run.share == pytest.approx(goodput.expected_goodput(costs, interval, mtbf_s), abs=0.012)
        assert run.failures == pytest.approx(run.wall_s / mtbf_s, rel=0.15)


def test_no_way_to_save_beats_the_bounds(goodput):
    costs, mtbf_s = goodput.Costs(60, restart_s=180), 2 * HOUR
    step, restart = goodput.step_bound(costs, mtbf_s), goodput.restart_bound(costs, mtbf_s)
    assert restart == pytest.approx(1 / (1 + 180 / 7200), rel=1e-3)
    # By hand: half a step more is lost at each failure.
    assert step == pytest.approx(restart * (1 - 30 / 7200), rel=1e-4)
    run = goodput.simulate(costs, 1, goodput.preemptions(256, mtbf_s, seed=1), 40_000)
    assert run.share == pytest.approx(step, abs=0.004)
    fine = goodput.Costs(1, restart_s=180)  # hardly a step is lost
    assert goodput.step_bound(fine, mtbf_s) == pytest.approx(restart, abs=1e-4)
    dear = goodput.Costs(60, save_s=0.05, write_s=2, restart_s=180)
    assert goodput.step_bound(dear, mtbf_s) == step > goodput.expected_goodput(dear, 1, mtbf_s)


def test_many_workers_fail_as_often_as_was_asked_for(goodput):
    failures = goodput.preemptions(200, mtbf_s=100.0, seed=3)
    gaps = np.diff([next(failures) for _ in range(4000)])
    assert gaps.mean() == pytest.approx(100, rel=0.06)
    assert gaps.std() == pytest.approx(100, rel=0.08)  # exponential


def test_daly_is_near_the_exact_optimum(goodput):
    """With a small overhead the three agree: Young's, Daly's, and the best of all intervals of the exact formula."""
    costs, mtbf_s = goodput.Costs(1, save_s=2), 10 * HOUR
    young = math.sqrt(2 * 2 * 10 * HOUR)
    assert goodput.daly_seconds(2, mtbf_s) == pytest.approx(young, rel=0.01)
    assert goodput.best_interval(costs, mtbf_s) == pytest.approx(young, rel=0.01)
    for save_s in (0.05, 2, 400, 3 * mtbf_s):
        assert goodput.daly_seconds(save_s, mtbf_s) == pytest.approx(young_daly(save_s, mtbf_s))


def test_auto_is_as_good_as_the_best_interval(goodput):
    costs, mtbf_s = goodput.Costs(60, save_s=10, write_s=2, restart_s=180), 2 * HOUR
    best = goodput.best_interval(costs, mtbf_s)
    runs = [goodput.simulate(costs, freq, goodput.preemptions(64, mtbf_s, seed=0), 6_000) for freq in ("auto", best, 1)]
    assert runs[0].share > runs[1].share - 0.005
    assert runs[0].share > runs[2].share + 0.05
    assert best / 1.6 < runs[0].interval < best * 1.6


# ---- the real controller


class Answering:
    """A backend that remembers what it is asked."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.asked = world_size, []

    def call(self, method, arguments):
        self.asked = arguments
        return [ActorUpdate([{"lr": 1.0}] * len(minis), np.zeros(batch.response_BT.shape)) for batch, minis, _ in arguments]


def test_mini_batches_are_dealt_to_the_workers_in_their_order():
    rng = np.random.default_rng(0)
    rows = 24
    zeros_BT = np.zeros((rows, 3), np.int32)
    batch = Batch(
        uids=tuple(f"train:{row // 4}" for row in range(rows)),
        prompt_BP=np.arange(rows, dtype=np.int32)[:, None],  # tells the rows apart
        prompt_len_B=np.ones(rows, np.int32),
        response_BT=zeros_BT,
        response_len_B=np.full(rows, 3, np.int32),
        mask_BT=zeros_BT == 0,
        adapter_version=0,
        columns={"advantages": zeros_BT.astype(np.float32), "token_level_scores": zeros_BT.astype(np.float32)},
    )
    plan = [MiniBatch(part, None) for _ in range(2) for part in np.array_split(rng.permutation(rows), 3)]
    backend = Answering(5)
    WorkerGroup(backend).update_actor(batch, plan, 1)
    for number, mini in enumerate(plan):
        dealt = [part.prompt_BP[minis[number].rows, 0].tolist() for part, minis, _ in backend.asked]
        own = [set(part.prompt_BP[:, 0].tolist()) for part, _, _ in backend.asked]
        assert dealt == [[row for row in mini.rows.tolist() if row in rows_of_worker] for rows_of_worker in own]
        assert sum(map(len, dealt)) == len(mini.rows)
    assert set(backend.asked[0][0].columns) == {"advantages"}


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_the_controller_runs_through_a_death(scripts, mini_batches):
    import simulate_controller as controller

    load = controller.Load(2, 4, 16, 32, 16, mini_batches, state_bytes=3 << 24)
    report = controller.measure_controller(6, load, steps=1)
    assert report.warnings == []
    assert report.samples == 48
    # Three workers wrote a part each; beside them the adapter, its configuration, the trainer's state, the manifest.
    assert report.checkpoint_files == 3 + 4
    assert 0 < report.controller_s < 1
    # All prompts and responses, as int32, with a mask, went out at least once and came back.
    assert report.sent_bytes > 5 * 48 * 16
    assert report.received_bytes > 9 * (report.tokens - 48 * 16)
    assert report.restart_s > 0
    assert (report.phases_s["old_log_prob"] > 1e-3) == (mini_batches > 1)  # one optimizer step needs no such pass


def test_what_all_are_given_is_sent_once(scripts):
    import threading

    import simulate_controller as controller

    sent = []
    for workers in (2, 50):
        ledger = controller.Ledger()
        fake = controller.FakeWorkers(workers, controller.Load(), ledger, threading.Event(), lambda: None)
        WorkerGroup(fake).update_weights(1)
        sent.append(ledger.sent)
    assert sent[0] == sent[1]


def test_the_command_prints_both_tables(scripts, capsys, tmp_path, monkeypatch):
    import simulate_scale

    words = (
        "--workers 4 --steps 1 --response-tokens 32 --prompt-tokens 16 --mean-response 8 --days 0.1 --intervals 2 --save-s 1"
    )
    monkeypatch.setattr(sys, "argv", ["simulate_scale.py", *words.split(), "--json", str(tmp_path / "report.json")])
    simulate_scale.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 4 |") for line in lines) == 3  # the controller, every 2 steps, auto
    assert (tmp_path / "report.json").is_file()
