"""Whether a checkpoint still fits the run that wants to go on from it. Two fingerprints enter, the lines of a diff leave.

A fingerprint is `{"breaking": {...}, "harmless": {...}}` of nested plain values, kept in the manifest. What stands under
`breaking` (model, LoRA shape, data, batch sizes) makes the state meaningless when it changes; the rest is worth a warning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_PATH = "actor_rollout_ref.model.path"  # under `breaking`: `model_identity`
_ABSENT = "absent"


def model_identity(path: str) -> str:
    """A digest of a base's configuration and of its files' names and sizes; a hub name stands for itself."""
    directory = Path(path)
    if not directory.is_dir():
        return path
    digest = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return digest.hexdigest()


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key to the JSON text of the value there. The text, because a tuple comes back from a file as a list."""
    if isinstance(value, Mapping) and value:
        return {
            dotted: text
            for key, item in value.items()
            for dotted, text in _leaves(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: json.dumps(value, ensure_ascii=False)} if prefix else {}


def _diff(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, after = _leaves(saved), _leaves(now)
    return [
        f"{key}: saved {before.get(key, _ABSENT)}, now {after.get(key, _ABSENT)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def compare_fingerprints(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The differences that forbid a resume, and those that do not, as lines `key: saved X, now Y`.

    A key that only one side has is a difference too.
    """
    empty: Mapping[str, Any] = {}
    return (
        _diff(saved.get("breaking", empty), now.get("breaking", empty)),
        _diff(saved.get("harmless", empty), now.get("harmless", empty)),
    )
