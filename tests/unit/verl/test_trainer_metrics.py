"""What a step and a validation tell of themselves."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from agentlightning.types import Completion, Prompt
from agentlightning.verl.config import load_config
from agentlightning.verl.rewards import RewardResult
from agentlightning.verl.state import TrainerState
from agentlightning.verl.trainer import AgentLightningTrainer

PROMPTS = [Prompt(f"val:{row}", ({"role": "user", "content": "?"},), (1,), "sums", "4") for row in range(2)]


def answers(prompts, params, **_):
    token_N = np.ones(1, dtype=np.int32)
    turns = ({"role": "assistant", "content": "4"},)
    return [Completion(p.uid, 0, token_N, token_N > 0, token_N * 0.0, turns, "stop", 3) for p in prompts]


def test_failures_in_a_validation_are_told_once():
    nothing_B, failed_B = np.zeros(1, dtype=np.float32), np.ones(1, dtype=bool)
    told: list[str] = []
    trainer = SimpleNamespace(
        config=load_config(["data.val_batch_size=1"]),
        val_prompts=PROMPTS,
        group=SimpleNamespace(generate=answers),
        console=SimpleNamespace(warning=told.append),
        state=TrainerState(),
        _score=lambda prompts, completions: RewardResult(nothing_B, {}, {}, failed_B, ~failed_B, ("1 of 1 have no reward",)),
        _timer=lambda name, timing_raw: contextlib.nullcontext(),
    )
    metrics = AgentLightningTrainer._validate(trainer, 3, {})
    assert told == ["validation: 1 of 1 have no reward"]
    assert metrics["val-core/sums/reward/mean@1"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"actor/pg_loss": 0.0}),
        (["actor_rollout_ref.actor.use_kl_loss=true"], {"actor/pg_loss": 0.0, "actor/kl_coef": 0.001}),
    ],
)
def test_a_step_in_which_nothing_moves_has_a_loss_and_the_coefficient_is_logged(overrides, expected):
    trainer = SimpleNamespace(
        config=load_config(overrides),
        actor_plan=SimpleNamespace(mini_batches=lambda batch, seed, step: []),
        group=SimpleNamespace(update_actor=lambda batch, plan, step: ({"entropy": 0.0, "grad_norm": 0.0}, np.zeros((1, 1)))),
        needs_old_log_prob=True,
    )
    assert AgentLightningTrainer._update_actor(trainer, None, 1) == {"actor/grad_norm": 0.0, **expected}
