"""The service's losses against their formulas written out in numpy, and their gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agentlightning.algorithms.tinker_losses import SERVICE_LOSSES

B, T = 3, 7
LOW, HIGH = 0.9, 1.15


def columns(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logp = -rng.uniform(0.1, 3, (B, T))
    return {
        "logp": logp,
        "logprobs": logp + rng.normal(0, 0.3, (B, T)),
        "advantages": rng.normal(0, 1, (B, T)) * rng.integers(0, 2, (B, T)),
        "weights": rng.normal(0, 1, (B, T)),
        "clip_low_threshold": np.full((B, T), LOW),
        "clip_high_threshold": np.full((B, T), HIGH),
        "sequence_ratio_mask": rng.integers(0, 2, (B, T)).astype(float),
    }


def by_hand(name: str, c: dict[str, np.ndarray], b: int, t: int) -> float:
    """The loss of one position."""
    logp, q, A = c["logp"][b, t], c["logprobs"][b, t], c["advantages"][b, t]
    ratio = math.exp(logp - q)
    if name == "cross_entropy":
        return -c["weights"][b, t] * logp
    if name == "importance_sampling":
        return -ratio * A
    if name == "dro":
        return -(logp * A - 0.5 * 0.3 * (logp - q) ** 2)
    if name == "cispo":
        return -min(max(ratio, LOW), HIGH) * logp * A
    if name == "gspo":
        inside = [s for s in range(T) if c["sequence_ratio_mask"][b, s]]
        ratio = math.exp(sum(c["logp"][b, s] - c["logprobs"][b, s] for s in inside) / max(1, len(inside)))
    return -min(ratio * A, min(max(ratio, LOW), HIGH) * A)


def loss_of(name: str, logp: torch.Tensor, c: dict[str, np.ndarray]) -> torch.Tensor:
    tensors = {key: torch.tensor(value) for key, value in c.items() if key != "logp"}
    return SERVICE_LOSSES[name].positions(logp, tensors, {"beta": 0.3})


@pytest.mark.parametrize("name", SERVICE_LOSSES)
def test_values_are_those_of_the_formula(name: str):
    c = columns()
    given = loss_of(name, torch.tensor(c["logp"]), c).numpy()
    expected = [[by_hand(name, c, b, t) for t in range(T)] for b in range(B)]
    np.testing.assert_allclose(given, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "dro"])
def test_gradients_are_the_finite_differences(name: str):
    c, step = columns(1), 1e-6
    logp = torch.tensor(c["logp"], requires_grad=True)
    loss_of(name, logp, c).sum().backward()
    assert logp.grad is not None
    for b, t in np.ndindex(B, T):
        moved = [{**c, "logp": c["logp"] + sign * step * one(b, t)} for sign in (1, -1)]
        difference = (by_hand(name, moved[0], b, t) - by_hand(name, moved[1], b, t)) / (2 * step)
        assert float(logp.grad[b, t]) == pytest.approx(difference, abs=1e-7)


def one(b: int, t: int) -> np.ndarray:
    array = np.zeros((B, T))
    array[b, t] = 1
    return array


def test_cispo_s_gradient_is_the_clipped_ratio_alone():
    c = columns(2)
    logp = torch.tensor(c["logp"], requires_grad=True)
    loss_of("cispo", logp, c).sum().backward()
    ratio = np.exp(c["logp"] - c["logprobs"])
    np.testing.assert_allclose(logp.grad, -np.clip(ratio, LOW, HIGH) * c["advantages"], rtol=1e-12)


def test_gspo_s_gradient_is_that_of_each_token_under_the_sequence_s_ratio():
    c = columns(3)
    logp = torch.tensor(c["logp"], requires_grad=True)
    loss_of("gspo", logp, c).sum().backward()
    for b in range(B):
        inside = c["sequence_ratio_mask"][b] != 0
        ratio = math.exp((c["logp"][b] - c["logprobs"][b])[inside].mean()) if inside.any() else 1.0
        for t in range(T):
            A = c["advantages"][b, t]
            clipped = (A > 0 and ratio > HIGH) or (A < 0 and ratio < LOW)
            assert float(logp.grad[b, t]) == pytest.approx(0.0 if clipped else -ratio * A, abs=1e-12)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_positions_without_advantage_add_exactly_nothing(name: str):
    c = columns()
    c["advantages"] = np.zeros((B, T))
    c["logprobs"] = np.full((B, T), -2000.0)  # a ratio that is infinite
    logp = torch.tensor(c["logp"], requires_grad=True)
    loss = loss_of(name, logp, c).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logp.grad is not None
    assert not logp.grad.any()


def test_the_documented_defaults():
    assert dict(SERVICE_LOSSES["ppo"].config) == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert dict(SERVICE_LOSSES["cispo"].config) == {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    assert [name for name, loss in SERVICE_LOSSES.items() if loss.several_targets] == ["cross_entropy"]
