"""AdamW by name against the update by hand in float64; schedules against transformers'; what is undone or refused."""

import math
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import get_scheduler

from agentlightning.algorithms.aggregation import global_denominators
from agentlightning.errors import CheckpointError, NumericsError
from agentlightning.types import Batch
from agentlightning.verl.assembly import Placement, worker_settings
from agentlightning.verl.config import load_config
from agentlightning.workers.messages import MiniBatch
from agentlightning.workers.optimizer import NamedAdamW, load_weights, lr_at
from agentlightning.workers.settings import OptimSettings
from agentlightning.workers.worker import Worker

SETTINGS = OptimSettings(lr=0.1, betas=(0.9, 0.99), weight_decay=0.01, grad_clip=1.0, total_steps=10)


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in (("b", (3,)), ("a", (2, 2)))}


def set_gradients(optimizer: NamedAdamW, scale: float) -> dict[str, np.ndarray]:
    """Through backward, as training does; returns them in float64."""
    optimizer.zero_grad()
    sum((scale * (i + 1) * p).sum() for i, p in enumerate(optimizer.parameters.values())).backward()
    return {name: p.grad.double().numpy().copy() for name, p in optimizer.parameters.items()}


def test_steps_equal_adamw_by_hand():
    ours = NamedAdamW(parameters(), SETTINGS)
    weights = {name: p.detach().double().numpy().copy() for name, p in ours.parameters.items()}
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    v = {name: np.zeros_like(w) for name, w in weights.items()}
    for t, scale in enumerate((0.01, 5.0, -2.0), start=1):
        gradients = set_gradients(ours, scale)
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert ours.step(t, "the loss") == pytest.approx({"grad_norm": norm, "lr": 0.1}, rel=1e-6)
        for name, g in gradients.items():
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            weights[name] *= 1 - 0.1 * 0.01
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g**2
            m_hat, v_hat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.99**t)
            weights[name] -= 0.1 * m_hat / (np.sqrt(v_hat) + 1e-8)
            assert ours.parameters[name].detach().numpy() == pytest.approx(weights[name], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(bad):
    ours = NamedAdamW(parameters(), SETTINGS)
    before = {name: p.detach().clone() for name, p in ours.parameters.items()}
    set_gradients(ours, 1.0)
    ours.parameters["b"].grad[1] = bad
    with pytest.raises(NumericsError, match=r"the policy loss .* step 4; 1 of 2 parameters are hit, b first"):
        ours.step(4, "the policy loss")
    assert all(torch.equal(before[name], p) for name, p in ours.parameters.items())
    assert ours.state() == {}


def test_state_goes_round_and_the_next_step_is_the_same_bit_for_bit():
    first, second = NamedAdamW(parameters(), SETTINGS), NamedAdamW(parameters(), SETTINGS)
    set_gradients(first, 0.3)
    first.step(1, "")
    state = first.state()
    assert set(state) == {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("a", "b")}
    load_weights(second.parameters, {name: p.detach().numpy() for name, p in first.parameters.items()}, "actor")
    second.load_state(state)
    cold = NamedAdamW({name: nn.Parameter(p.detach().clone()) for name, p in first.parameters.items()}, SETTINGS)
    for optimizer in (first, second, cold):
        set_gradients(optimizer, -0.7)
        optimizer.step(2, "")
    assert all(torch.equal(p, second.parameters[name]) for name, p in first.parameters.items())
    assert not all(torch.equal(p, cold.parameters[name]) for name, p in first.parameters.items()), "cold moments must differ"


def test_states_of_other_parameters_are_refused_before_anything_changes():
    ours = NamedAdamW(parameters(), SETTINGS)
    before = ours.parameters["a"].detach().clone()
    with pytest.raises(CheckpointError, match=r"[abc] is in one and not in the other.*resume_mode=disable"):
        ours.load_state({"step.c": np.zeros(()), "exp_avg.c": np.zeros(3), "exp_avg_sq.c": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"a has shape \(2, 3\) there and \(2, 2\) here.*lora_rank"):
        load_weights(ours.parameters, {"a": np.zeros((2, 3)), "b": np.zeros(3)}, "actor")
    assert torch.equal(before, ours.parameters["a"])


@pytest.mark.parametrize("scale", [0.01, 0.3, 50.0], ids=["within", "about", "beyond"])
def test_clipping_is_torchs(scale):
    ours = NamedAdamW(parameters(), SETTINGS)
    set_gradients(ours, scale)
    theirs = parameters()
    for name, parameter in theirs.items():
        parameter.grad = ours.parameters[name].grad.clone()
    expected = nn.utils.clip_grad_norm_(list(theirs.values()), SETTINGS.grad_clip)
    assert ours.step(1, "")["grad_norm"] == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in theirs.items():
        assert torch.allclose(ours.parameters[name].grad, parameter.grad, rtol=1e-6)


def test_weight_decay_leaves_magnitudes_alone():
    names = ("q.lora_B.weight", "q.lora_magnitude_vector")
    ours = NamedAdamW({name: nn.Parameter(torch.ones(3)) for name in names}, SETTINGS)
    ours.zero_grad()
    ours.step(1, "")
    assert [float(ours.parameters[name].detach()[0]) for name in names] == [pytest.approx(1 - 0.1 * 0.01), 1.0]
    assert {name.split(".", 1)[1] for name in ours.state()} == set(names)


# ---- updates of several steps


def snapshot(optimizer: NamedAdamW) -> dict[str, np.ndarray]:
    return optimizer.state() | {name: p.detach().numpy().copy() for name, p in optimizer.parameters.items()}


@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.parametrize("error", [NumericsError, KeyboardInterrupt])
def test_an_update_that_fails_in_its_second_step_is_undone(stepped_before, error):
    ours, untouched = NamedAdamW(parameters(), SETTINGS), NamedAdamW(parameters(), SETTINGS)
    if stepped_before:
        for optimizer in (ours, untouched):
            set_gradients(optimizer, 0.3)
            optimizer.step(1, "")
    before = snapshot(ours)
    with pytest.raises(error), ours.undone_on_error(2):  # noqa: PT012 - two steps are the case
        set_gradients(ours, 0.5)
        ours.step(2, "")
        assert not np.array_equal(ours.parameters["a"].detach().numpy(), before["a"])
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        set_gradients(ours, math.nan)
        ours.step(2, "the loss")
    after = snapshot(ours)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    for optimizer in (ours, untouched):  # and it goes on as if nothing had been
        set_gradients(optimizer, -0.7)
        optimizer.step(2, "")
    assert all(np.array_equal(value, snapshot(untouched)[name]) for name, value in snapshot(ours).items())


def test_an_update_without_an_error_stays():
    ours = NamedAdamW(parameters(), SETTINGS)
    before = ours.parameters["a"].detach().clone()
    with ours.undone_on_error(2):
        for _ in range(2):
            set_gradients(ours, 0.5)
            ours.step(1, "")
    assert not torch.equal(before, ours.parameters["a"])
    assert float(ours.state()["step.a"]) == 2


@pytest.mark.parametrize("kind", ["actor", "critic"])
def test_a_second_mini_batch_that_fails_leaves_the_worker_as_it_was(kind):
    worker = Worker(worker_settings(load_config(["algorithm.adv_estimator=gae"]), Placement(1, "cpu", 1), 10))
    batch = two_rows()
    wrong = batch.with_columns(
        **{name: column * np.array([[1.0], [np.nan]], np.float32) for name, column in batch.columns.items()}
    )
    plan = [MiniBatch(np.array([row]), global_denominators(torch.from_numpy(batch.mask_BT[[row]]), 4.0)) for row in (0, 1)]
    optimizer = worker.actor.optimizer if kind == "actor" else worker.critic.optimizer
    update = worker.update_actor if kind == "actor" else worker.update_critic
    before = snapshot(optimizer)
    with pytest.raises(NumericsError, match=r"loss .*is nan.*prompts from 'second' on; no weight was changed"):
        update(wrong, plan, 1)
    after = snapshot(optimizer)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    update(batch, plan, 1)
    assert any(not np.array_equal(before[name], value) for name, value in snapshot(optimizer).items() if name in before)


def two_rows() -> Batch:
    ones = np.ones((2, 4), dtype=np.float32)
    batch = Batch(
        uids=("first", "second"),
        prompt_BP=np.full((2, 3), 65, dtype=np.int32),
        prompt_len_B=np.full(2, 3, dtype=np.int32),
        response_BT=np.full((2, 4), 66, dtype=np.int32),
        response_len_B=np.full(2, 4, dtype=np.int32),
        mask_BT=np.ones((2, 4), dtype=bool),
        adapter_version=0,
    )
    return batch.with_columns(advantages=ones, returns=ones, values=0 * ones, old_log_probs=-ones)


# ---- several workers


def one_of_two(rank: int, rendezvous: str, bad: float, answers) -> None:
    """Two steps in a process of its own: a sound one, and one in which worker 1 has a gradient of `bad`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    ours = NamedAdamW(parameters(), SETTINGS)
    set_gradients(ours, (0.01, 0.03)[rank])
    norm = ours.step(1, "")["grad_norm"]
    before = ours.parameters["a"].detach().clone()
    set_gradients(ours, bad if rank else 0.1)
    try:
        ours.step(2, "the policy loss")
        words = "no error"
    except NumericsError as error:
        words = str(error)
    answers.put((rank, norm, words, torch.equal(before, ours.parameters["a"]), before.tolist()))
    dist.destroy_process_group()


def test_a_bad_gradient_of_one_worker_stops_them_all_before_a_weight_changes(tmp_path):
    fork = multiprocessing.get_context("fork")  # torch is loaded already
    answers = fork.SimpleQueue()
    workers = [fork.Process(target=one_of_two, args=(rank, tmp_path / "meet", math.nan, answers)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    got = sorted(answers.get() for _ in workers)
    for worker in workers:
        worker.join()
    alone = NamedAdamW(parameters(), SETTINGS)
    set_gradients(alone, 0.04)
    norm = alone.step(1, "")["grad_norm"]
    for _, their_norm, words, unchanged, weights in got:
        assert their_norm == pytest.approx(norm, rel=1e-6), "the gradients of the workers add up"
        assert weights == pytest.approx(alone.parameters["a"].detach().numpy(), rel=1e-5)
        assert words == "the gradient of the policy loss is nan at step 2; 2 of 2 parameters are hit, a first"
        assert unchanged


# ---- schedules


def schedule(scheduler: str, warmup: int, total: int, floor: float = 0.0, idle: int = 0) -> OptimSettings:
    return OptimSettings(2.0, (0.9, 0.99), 0.0, 1.0, warmup, scheduler, floor, total, idle)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize(
    ("scheduler", "theirs", "floor", "specific"),
    [
        ("constant", "constant_with_warmup", 0.0, None),
        ("linear", "linear", 0.0, None),
        ("cosine", "cosine", 0.0, None),
        ("cosine", "cosine_with_min_lr", 0.2, {"min_lr_rate": 0.2}),
        ("inverse_sqrt", "inverse_sqrt", 0.0, None),
        ("wsd", "warmup_stable_decay", 0.0, {"num_decay_steps": 3, "decay_type": "linear"}),
        ("wsd", "warmup_stable_decay", 0.2, {"num_decay_steps": 3, "decay_type": "linear", "min_lr_ratio": 0.2}),
    ],
)
def test_schedules_are_transformers(scheduler, theirs, floor, specific, warmup):
    total = 30
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = get_scheduler(theirs, optimizer, warmup, total, specific)
    expected = []
    for _ in range(total + 5):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    ours = [lr_at(schedule(scheduler, warmup, total, floor), step) for step in range(1, total + 6)]
    assert ours[warmup:total] == pytest.approx(expected[warmup:total])
    # Their warm-up begins with a step of nothing (wsd's with the floor); ours with the first share of it.
    assert ours[:warmup] == pytest.approx([2.0 * (step + 1) / warmup for step in range(warmup)])
    if floor == 0:
        assert ours[: max(0, warmup - 1)] == pytest.approx(expected[1:warmup])


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "wsd"])
def test_a_schedule_ends_at_its_floor_and_stays_there(scheduler):
    for past in (11, 12, 500):
        assert lr_at(schedule(scheduler, 2, 10, 0.1), past) == pytest.approx(0.2)
    assert lr_at(schedule("inverse_sqrt", 1, 10, 0.1), 10_000) == pytest.approx(0.2), "which has none but is given one"


def test_steps_in_which_only_the_critic_learns_do_not_count():
    for scheduler in ("constant", "linear", "cosine", "inverse_sqrt", "wsd"):
        idle, plain = schedule(scheduler, 3, 20, idle=5), schedule(scheduler, 3, 15)
        assert [lr_at(idle, step) for step in range(6, 21)] == [lr_at(plain, step) for step in range(1, 16)]


def test_a_warm_up_as_long_as_the_run():
    for scheduler in ("constant", "linear", "cosine", "inverse_sqrt", "wsd"):
        assert [lr_at(schedule(scheduler, 4, 4), step) for step in range(1, 5)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("scheduler", "overrides", "warmup"),
    [
        ("constant", ["lr_warmup_steps=7"], 7),
        ("inverse_sqrt", ["lr_warmup_steps=0", "lr_warmup_steps_ratio=0.5"], 0),
        ("wsd", ["lr_warmup_steps_ratio=0.25"], 20),
    ],
)
def test_warm_up_as_steps_or_as_a_share_of_the_actors_training_steps(scheduler, overrides, warmup):
    optim = [f"actor_rollout_ref.actor.optim.{override}" for override in (f"lr_scheduler_type={scheduler}", *overrides)]
    config = load_config(["trainer.critic_warmup=20", *optim])
    settings = worker_settings(config, Placement(1, "cpu", 1), 100).actor.optim
    assert (settings.warmup_steps, settings.idle_steps, settings.total_steps, settings.scheduler) == (
        warmup,
        20,
        100,
        scheduler,
    )
