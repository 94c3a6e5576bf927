"""Every loss_mode through a real update; choices over the whole mini-batch however it is cut; a user's own loss."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_worker import ACTOR, OPTIM, SAMPLING, plan, worker_settings

from agentlightning.algorithms.aggregation import LossDenominators
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.names import POLICY_LOSSES, TOKEN_CHOICES
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings
from agentlightning.errors import ConfigError
from agentlightning.types import Batch, MicroBatches
from agentlightning.verl.batching import make_batch
from agentlightning.workers import actor as actor_module
from agentlightning.workers.actor import Actor
from agentlightning.workers.messages import MiniBatch, Shard
from agentlightning.workers.settings import load_policy_loss
from agentlightning.workers.shards import prompt_shards
from agentlightning.workers.worker import Worker

MODES = list(POLICY_LOSSES)
CHOICES = {"clip_cov_ratio": 0.1, "clip_cov_lb": -50.0, "clip_cov_ub": 50.0, "kl_cov_ratio": 0.1}  # so that some are chosen


@pytest.fixture(scope="module")
def worker(base_path) -> Worker:
    """One worker for all, away from the start, where half of the gradients are zero."""
    worker = Worker(worker_settings(base_path))
    with torch.no_grad():
        for i, parameter in enumerate(worker.actor.parameters.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.02)
    return worker


@pytest.fixture(scope="module")
def batch(worker, prompts) -> Batch:
    """Real samples with made-up advantages, of which two samples have none, and an old policy a little way off."""
    completions = worker.generate(prompts[:4], SAMPLING, 0, 1, 0)
    made = make_batch(prompts, completions, np.zeros(len(completions)))
    rng = np.random.default_rng(0)
    advantages_B1 = rng.normal(size=(len(made), 1))
    advantages_B1[[3, 8]] = 0.0
    old_BT = worker.compute_log_prob(made).log_probs_BT + 0.1 * rng.normal(size=made.mask_BT.shape)
    return made.with_columns(
        advantages=np.where(made.mask_BT, advantages_B1, 0.0).astype(np.float32),
        old_log_probs=np.where(made.mask_BT, old_BT, 0.0).astype(np.float32),
    )


@pytest.fixture
def make_actor(worker):
    """An actor with other settings on the shared model, whose weights are put back afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in worker.actor.parameters.items()}

    def make(**changes: Any) -> Actor:
        settings = {"optim": replace(OPTIM, grad_clip=1e9), **CHOICES, **changes}
        with torch.no_grad():
            for name, parameter in worker.actor.parameters.items():
                parameter.copy_(before[name])
        return Actor(worker.adapters, replace(ACTOR, **settings), lambda: None)

    yield make
    make()


def gradient(actor: Actor, batch: Batch) -> np.ndarray:
    actor.update(batch, plan(batch), 1)
    return actor.optimizer.flat_grad.numpy().copy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("mode", MODES)
def test_every_loss_trains_over_two_mini_batches(make_actor, batch, mode):
    actor = make_actor(loss_mode=mode)
    before = torch.cat([p.detach().flatten() for p in actor.parameters.values()])
    update = actor.update(batch, plan(batch, prompts_per_mini_batch=2), 1)
    assert len(update.metrics) == 2
    for metrics in update.metrics:
        assert {"pg_loss", "ppo_kl", "grad_norm"} <= set(metrics)
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["grad_norm"] > 0
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in actor.parameters.values()]))


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_do_not_change_the_gradient_of_any_loss(make_actor, batch, mode):
    whole = gradient(make_actor(loss_mode=mode), batch)
    sizes = MicroBatches(3)
    cut = gradient(make_actor(loss_mode=mode, micro_batch=sizes, log_prob_micro_batch=sizes), batch)
    assert distance(cut, whole) < 1e-5


@pytest.mark.parametrize("mode", ["gpg", "kl_cov", "geo_mean"])
def test_leaving_out_samples_that_cannot_move_is_exact(make_actor, batch, mode, monkeypatch):
    changes = {"loss_mode": mode, "kl_cov_ratio": 1.0} if mode == "kl_cov" else {"loss_mode": mode}
    ours = gradient(make_actor(**changes), batch)
    monkeypatch.setattr(Actor, "_can_move", lambda self, batch, rows, selected_BT: np.ones(len(rows), dtype=bool))
    assert distance(ours, gradient(make_actor(**changes), batch)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_single_step_without_old_log_probs_is_on_policy(make_actor, batch, mode):
    """The gradient is the one with the old log-probs that the same weights give."""
    columns = {"advantages": batch.columns["advantages"]}
    [metrics] = make_actor(loss_mode=mode).update(replace(batch, columns=columns), plan(batch), 1).metrics
    assert metrics["ppo_kl"] == 0
    assert metrics["grad_norm"] > 0


def test_rollout_is_weights_reach_the_loss(make_actor, batch):
    plain = gradient(make_actor(), batch)
    doubled = gradient(make_actor(), batch.with_columns(rollout_is_weights=np.full(batch.mask_BT.shape, 2.0, dtype=np.float32)))
    assert distance(doubled, 2 * plain) < 1e-6


def test_rollouts_of_several_samples_reach_the_loss(make_actor, batch):
    own = gradient(make_actor(loss_mode="per_rollout_mean"), batch)
    by_sequence = gradient(make_actor(loss_agg_mode="seq-mean-token-mean"), batch)
    assert distance(own, by_sequence) < 1e-6
    tokens_BT = np.broadcast_to(2.0 * batch.mask_BT.sum(axis=1, keepdims=True), batch.mask_BT.shape).astype(np.float32)
    halved = gradient(make_actor(loss_mode="per_rollout_mean"), batch.with_columns(rollout_tokens=tokens_BT))
    assert distance(halved, own / 2) < 1e-6


# ---- the choice of clip_cov and kl_cov


def choose(actor: Actor, batch: Batch, gather: Callable, monkeypatch, step: tuple[int, int] = (1, 0)) -> np.ndarray:
    monkeypatch.setattr(actor_module, "_gather", gather)
    return selection(actor, batch, *step)


def selection(actor: Actor, batch: Batch, training_step: int = 1, number: int = 0) -> np.ndarray:
    everything = MiniBatch(np.arange(len(batch)), LossDenominators(1.0, 1.0, 1.0))
    return actor._select_tokens([Shard(batch, [everything] * (number + 1))], training_step, number)[0]


@pytest.mark.parametrize("mode", list(TOKEN_CHOICES))
def test_the_choice_is_that_of_the_whole_mini_batch_however_it_is_dealt_out(make_actor, batch, mode, monkeypatch):
    actor = make_actor(loss_mode=mode)
    whole_BT = selection(actor, batch)
    assert whole_BT.sum() == int(0.1 * batch.mask_BT.sum())
    assert not (whole_BT & ~batch.mask_BT).any()
    shards = prompt_shards(batch, 3)
    numbers: list[torch.Tensor] = []
    for shard in shards:  # what each worker would send
        choose(actor, batch.rows(shard), lambda mine: (numbers.append(mine) or mine, slice(len(mine))), monkeypatch)
    start = 0
    for shard, own in zip(shards, list(numbers), strict=True):
        mine = slice(start, start + len(own))
        chosen_BT = choose(actor, batch.rows(shard), lambda _, mine=mine: (torch.cat(numbers), mine), monkeypatch)
        assert np.array_equal(chosen_BT, whole_BT[shard][:, : chosen_BT.shape[1]])
        start += len(own)


def test_clip_cov_draws_anew_at_every_step_and_the_same_again(make_actor, batch):
    actor = make_actor(loss_mode="clip_cov")
    first_BT = selection(actor, batch)
    assert np.array_equal(first_BT, selection(actor, batch))
    for step, number in ((2, 0), (1, 1)):
        assert not np.array_equal(first_BT, selection(actor, batch, step, number))
    other = make_actor(loss_mode="clip_cov", seed=1)
    assert not np.array_equal(first_BT, selection(other, batch))


def _gather_on(rank: int, port: int, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    mine = torch.full(((2, 0, 3)[rank], 4), float(rank), dtype=torch.float64)  # the second worker has no token
    everything, own = actor_module._gather(mine)
    results.put((rank, everything[:, 0].tolist(), (own.start, own.stop)))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


def test_the_numbers_of_all_workers_come_together():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # finds a free port
    port = store.port
    del store
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_gather_on, args=(rank, port, results)) for rank in range(3)]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    everything = [0.0, 0.0, 2.0, 2.0, 2.0]
    assert answers == [(0, everything, (0, 2)), (1, everything, (2, 2)), (2, everything, (2, 5))]


# ---- a user's own loss


def likelihood(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Does not look at advantages: no sample may be left out."""
    loss = inputs.aggregate(-inputs.log_prob_BT, settings.loss_agg_mode)
    return loss, {"likelihood": inputs.token_mean(inputs.log_prob_BT)}


def needs_a_third_argument(inputs: object, settings: object, more: object) -> None: ...


not_a_function = 3


def test_a_users_own_loss(make_actor, batch):
    without = batch.with_columns(advantages=np.zeros_like(batch.columns["advantages"]))
    actor = make_actor(loss_mode=f"{__name__}:likelihood")
    update = actor.update(without, plan(batch), 1)
    assert update.metrics[0]["likelihood"] == pytest.approx(float(update.log_probs_BT[batch.mask_BT].mean()), rel=1e-5)
    assert update.metrics[0]["grad_norm"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_built_in_loss_is_found(mode: str):
    assert load_policy_loss(mode) is POLICY_LOSSES[mode]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vanila", "No module named 'vanila'"),
        ("no_such_module:fn", "No module named 'no_such_module'"),
        (f"{__name__}:no_such_function", "no_such_function"),
        (f"{__name__}:not_a_function", "not a callable"),
        (f"{__name__}:needs_a_third_argument", "missing a required argument: 'more'"),
    ],
)
def test_a_loss_that_is_not_there(spec: str, words: str):
    with pytest.raises(ConfigError, match=r"actor\.policy_loss\.loss_mode: no loss at .*loss_mode=vanilla") as caught:
        load_policy_loss(spec)
    assert words in str(caught.value)
