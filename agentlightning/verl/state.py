"""What a checkpoint of this trainer holds: worker and trainer state go in, files come out, and back.

The layout is DESIGN's: PEFT's own for each adapter, optimizer state by parameter name, and `trainer_state.json` for the rest.
There is no random state among it: order and samples are pure functions of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from agentlightning.checkpoint.store import CheckpointFiles, LoadedCheckpoint, PartWriter
from agentlightning.errors import CheckpointError
from agentlightning.workers.messages import AdapterState, WorkerState

_ADAPTER = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_OPTIMIZER = "optimizer-"  # -0000i-of-0000n.safetensors: as many files as workers wrote them
_TRAINER_STATE = "trainer_state.json"
_VERSION = "workers_version"  # the actor's, beside the trainer's own state
_VALUE_HEAD = "critic/value_head.safetensors"


@dataclass(slots=True)
class TrainerState:
    """All that the controller itself has learned. JSON-plain."""

    global_step: int = 0  # batches trained on
    kl_ctrl: dict[str, float] = field(default_factory=dict)
    tokens_seen: int = 0  # prompt and response tokens, since the first step
    best: dict[str, float] = field(default_factory=dict)  # validation: {"score", "step"}
    wandb_run_id: str | None = None
    mlflow_run_id: str | None = None
    position: int = 0  # in the stream of prompts, behind the last one drawn
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # the line of `global_step`, should a kill come before it is written


def checkpoint_files(
    parts: PartWriter,
    configs: Mapping[str, Mapping[str, Any]],
    trainer: TrainerState,
    fingerprint: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> CheckpointFiles:
    """Everything one checkpoint holds: the workers' tensors in `parts`, the adapters' configurations, the trainer's state."""
    documents: dict[str, Any] = {f"{name}/{_CONFIG}": dict(config) for name, config in configs.items()}
    documents[_TRAINER_STATE] = {_VERSION: trainer.global_step, **asdict(trainer)}
    return CheckpointFiles({}, parts=parts, json=documents, fingerprint=fingerprint, extra=extra)


def worker_state(loaded: LoadedCheckpoint, uses_critic: bool) -> WorkerState:
    """What the workers put in. Raises `CheckpointError` if a part is missing."""
    with _of_this_trainer(loaded, uses_critic):
        version, actor = loaded.json[_TRAINER_STATE][_VERSION], _adapter(loaded, "actor")
        if not uses_critic:
            return WorkerState(version, actor)
        return WorkerState(version, actor, _adapter(loaded, "critic"), loaded.tensors[_VALUE_HEAD])


def trainer_state(loaded: LoadedCheckpoint) -> TrainerState:
    """What the trainer put in. Raises `CheckpointError` if it has other fields."""
    with _of_this_trainer(loaded, uses_critic=False):
        return TrainerState(**{key: value for key, value in loaded.json[_TRAINER_STATE].items() if key != _VERSION})


@contextmanager
def _of_this_trainer(loaded: LoadedCheckpoint, uses_critic: bool) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{loaded.path} is whole, but not of this trainer and configuration: {error}; expected {_TRAINER_STATE}, actor/"
            f"{' and critic/' if uses_critic else ''}; set algorithm.adv_estimator as it was, "
            "or trainer.resume_mode=disable to start over"
        ) from error


def logger_run_ids(loaded: LoadedCheckpoint | None) -> dict[str, str | None]:
    """The runs of W&B and MLflow that the checkpoint's run logged to, as `Tracking` takes them."""
    document = loaded.json.get(_TRAINER_STATE, {}) if loaded is not None else {}
    return {name: document.get(name) for name in ("wandb_run_id", "mlflow_run_id")}


def _adapter(loaded: LoadedCheckpoint, name: str) -> AdapterState:
    return AdapterState(
        config=loaded.json.get(f"{name}/{_CONFIG}", {}),
        weights=loaded.tensors.get(f"{name}/{_ADAPTER}", {}),
        optimizer=_optimizer(loaded, name),
    )


def _optimizer(loaded: LoadedCheckpoint, name: str) -> dict[str, np.ndarray]:
    """The whole state, however many workers wrote it. KeyError if there is none."""
    parts = [tensors for path, tensors in sorted(loaded.tensors.items()) if path.startswith(f"{name}/{_OPTIMIZER}")]
    if not parts:
        raise KeyError(f"{name}/{_OPTIMIZER}*")
    return {key: tensor for part in parts for key, tensor in part.items()}
