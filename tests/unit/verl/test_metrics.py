"""Metrics against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from agentlightning.types import Batch, Completion
from agentlightning.verl.metrics import (
    compute_data_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_validation_metrics,
    explained_variance,
    tokens_of_phase,
)

# Two samples: three response tokens whose middle one is an observation, and one token.
MASK_BT = np.array([[True, False, True], [True, False, False]])


def make_batch(with_values: bool = True) -> Batch:
    zeros = np.zeros((2, 3), dtype=np.float32)
    batch = Batch(
        uids=("train:0", "train:1"),
        prompt_BP=np.zeros((2, 5), dtype=np.int32),
        prompt_len_B=np.array([5, 2], dtype=np.int32),
        response_BT=zeros.astype(np.int32),
        response_len_B=np.array([3, 1], dtype=np.int32),
        mask_BT=MASK_BT,
        adapter_version=0,
    ).with_columns(
        token_level_scores=np.array([[0, 0, 1], [0.5, 0, 0]], dtype=np.float32),
        token_level_rewards=np.array([[-0.25, 0, 1], [0.5, 0, 0]], dtype=np.float32),
        # 9 stands where no token was chosen: it must not be seen.
        advantages=np.array([[1, 9, 3], [-4, 9, 9]], dtype=np.float32),
        returns=np.array([[1, 9, 2], [6, 9, 9]], dtype=np.float32),
    )
    return batch.with_columns(values=np.array([[1, 9, 1], [4, 9, 9]], dtype=np.float32)) if with_values else batch


def data_metrics(batch: Batch) -> dict[str, float]:
    return compute_data_metrics(batch, num_turns_B=np.array([2, 1]), max_prompt_length=5, max_response_length=4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("critic/score/mean", 0.75),
        ("critic/score/max", 1.0),
        ("critic/score/min", 0.5),
        ("critic/rewards/mean", 0.625),
        ("critic/advantages/mean", 0.0),
        ("critic/advantages/max", 3.0),
        ("critic/advantages/min", -4.0),
        ("critic/returns/mean", 3.0),
        ("critic/values/max", 4.0),
        ("response_length/mean", 2.0),
        ("response_length/max", 3.0),
        ("response_length/clip_ratio", 0.0),
        ("prompt_length/min", 2.0),
        ("prompt_length/clip_ratio", 0.5),
        ("num_turns/mean", 1.5),
        ("num_turns/max", 2.0),
    ],
)
def test_data_metrics_by_hand(name: str, expected: float) -> None:
    assert data_metrics(make_batch())[name] == pytest.approx(expected)


def test_without_a_critic_no_value_metrics() -> None:
    names = data_metrics(make_batch(with_values=False))
    assert "critic/returns/mean" in names
    assert not [name for name in names if name.startswith("critic/values") or name == "critic/vf_explained_var"]


def test_explained_variance_of_a_perfect_a_silent_and_a_harmful_critic() -> None:
    returns_N = np.array([0.0, 1.0, 2.0, 5.0])
    assert explained_variance(returns_N, returns_N) == pytest.approx(1.0)
    assert explained_variance(np.full(4, 7.0), returns_N) == pytest.approx(0.0, abs=1e-5)
    assert explained_variance(-returns_N, returns_N) == pytest.approx(-3.0, abs=1e-4)
    assert explained_variance(np.array([1.0]), np.array([1.0])) == 0.0


def test_a_step_without_any_chosen_token_gives_numbers_and_no_nan() -> None:
    batch = make_batch()
    silent = Batch(
        **{name: getattr(batch, name) for name in ("uids", "prompt_BP", "prompt_len_B", "response_BT", "response_len_B")},
        mask_BT=np.zeros_like(MASK_BT),
        adapter_version=0,
        columns=batch.columns,
    )
    metrics = data_metrics(silent)
    assert metrics["critic/advantages/mean"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("rows", [63, 64, 65, 200])
def test_many_rows_have_the_statistics_of_their_chosen_tokens(rows: int) -> None:
    rng = np.random.default_rng(rows)
    shape = (rows, 7)
    mask_BT = rng.random(shape) < 0.3
    mask_BT[: rows // 2] = False
    columns = {name: rng.normal(size=shape).astype(np.float32) for name in ("advantages", "returns", "token_level_scores")}
    batch = Batch(
        uids=tuple(map(str, range(rows))),
        prompt_BP=np.zeros((rows, 2), dtype=np.int32),
        prompt_len_B=np.full(rows, 2, dtype=np.int32),
        response_BT=np.zeros(shape, dtype=np.int32),
        response_len_B=np.full(rows, 7, dtype=np.int32),
        mask_BT=mask_BT,
        adapter_version=0,
        columns=columns | {"token_level_rewards": columns["token_level_scores"]},
    )
    metrics = compute_data_metrics(batch, num_turns_B=np.ones(rows), max_prompt_length=5, max_response_length=8)
    for name in ("advantages", "returns"):
        chosen = columns[name][mask_BT].astype(np.float64)
        assert metrics[f"critic/{name}/mean"] == pytest.approx(chosen.mean(), rel=1e-12)
        assert (metrics[f"critic/{name}/max"], metrics[f"critic/{name}/min"]) == (chosen.max(), chosen.min())
    assert metrics["critic/score/mean"] == metrics["critic/rewards/mean"]
    shared = replace(batch, columns=columns | {"returns": columns["advantages"], "token_level_rewards": columns["returns"]})
    again = compute_data_metrics(shared, num_turns_B=np.ones(rows), max_prompt_length=5, max_response_length=8)
    assert again["critic/returns/mean"] == metrics["critic/advantages/mean"] != metrics["critic/returns/mean"]
    assert again["critic/rewards/mean"] == pytest.approx(columns["returns"].sum(axis=1, dtype=np.float64).mean(), rel=1e-12)


def test_a_nan_among_the_chosen_tokens_is_seen() -> None:
    batch = make_batch()
    advantages_BT = np.full((2, 3), np.nan, dtype=np.float32)
    advantages_BT[0] = 1.0
    metrics = data_metrics(batch.with_columns(advantages=advantages_BT))
    assert all(np.isnan(metrics[f"critic/advantages/{of}"]) for of in ("mean", "max", "min"))


def test_timing_per_token_counts_responses_for_gen_and_everything_for_updates() -> None:
    tokens = tokens_of_phase(make_batch())
    metrics = compute_timing_metrics({"gen": 0.2, "update_actor": 1.1, "reward": 0.5}, tokens)
    assert metrics["timing_s/reward"] == 0.5
    assert metrics["timing_per_token_ms/gen"] == pytest.approx(200 / 4)
    assert metrics["timing_per_token_ms/update_actor"] == pytest.approx(1100 / 11)
    assert "timing_per_token_ms/reward" not in metrics
    assert "timing_per_token_ms/ref" not in metrics


def test_throughput_is_per_worker() -> None:
    metrics = compute_throughput_metrics(make_batch(), step_seconds=2.0, world_size=2)
    assert metrics == {"perf/total_num_tokens": 11.0, "perf/time_per_step": 2.0, "perf/throughput": pytest.approx(11 / 4)}


def completion(uid: str, index: int, turns: int = 1) -> Completion:
    empty = np.zeros(0)
    said = tuple({"role": "assistant", "content": "x"} for _ in range(turns))
    return Completion(uid, index, empty.astype(np.int32), empty.astype(bool), empty.astype(np.float32), said, "stop", 0)


def test_validation_by_data_source_with_several_samples() -> None:
    completions = [completion("a", 0), completion("a", 1, turns=3), completion("b", 0), completion("b", 1), completion("c", 0)]
    metrics = compute_validation_metrics(["math"] * 4 + ["code"], completions, np.array([1.0, 0.0, 0.5, 0.5, 0.25]), {})
    assert metrics["val-core/math/reward/mean@2"] == pytest.approx(0.5)
    assert metrics["val-core/math/reward/best@2"] == pytest.approx(0.75)
    assert metrics["val-aux/math/reward/std@2"] == pytest.approx(0.25)
    assert metrics["val-core/code/reward/mean@1"] == pytest.approx(0.25)
    assert "val-core/code/reward/best@1" not in metrics
    assert metrics["val-aux/num_turns/max"] == 3.0


def test_validation_calls_acc_the_core_variable_where_the_reward_function_gives_it() -> None:
    completions = [completion("a", 0), completion("b", 0)]
    extra = {"acc": [1.0, 0.0], "length": [3.0, 5.0]}
    metrics = compute_validation_metrics(["s", "s"], completions, np.array([0.9, 0.3]), extra)
    assert metrics["val-core/s/acc/mean@1"] == 0.5
    assert metrics["val-aux/s/reward/mean@1"] == pytest.approx(0.6)
    assert metrics["val-aux/s/length/mean@1"] == 4.0


def test_prompts_weigh_the_same_however_many_samples_reported() -> None:
    completions = [completion("a", 0), completion("a", 1), completion("b", 0), completion("b", 1)]
    extra = {"tool_errors": [1.0, float("nan"), 3.0, 5.0]}
    metrics = compute_validation_metrics(["s"] * 4, completions, np.zeros(4), extra)
    assert metrics["val-aux/s/tool_errors/mean@2"] == pytest.approx((1.0 + 4.0) / 2)
