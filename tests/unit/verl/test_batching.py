"""From a batch and a configuration to advantages, weights and masks: an estimator gets what it needs or says what it lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from agentlightning.algorithms import advantages
from agentlightning.algorithms.correction import CorrectionSettings, rollout_correction
from agentlightning.algorithms.kl import AdaptiveKLController, FixedKLController
from agentlightning.errors import ConfigError, RewardError
from agentlightning.types import Batch, Completion, Prompt
from agentlightning.verl.batching import (
    MiniBatchPlan,
    check_algorithm,
    correction_settings,
    informative_samples,
    make_batch,
    overlong_penalties,
    rollout_probs_diff,
    truncated,
    with_advantages,
    with_rollout_correction,
    without_samples,
)
from agentlightning.verl.config import load_config
from agentlightning.verl.estimators import ESTIMATORS, RewardDetails, load_estimator
from agentlightning.verl.schema import AlgorithmConfig, Config

LENGTHS = [3, 1, 4, 2]
SCORES = np.array([1, 0, 2, 5], dtype=np.float32)
KL = FixedKLController(0.0)


def completion(uid: str, length: int, stop_reason: str = "stop") -> Completion:
    return Completion(
        uid=uid,
        sample_index=0,
        token_ids=np.arange(1, length + 1, dtype=np.int32),
        mask=np.ones(length, dtype=bool),
        logprobs=np.full(length, -0.5, dtype=np.float32),
        turns=(),
        stop_reason=stop_reason,  # pyright: ignore[reportArgumentType]
        adapter_version=0,
    )


COMPLETIONS = [completion("a", 3), completion("a", 1), completion("b", 4, "length"), completion("b", 2, "turns")]
PROMPTS = [Prompt(uid, (), (1, 2), "made", None) for uid in ("a", "b")]


@pytest.fixture
def batch() -> Batch:
    made = make_batch(PROMPTS, COMPLETIONS, SCORES)
    generator = np.random.default_rng(0)
    columns = {
        name: np.where(made.mask_BT, generator.normal(-1, 0.3, made.mask_BT.shape), 0).astype(np.float32)
        for name in ("old_log_probs", "ref_log_prob", "values")
    }
    return made.with_columns(**columns, sum_pi_squared=np.full(made.mask_BT.shape, 0.4, dtype=np.float32))


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(["model=tiny"])


def algorithm(config: Config, **changes: object) -> AlgorithmConfig:
    return config.algorithm.model_copy(update=changes)


def corrected(config: Config, **changes: object) -> AlgorithmConfig:
    return algorithm(config, rollout_correction=config.algorithm.rollout_correction.model_copy(update=changes))


DETAILS = RewardDetails(
    components_KB=np.array([[1, 0, 0, 1], [0, 0, 2, 4]], dtype=np.float32),
    weights_K=np.array([1, 0.5], dtype=np.float32),
    baseline_B=np.array([0.5, 0.5, 3, 3], dtype=np.float32),
)


def test_each_estimator_gets_what_it_needs(batch: Batch, config: Config):
    x = {name: torch.from_numpy(column) for name, column in batch.columns.items()}
    rewards_BT, mask_BT, group_B = x["token_level_scores"], torch.from_numpy(batch.mask_BT), torch.tensor([0, 0, 1, 1])
    components_KB, weights_K, baseline_B = (
        torch.from_numpy(array) for array in (DETAILS.components_KB, DETAILS.weights_K, DETAILS.baseline_B) if array is not None
    )
    expected = {
        "gae": advantages.gae(rewards_BT, x["values"], mask_BT, 0.9, 0.8),
        "grpo": advantages.grpo(rewards_BT, mask_BT, group_B, False),
        "grpo_passk": advantages.grpo_passk(rewards_BT, mask_BT, group_B, False),
        "gdpo": advantages.gdpo(components_KB, weights_K, mask_BT, group_B, False),
        "rloo": advantages.rloo(rewards_BT, mask_BT, group_B),
        "remax": advantages.remax(rewards_BT, mask_BT, baseline_B),
        "opo": advantages.opo(rewards_BT, mask_BT, group_B),
        "gpg": advantages.gpg(rewards_BT, mask_BT, group_B),
        "reinforce_plus_plus": advantages.reinforce_plus_plus(rewards_BT, mask_BT, 0.9),
        "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline(rewards_BT, mask_BT, group_B),
        "optimal_token_baseline": advantages.optimal_token_baseline(
            rewards_BT, mask_BT, group_B, x["old_log_probs"], x["sum_pi_squared"]
        ),
    }
    assert expected.keys() == ESTIMATORS.keys()
    for name, (advantages_BT, returns_BT) in expected.items():
        settings = algorithm(config, adv_estimator=name, gamma=0.9, lam=0.8, norm_adv_by_std_in_grpo=False)
        done, metrics = with_advantages(batch, settings, KL, DETAILS)
        np.testing.assert_allclose(done.columns["advantages"], advantages_BT, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(done.columns["returns"], returns_BT, rtol=1e-6, err_msg=name)
        assert np.abs(done.columns["advantages"]).sum() > 0, name
        assert metrics == {}


def test_configuration_and_table_know_the_same_estimators():
    names, _function_name = get_args(AlgorithmConfig.model_fields["adv_estimator"].annotation)
    assert set(get_args(names)) == ESTIMATORS.keys()


@pytest.mark.parametrize(
    ("name", "missing"),
    [("gae", "values"), ("remax", "baseline_B"), ("gdpo", "components_KB"), ("optimal_token_baseline", "sum_pi_squared")],
)
def test_what_a_step_did_not_compute_is_never_guessed(config: Config, name: str, missing: str):
    bare = make_batch(PROMPTS, COMPLETIONS, SCORES)
    bare = bare.with_columns(old_log_probs=bare.columns["rollout_log_probs"])
    with pytest.raises(ValueError, match=f"{name} needs the .* '{missing}'"):
        with_advantages(bare, algorithm(config, adv_estimator=name), KL)


def test_importance_weights_reach_the_optimal_token_baseline(batch: Batch, config: Config):
    settings = algorithm(config, adv_estimator="optimal_token_baseline")
    weights_BT = np.linspace(0.5, 2, batch.mask_BT.size, dtype=np.float32).reshape(batch.mask_BT.shape)
    plain, weighted = (with_advantages(b, settings, KL)[0] for b in (batch, batch.with_columns(rollout_is_weights=weights_BT)))
    assert not np.allclose(plain.columns["advantages"], weighted.columns["advantages"])


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "gdpo"])
def test_a_sample_without_a_reward_is_no_part_of_any_statistic(batch: Batch, config: Config, name: str):
    unscored = np.array([False, False, False, True])
    settings = algorithm(config, adv_estimator=name)
    done, _ = with_advantages(without_samples(batch, unscored), settings, KL, replace(DETAILS, scored_B=~unscored))
    alone, _ = with_advantages(
        batch.rows([0, 1, 2]), settings, KL, RewardDetails(baseline_B=np.array([0.5, 0.5, 3], dtype=np.float32))
    )
    np.testing.assert_array_equal(done.columns["advantages"][:3], alone.columns["advantages"])
    assert np.abs(done.columns["advantages"][3]).max() == 0
    if name not in ("gae", "remax", "reinforce_plus_plus"):
        assert np.abs(done.columns["advantages"][2]).max() == 0  # the only one left of its prompt


def test_no_reward_at_all_gives_zeros(batch: Batch, config: Config):
    for name in ESTIMATORS:
        details = replace(DETAILS, scored_B=np.zeros(4, dtype=bool))
        done, _ = with_advantages(batch, algorithm(config, adv_estimator=name), KL, details)
        assert np.abs(done.columns["advantages"]).max() == 0


def test_the_kl_is_a_mean_over_samples_that_are_trained_on(batch: Batch, config: Config):
    settings = algorithm(config, use_kl_in_reward=True)
    controllers = [AdaptiveKLController(0.1, 0.1, 100) for _ in range(2)]
    left_out = np.array([False, False, True, False])
    _, masked = with_advantages(without_samples(batch, left_out), settings, controllers[0])
    _, alone = with_advantages(batch.rows([0, 1, 3]), settings, controllers[1])
    assert masked == pytest.approx(alone)
    assert controllers[0].value == pytest.approx(controllers[1].value)


# ---- a user's own estimator


def ours(rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    everywhere_BT = torch.ones_like(rewards_BT, dtype=torch.float64) * (1 + group_B[:, None]) * config.gamma
    return everywhere_BT, torch.where(mask_BT, rewards_BT, torch.nan)


def three_arguments(rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> None:
    """Not what an estimator is called with."""


def one_tensor(rewards_BT: Tensor, _mask_BT: Tensor, _group_B: Tensor, _config: AlgorithmConfig) -> Tensor:
    return rewards_BT


def test_a_user_s_own_estimator(batch: Batch, config: Config):
    done, _ = with_advantages(batch, algorithm(config, adv_estimator=f"{__name__}:ours", gamma=0.5), KL)
    expected_BT = np.where(batch.mask_BT, np.array([0.5, 0.5, 1, 1])[:, None], 0)
    np.testing.assert_array_equal(done.columns["advantages"], expected_BT.astype(np.float32))
    np.testing.assert_array_equal(done.columns["returns"], batch.columns["token_level_scores"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [("no_such_module:fn", "No module named"), (f"{__name__}:nothing", "nothing"), (f"{__name__}:three_arguments", "too many")],
)
def test_an_estimator_that_cannot_be_called_is_refused_before_the_run(config: Config, spec: str, words: str):
    with pytest.raises(ConfigError, match=rf"algorithm\.adv_estimator: given {spec}: .*{words}.*algorithm\.adv_estimator=grpo"):
        load_estimator(spec)
    with pytest.raises(ConfigError, match=words):
        check_algorithm(config.model_copy(update={"algorithm": algorithm(config, adv_estimator=spec)}))


def test_an_estimator_that_returns_something_else_is_refused(batch: Batch, config: Config):
    with pytest.raises(ConfigError, match=r"algorithm\.adv_estimator: .*one_tensor returned Tensor, expected a tuple"):
        with_advantages(batch, algorithm(config, adv_estimator=f"{__name__}:one_tensor"), KL)


# ---- rollout correction


CORRECTION = "algorithm.rollout_correction"


def test_the_correction_shrinks_the_mask_and_adds_weights(batch: Batch, config: Config):
    settings = corrected(config, rollout_is="token", rollout_rs="token")
    done, metrics = with_rollout_correction(batch, settings)
    weights_BT, mask_BT, expected = rollout_correction(
        torch.from_numpy(batch.columns["old_log_probs"]),
        torch.from_numpy(batch.columns["rollout_log_probs"]),
        torch.from_numpy(batch.mask_BT),
        CorrectionSettings(rollout_is="token", rollout_rs="token"),
    )
    assert weights_BT is not None
    np.testing.assert_array_equal(done.mask_BT, mask_BT)
    np.testing.assert_array_equal(done.columns["rollout_is_weights"], weights_BT)
    assert metrics == expected
    assert 0 < done.mask_BT.sum() < batch.mask_BT.sum()
    plan = MiniBatchPlan(2, 2, 1, shuffle=False, seq_norm=4.0)
    assert plan.mini_batches(done, 0, 1)[0].denominators.tokens == done.mask_BT.sum()
    learned, _ = with_advantages(done, settings, KL)
    assert np.abs(learned.columns["advantages"][~done.mask_BT]).max() == 0


def test_without_a_correction_there_are_metrics_where_both_log_probs_are_known(batch: Batch, config: Config):
    done, metrics = with_rollout_correction(batch, config.algorithm)
    assert done.columns.keys() == batch.columns.keys()
    assert np.array_equal(done.mask_BT, batch.mask_BT)
    assert "rollout_corr/kl" in metrics
    assert with_rollout_correction(make_batch(PROMPTS, COMPLETIONS, SCORES), config.algorithm)[1] == {}


def test_bypass_mode_corrects_nothing(batch: Batch, config: Config):
    done, metrics = with_rollout_correction(batch, corrected(config, bypass_mode=True))
    assert done is batch
    assert metrics == {}


def test_a_correction_without_old_log_probs_is_an_error(config: Config):
    with pytest.raises(ValueError, match="old_log_probs"):
        with_rollout_correction(make_batch(PROMPTS, COMPLETIONS, SCORES), corrected(config, rollout_is="token"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{CORRECTION}.rollout_rs_threshold=0.5"], "rollout_rs_threshold: given 0.5"),
        ([f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.rollout_is=token"], "bypass_mode=false"),
        ([f"{CORRECTION}.bypass_mode=true", "algorithm.adv_estimator=optimal_token_baseline"], "optimal_token_baseline"),
        (
            [
                "algorithm.adv_estimator=gdpo",
                "algorithm.use_kl_in_reward=true",
                "+reward.functions.a={name: agentlightning.calculator.task:compute_score}",
            ],
            "use_kl_loss=true",
        ),
        (
            ["reward.overlong_buffer.enable=true", "reward.overlong_buffer.len=100000"],
            "reward.overlong_buffer.len: given 100000",
        ),
        (
            ["algorithm.filter_groups.enable=true", "algorithm.adv_estimator=gae", "actor_rollout_ref.rollout.n=1"],
            "filter_groups.enable=false or actor_rollout_ref.rollout.n=8",
        ),
        (["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=seq_final_reward"], "metric=score"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_the_run(overrides: list[str], words: str):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        check_algorithm(load_config(overrides))


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_every_estimator_passes_the_check(config: Config, name: str):
    check_algorithm(config.model_copy(update={"algorithm": algorithm(config, adv_estimator=name)}))


def test_the_settings_are_those_of_the_configuration():
    given = [f"{CORRECTION}.rollout_rs=geometric", f"{CORRECTION}.rollout_rs_threshold=1.1"]
    settings = correction_settings(load_config(given).algorithm.rollout_correction)
    assert settings == CorrectionSettings(rollout_rs="geometric", rollout_rs_threshold=1.1)
    assert settings.lower == pytest.approx(1 / 1.1)


# ---- large batches


@pytest.fixture(scope="module")
def large() -> tuple[list[Prompt], list[Completion], Batch]:
    """More rows than are looked at together, of all lengths."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(str(i), (), tuple(rng.integers(1, 99, rng.integers(1, 9)).tolist()), "made", None) for i in range(60)]
    completions = [completion(prompt.uid, int(rng.integers(1, 12))) for prompt in prompts[:50] for _ in range(3)]
    logprobs = [-rng.random(len(one.token_ids), dtype=np.float32) for one in completions]
    masks = [rng.random(len(one.token_ids)) < 0.8 for one in completions]
    completions = [replace(one, logprobs=logp, mask=mask) for one, logp, mask in zip(completions, logprobs, masks, strict=True)]
    return prompts, completions, make_batch(prompts, completions, np.arange(len(completions), dtype=np.float32))


def test_each_row_of_a_batch_is_its_prompt_and_completion(large: tuple[list[Prompt], list[Completion], Batch]):
    prompts, completions, batch = large
    ids_of = {prompt.uid: prompt.token_ids for prompt in prompts}
    assert batch.prompt_BP.shape[1] == max(len(ids_of[one.uid]) for one in completions)
    assert batch.response_BT.shape[1] == max(len(one.token_ids) for one in completions)
    assert batch.uids == tuple(one.uid for one in completions)
    for row, one in enumerate(completions):
        for padded, length, expected in (
            (batch.prompt_BP[row], batch.prompt_len_B[row], ids_of[one.uid]),
            (batch.response_BT[row], batch.response_len_B[row], one.token_ids),
            (batch.mask_BT[row], batch.response_len_B[row], one.mask),
            (batch.columns["rollout_log_probs"][row], batch.response_len_B[row], one.logprobs),
        ):
            assert length == len(expected)
            assert padded[:length].tolist() == list(expected)
            assert not padded[length:].any()
        scores_T = batch.columns["token_level_scores"][row]
        assert scores_T[len(one.token_ids) - 1] == scores_T.sum() == row
    assert {array.dtype for array in (batch.prompt_BP, batch.prompt_len_B, batch.response_BT)} == {np.dtype(np.int32)}


def test_the_difference_of_probabilities_is_that_of_the_tokens_that_both_know(
    large: tuple[list[Prompt], list[Completion], Batch],
):
    batch, rng = large[2], np.random.default_rng(1)
    log_probs_BT = -rng.random(batch.mask_BT.shape, dtype=np.float32)
    log_probs_BT[70:140] = np.nan
    known_BT = batch.mask_BT & np.isfinite(log_probs_BT)
    difference = np.abs(np.exp(batch.columns["rollout_log_probs"][known_BT]) - np.exp(log_probs_BT[known_BT]))
    assert rollout_probs_diff(batch, log_probs_BT) == {
        "training/rollout_probs_diff_max": difference.max(),
        "training/rollout_probs_diff_mean": difference.mean(),
        "training/rollout_probs_diff_std": difference.std(),
    }
    assert rollout_probs_diff(batch, np.full_like(log_probs_BT, np.nan)) == {}


def test_what_is_the_same_is_one_array(batch: Batch, config: Config):
    done, _ = with_advantages(batch, algorithm(config, adv_estimator="grpo"), KL)
    assert done.columns["returns"] is done.columns["advantages"]
    assert done.columns["token_level_rewards"] is done.columns["token_level_scores"]
    done, _ = with_advantages(batch, algorithm(config, adv_estimator="grpo"), KL, RewardDetails(scored_B=np.arange(4) > 1))
    assert done.columns["returns"] is done.columns["advantages"]
    done, _ = with_advantages(batch, algorithm(config, adv_estimator="gae", use_kl_in_reward=True), FixedKLController(0.5))
    assert (done.columns["returns"] != done.columns["advantages"]).any()
    assert (done.columns["token_level_rewards"] != done.columns["token_level_scores"]).any()


# ---- long answers, and prompts that teach nothing


def test_samples_that_were_cut_leave_the_loss(batch: Batch):
    done = without_samples(batch, truncated(COMPLETIONS))
    assert done.mask_BT.any(axis=1).tolist() == [True, True, False, True]
    assert MiniBatchPlan(2, 2, 1, False, 4.0).mini_batches(done, 0, 1)[0].denominators.sequences == 3


def test_penalties_for_long_answers(config: Config):
    buffer = config.reward.overlong_buffer.model_copy(update={"enable": True, "len": 2})
    penalty_B = overlong_penalties(COMPLETIONS, buffer, 4)
    assert penalty_B.dtype == np.float32
    assert penalty_B.tolist() == [-0.5, 0, -1, 0]
    assert overlong_penalties(COMPLETIONS, buffer.model_copy(update={"enable": False}), 4).tolist() == [0] * 4


def test_prompts_that_teach_nothing_are_found():
    assert informative_samples(["a", "b", "a", "b"], np.array([1, 0, 1, 1])).tolist() == [False, True, False, True]
    with pytest.raises(RewardError, match=r"algorithm\.filter_groups\.metric"):
        informative_samples(["a", "a"], np.array([1, np.nan]))
