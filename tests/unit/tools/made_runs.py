"""Runs as the trainer leaves them, made without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agentlightning.checkpoint import CheckpointFiles

ACC = "val-core/sums/acc/mean@1"


def files_of(step: int, accuracy: float | None = None, lora_rank: int = 4) -> CheckpointFiles:
    """A small checkpoint of the trainer's layout, other numbers at every step."""
    metrics = {"critic/score/mean": step / 10} | ({} if accuracy is None else {ACC: accuracy})
    weights = {"lora_A": np.full((4, 8), 1.0, np.float32), "lora_B": np.full((8, 4), float(step), np.float32)}
    return CheckpointFiles(
        {"actor/adapter_model.safetensors": weights, "actor/optimizer-00000-of-00001.safetensors": {"step": np.array([step])}},
        {
            "actor/adapter_config.json": {"r": lora_rank, "base_model_name_or_path": None},
            "trainer_state.json": {"global_step": step, "tokens_seen": 100 * step, "metrics": metrics},
        },
        {"breaking": {"lora_rank": lora_rank}, "harmless": {"optim": {"lr": 1e-3}}},
        {"attempt": 1, "epoch": 0, "metrics": metrics},
    )


def write_metrics(root: Path, lines: list[Mapping[str, Any]]) -> None:
    root.mkdir(exist_ok=True)
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
