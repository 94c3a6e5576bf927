"""What controller and workers say to each other: numpy in plain dataclasses.

Imports no model code, so that the controller starts fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentlightning.algorithms.aggregation import LossDenominators
from agentlightning.types import Batch


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """One optimizer step: these rows of the batch, and the counts over all workers' rows of it."""

    rows: np.ndarray
    denominators: LossDenominators


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the batch that is computed by itself, and its rows of each mini-batch."""

    batch: Batch
    mini_batches: list[MiniBatch]


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Log-probabilities float32 [B, T], and the sum of the entropies over `tokens` tokens."""

    log_probs_BT: np.ndarray
    entropy_sum: float
    tokens: int
    sum_pi_squared_BT: np.ndarray | None = None  # float32; of each token's distribution, where it was asked for


@dataclass(frozen=True, slots=True)
class ActorUpdate:
    """Metrics of each optimizer step, to be added up over shards, and the log-probabilities that its first pass gave.

    `log_probs_BT` is NaN for samples that were left out because they cannot move the policy.
    """

    metrics: list[dict[str, float]]
    log_probs_BT: np.ndarray


@dataclass(frozen=True, slots=True)
class AdapterState:
    """One adapter as a checkpoint holds it: all by parameter name, float32, the same on every worker."""

    config: Mapping[str, Any]  # PEFT's adapter_config.json
    weights: Mapping[str, np.ndarray]  # PEFT's names
    optimizer: Mapping[str, np.ndarray]  # exp_avg.<name>, exp_avg_sq.<name>, step.<name>


@dataclass(frozen=True, slots=True)
class WorkerState:
    """All that training has changed since the base was loaded."""

    version: int
    actor: AdapterState
    critic: AdapterState | None = None
    value_head: Mapping[str, np.ndarray] | None = None
