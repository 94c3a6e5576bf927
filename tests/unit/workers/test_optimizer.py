"""AdamW by name against the update worked out by hand in float64; the schedule; what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from agentlightning.errors import CheckpointError, NumericsError
from agentlightning.workers.optimizer import NamedAdamW, load_weights, lr_at
from agentlightning.workers.settings import OptimSettings

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


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
    ],
)
def test_schedules(scheduler, expected):
    settings = OptimSettings(1.0, (0.9, 0.99), 0.0, 1.0, warmup_steps=2, scheduler=scheduler, total_steps=6)
    assert [lr_at(settings, step) for step in range(1, 7)] == pytest.approx(expected)


def test_the_floor_of_a_schedule():
    settings = OptimSettings(2.0, (0.9, 0.99), 0.0, 1.0, scheduler="cosine", min_lr_ratio=0.1, total_steps=4)
    assert lr_at(settings, 5) == pytest.approx(0.2)
    assert lr_at(settings, 50) == pytest.approx(0.2)
