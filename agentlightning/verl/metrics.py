"""What a step did, as numbers under verl's names.

A finished `Batch`, seconds by timer, and scores go in; flat dicts from metric name to float come out, ready for metrics.jsonl.
It exists so that dashboards made for verl read our runs. numpy only; nothing here is looked at by the training itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from agentlightning.types import Batch, Completion

STEP = "training/global_step"
EPOCH = "training/epoch"
ATTEMPT = (
    "training/attempt"  # 1 for the first start in a run directory, one more for each resume; where it changes, it was resumed
)
SCORE = "critic/score/mean"
VAL_CORE = "val-core/"
ROWS_AT_A_TIME = 64  # in which a large batch is gone through: temporary arrays of a few hundred kilobytes

# Which tokens a timer has worked on: sampling makes the responses, everything else runs over whole samples.
_PER_TOKEN_TIMERS = ("gen", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")


def compute_data_metrics(
    batch: Batch, *, num_turns_B: np.ndarray, max_prompt_length: int, max_response_length: int
) -> dict[str, float]:
    """Statistics of one step's samples.

    `batch` has the columns `token_level_scores`, `token_level_rewards`, `advantages`, `returns` and, with a critic, `values`,
    each [B, T]; `num_turns_B` counts assistant turns. `clip_ratio` is the share of samples as long as the limit lets them be.
    """
    columns, mask_BT = batch.columns, batch.mask_BT
    scores_BT, rewards_BT = columns["token_level_scores"], columns["token_level_rewards"]
    advantages_BT, returns_BT = columns["advantages"], columns["returns"]
    # A score may lie on an observation, behind the policy's last token, so these two sum over all response tokens.
    score_B = scores_BT.sum(axis=1, dtype=np.float64)
    # What is one array here has one statistic: rewards are the scores without a KL in them, returns often the advantages.
    reward_B = score_B if rewards_BT is scores_BT else rewards_BT.sum(axis=1, dtype=np.float64)
    advantages = _mean_max_min_of_chosen(advantages_BT, mask_BT)
    returns = advantages if returns_BT is advantages_BT else _mean_max_min_of_chosen(returns_BT, mask_BT)
    metrics = {
        **_mean_max_min("critic/score", score_B),
        **_mean_max_min("critic/rewards", reward_B),
        **_named("critic/advantages", advantages),
        **_named("critic/returns", returns),
        **_lengths("response_length", batch.response_len_B, max_response_length),
        **_lengths("prompt_length", batch.prompt_len_B, max_prompt_length),
        **_mean_max_min("num_turns", num_turns_B),
    }
    if "values" in columns:
        values_N = columns["values"][mask_BT]
        metrics |= _mean_max_min("critic/values", values_N)
        metrics["critic/vf_explained_var"] = explained_variance(values_N, returns_BT[mask_BT])
    return metrics


def explained_variance(values_N: np.ndarray, returns_N: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that says nothing, below 0 a harmful one."""
    residual_N = returns_N.astype(np.float64) - values_N.astype(np.float64)
    # The small constant is verl's: without it a batch of equal returns would divide by zero.
    return (
        float(1.0 - residual_N.var(ddof=1) / (returns_N.astype(np.float64).var(ddof=1) + 1e-5)) if len(returns_N) > 1 else 0.0
    )


def tokens_of_phase(batch: Batch) -> dict[str, int]:
    """How many tokens each timer of the step has worked on: responses for `gen`, whole samples for the others."""
    responses, everything = int(batch.response_len_B.sum()), int(batch.total_len_B.sum())
    return {name: responses if name == "gen" else everything for name in _PER_TOKEN_TIMERS}


def compute_timing_metrics(timing_raw: Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
    """`timing_s/<timer>` for every timer (seconds), and `timing_per_token_ms/<timer>` for those that `tokens` counts."""
    seconds = {f"timing_s/{name}": float(value) for name, value in timing_raw.items()}
    per_token = {
        f"timing_per_token_ms/{name}": 1000.0 * timing_raw[name] / count
        for name, count in tokens.items()
        if name in timing_raw and count > 0
    }
    return seconds | per_token


def compute_throughput_metrics(batch: Batch, step_seconds: float, world_size: int) -> dict[str, float]:
    """`perf/throughput` is tokens a second a worker, prompts and responses together, over the whole step."""
    total = int(batch.total_len_B.sum())
    return {
        "perf/total_num_tokens": float(total),
        "perf/time_per_step": step_seconds,
        "perf/throughput": total / (step_seconds * world_size),
    }


def compute_validation_metrics(
    data_sources: Sequence[str],
    completions: Sequence[Completion],
    scores: np.ndarray,
    extra: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """Validation by data source; all four arguments have one entry a completion.

    `mean@N` is the mean over prompts of the mean over a prompt's N samples, `best@N` of their maximum, `std@N` of their
    standard deviation. The variable `acc`, or `reward` where the reward function gives none, is `val-core/`; the rest is
    `val-aux/`.
    """
    variables = {"reward": np.asarray(scores, dtype=np.float64)}
    variables |= {name: np.asarray(values, dtype=np.float64) for name, values in extra.items()}
    core = "acc" if "acc" in variables else "reward"
    uids = np.array([completion.uid for completion in completions])
    sources = np.array(data_sources)
    metrics: dict[str, float] = {}
    for source in sorted(set(data_sources)):
        here = sources == source
        for name, values in variables.items():
            groups = _by_prompt(uids[here], values[here])
            samples = max(len(group) for group in groups)
            family = f"val-core/{source}/{name}" if name == core else f"val-aux/{source}/{name}"
            metrics[f"{family}/mean@{samples}"] = float(np.mean([group.mean() for group in groups]))
            if samples > 1:
                metrics[f"{family}/best@{samples}"] = float(np.mean([group.max() for group in groups]))
                metrics[f"val-aux/{source}/{name}/std@{samples}"] = float(np.mean([group.std() for group in groups]))
    turns = np.array([completion.num_turns for completion in completions])
    return metrics | {f"val-aux/{name}": value for name, value in _mean_max_min("num_turns", turns).items()}


def _by_prompt(uids: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """The values of each prompt's samples, NaN (a variable that a sample did not report) left out."""
    groups = [values[uids == uid] for uid in dict.fromkeys(uids.tolist())]
    known = [group[~np.isnan(group)] for group in groups]
    return [group for group in known if len(group)] or [np.zeros(1)]


def _lengths(name: str, length_B: np.ndarray, limit: int) -> dict[str, float]:
    return _mean_max_min(name, length_B) | {f"{name}/clip_ratio": float((length_B >= limit).mean())}


def _mean_max_min(name: str, values: np.ndarray) -> dict[str, float]:
    """Zeros where nothing was there to measure: a step in which the policy said not one token."""
    if values.size == 0:
        return _named(name, (0.0, 0.0, 0.0))
    return _named(name, (float(values.mean(dtype=np.float64)), float(values.max()), float(values.min())))


def _mean_max_min_of_chosen(values_BT: np.ndarray, mask_BT: np.ndarray) -> tuple[float, float, float]:
    """Over the masked values, zeros if there are none. A few rows at a time, which a cache holds."""
    count, total, largest, smallest = 0, 0.0, -np.inf, np.inf
    for start in range(0, len(values_BT), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        values_N = values_BT[rows][mask_BT[rows]]
        if len(values_N):
            count += len(values_N)
            total += float(values_N.sum(dtype=np.float64))
            largest, smallest = np.maximum(largest, values_N.max()), np.minimum(smallest, values_N.min())  # NaN goes through
    return (total / count, float(largest), float(smallest)) if count else (0.0, 0.0, 0.0)


def _named(name: str, mean_max_min: tuple[float, float, float]) -> dict[str, float]:
    mean, largest, smallest = mean_max_min
    return {f"{name}/mean": mean, f"{name}/max": largest, f"{name}/min": smallest}
