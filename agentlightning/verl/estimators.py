"""From a configuration's `algorithm.adv_estimator` to the function, and to exactly what it needs.

The tensors of a step go in, (advantages, returns) leave. What a step did not compute is an error here, and never guessed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agentlightning.algorithms import advantages
from agentlightning.errors import ConfigError
from agentlightning.verl.schema import AlgorithmConfig

Estimator = Callable[[Tensor, Tensor, Tensor, AlgorithmConfig], tuple[Tensor, Tensor]]
KEY = "algorithm.adv_estimator"


@dataclass(frozen=True, slots=True)
class RewardDetails:
    """What is known of the rewards beside each sample's score, in the batch's order of samples; None: not known, not needed."""

    components_KB: np.ndarray | None = None  # float32; for gdpo: the K rewards whose weighted sum is the score
    weights_K: np.ndarray | None = None  # float32; their weights
    baseline_B: np.ndarray | None = None  # float32; for remax: the score of the greedy answer to the sample's prompt
    scored_B: np.ndarray | None = None  # bool; False: without a reward, so no part of any statistic and not to be trained on

    def tensors(self, rows: slice | Tensor) -> dict[str, Tensor]:
        """Those that are known, for the samples `rows`."""
        known = {"components_KB": self.components_KB, "weights_K": self.weights_K, "baseline_B": self.baseline_B}
        tensors = {name: torch.from_numpy(array) for name, array in known.items() if array is not None}
        return {name: tensor if name == "weights_K" else tensor[..., rows] for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class EstimatorInputs:
    """All that an estimator may ask for, for B samples that have a reward."""

    config: AlgorithmConfig
    rewards_BT: Tensor
    mask_BT: Tensor
    group_B: Tensor
    columns: Mapping[str, Tensor]
    details: Mapping[str, Tensor]

    def column(self, name: str) -> Tensor:
        """A per-token column, which must be there: nothing is put in its place."""
        return self._one_of(self.columns, name, "column")

    def detail(self, name: str) -> Tensor:
        """A tensor of `RewardDetails`, which must be there."""
        return self._one_of(self.details, name, "reward detail")

    def _one_of(self, known: Mapping[str, Tensor], name: str, what: str) -> Tensor:
        if name not in known:
            raise ValueError(
                f"{KEY}={self.config.adv_estimator} needs the {what} {name!r}, which this step did not compute (it has "
                f"{', '.join(known) or 'none'}); without it: {KEY}=grpo"
            )
        return known[name]


def _gdpo(x: EstimatorInputs) -> tuple[Tensor, Tensor]:
    by_std = x.config.norm_adv_by_std_in_grpo
    return advantages.gdpo(x.detail("components_KB"), x.detail("weights_K"), x.mask_BT, x.group_B, by_std)


def _optimal_token_baseline(x: EstimatorInputs) -> tuple[Tensor, Tensor]:
    old_BT, squares_BT = x.column("old_log_probs"), x.column("sum_pi_squared")
    weights_BT = x.columns.get("rollout_is_weights")
    return advantages.optimal_token_baseline(x.rewards_BT, x.mask_BT, x.group_B, old_BT, squares_BT, weights_BT)


ESTIMATORS: dict[str, Callable[[EstimatorInputs], tuple[Tensor, Tensor]]] = {
    "gae": lambda x: advantages.gae(x.rewards_BT, x.column("values"), x.mask_BT, x.config.gamma, x.config.lam),
    "grpo": lambda x: advantages.grpo(x.rewards_BT, x.mask_BT, x.group_B, x.config.norm_adv_by_std_in_grpo),
    "grpo_passk": lambda x: advantages.grpo_passk(x.rewards_BT, x.mask_BT, x.group_B, x.config.norm_adv_by_std_in_grpo),
    "gdpo": _gdpo,
    "rloo": lambda x: advantages.rloo(x.rewards_BT, x.mask_BT, x.group_B),
    "remax": lambda x: advantages.remax(x.rewards_BT, x.mask_BT, x.detail("baseline_B")),
    "opo": lambda x: advantages.opo(x.rewards_BT, x.mask_BT, x.group_B),
    "gpg": lambda x: advantages.gpg(x.rewards_BT, x.mask_BT, x.group_B),
    "reinforce_plus_plus": lambda x: advantages.reinforce_plus_plus(x.rewards_BT, x.mask_BT, x.config.gamma),
    "reinforce_plus_plus_baseline": lambda x: advantages.reinforce_plus_plus_baseline(x.rewards_BT, x.mask_BT, x.group_B),
    "optimal_token_baseline": _optimal_token_baseline,
}


def estimate(inputs: EstimatorInputs) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] of the estimator that the configuration names.

    Raises ValueError where it needs a column or a detail that is not there, `ConfigError` if a user's own estimator returns
    something else than two tensors [B, T].
    """
    name = inputs.config.adv_estimator
    if name in ESTIMATORS:
        return ESTIMATORS[name](inputs)
    with torch.no_grad():
        result = load_estimator(name)(inputs.rewards_BT, inputs.mask_BT, inputs.group_B, inputs.config)
    shape = inputs.mask_BT.shape
    if not isinstance(result, tuple) or [getattr(x, "shape", None) for x in result] != [shape, shape]:
        raise ConfigError(
            f"{KEY}: {name} returned {type(result).__name__}, expected a tuple (advantages, returns) of two tensors "
            f"{list(shape)}; mend the function, or set {KEY}=grpo"
        )
    advantages_BT, returns_BT = (torch.where(inputs.mask_BT, x, 0.0) for x in result)
    return advantages_BT, returns_BT


def load_estimator(spec: str) -> Estimator:
    """The user's own `pkg.mod:fn(token_level_rewards_BT, mask_BT, group_B, config) -> (advantages_BT, returns_BT)`.

    It is called with tensors (float32, bool, int64) and the `AlgorithmConfig`; what it returns outside the mask is not read.
    Raises `ConfigError` if it cannot be imported or called with four arguments.
    """
    module_name, _, function_name = spec.partition(":")
    mend = f"mend it with {KEY}=pkg.mod:fn, or {KEY}=grpo"
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        inspect.signature(function).bind(None, None, None, None)
    except (ImportError, SyntaxError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{KEY}: given {spec}: {error}; expected an importable function of four arguments, "
            f"(token_level_rewards_BT, mask_BT, group_B, config); {mend}"
        ) from error
    return function
