"""`agl ckpt diff`: how two checkpoints differ. Two directories enter; differences of configuration, tensors and metrics leave.

Both are verified as they are read, so what is compared is what was saved. Equal means equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentlightning.checkpoint.store import LoadedCheckpoint, load
from agentlightning.tools.runs import read_config

TRAINER_STATE = "trainer_state.json"
ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Change:
    """One key with two values; `ABSENT` stands for a side that does not have it."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor that is on both sides with one shape and type, and is not the same."""

    name: str
    max_abs: float  # largest |b - a|
    relative_norm: float  # ||b - a|| / ||a||; inf where a is zero


@dataclass(frozen=True, slots=True)
class FileDiff:
    """One safetensors file."""

    file: str
    equal: int  # tensors that are the same bit for bit
    max_abs: float  # over all that can be compared
    relative_norm: float  # of all of them as one vector
    changed: tuple[TensorChange, ...] = ()
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    reshaped: tuple[Change, ...] = ()  # another shape or type, as "float32 [4, 8]"


@dataclass(frozen=True, slots=True)
class Diff:
    """All differences; empty tuples where there are none."""

    a: str
    b: str
    config: tuple[Change, ...]  # what forbids a resume from one with the configuration of the other
    harmless: tuple[Change, ...]  # other keys of the fingerprint, and library versions
    run_config: tuple[Change, ...]  # of the config.yaml beside them, where they belong to two runs
    files: tuple[FileDiff, ...]
    only_in_a: tuple[str, ...]  # files
    only_in_b: tuple[str, ...]
    metrics: tuple[Change, ...]
    state: tuple[Change, ...] = field(default=())  # the rest of trainer_state.json

    @property
    def same_tensors(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        files_match = not any(file.changed or file.only_in_a or file.only_in_b or file.reshaped for file in self.files)
        return files_match and not self.only_in_a and not self.only_in_b


def diff_checkpoints(a: Path, b: Path) -> Diff:
    """Compare two checkpoint directories; CheckpointError if one of them is not as it was saved."""
    left, right = load(a), load(b)
    roots = a.resolve().parent, b.resolve().parent
    files = sorted(left.tensors.keys() & right.tensors.keys())
    before, after = _state(left), _state(right)
    return Diff(
        a=str(a),
        b=str(b),
        config=_changes(_part(left, "breaking"), _part(right, "breaking")),
        harmless=(
            *_changes(_part(left, "harmless"), _part(right, "harmless")),
            *_changes(left.manifest["versions"], right.manifest["versions"], "versions"),
        ),
        run_config=() if roots[0] == roots[1] else _changes(read_config(roots[0]), read_config(roots[1])),
        files=tuple(_compare(file, left.tensors[file], right.tensors[file]) for file in files),
        only_in_a=tuple(sorted(left.tensors.keys() - right.tensors.keys())),
        only_in_b=tuple(sorted(right.tensors.keys() - left.tensors.keys())),
        metrics=_changes(before.pop("metrics", {}), after.pop("metrics", {})),
        state=_changes(before, after),
    )


def _part(loaded: LoadedCheckpoint, name: str) -> Any:
    return loaded.fingerprint.get(name, {})


def _state(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """`trainer_state.json`; empty where another loop did not write one."""
    state = loaded.json.get(TRAINER_STATE, {})
    return dict(state) if isinstance(state, Mapping) else {"": state}


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value. An empty mapping is a value too."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix or not isinstance(value, Mapping) else {}
    parts = (_leaves(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


def _changes(a: Any, b: Any, prefix: str = "") -> tuple[Change, ...]:
    before, after = _leaves(a, prefix), _leaves(b, prefix)
    pairs = [Change(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in sorted(before.keys() | after.keys())]
    return tuple(change for change in pairs if not _same(change.a, change.b))


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (a == b and isinstance(a, bool) == isinstance(b, bool))


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _compare(file: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> FileDiff:
    changed: list[TensorChange] = []
    reshaped: list[Change] = []
    equal, delta_square, a_square, largest = 0, 0.0, 0.0, 0.0
    for name in sorted(a.keys() & b.keys()):
        if _kind(a[name]) != _kind(b[name]):
            reshaped.append(Change(name, _kind(a[name]), _kind(b[name])))
            continue
        before = a[name].astype(np.float64)  # float32's square overflows where the norm does not
        own_square = float(np.square(before).sum())
        a_square += own_square
        if a[name].tobytes() == b[name].tobytes():
            equal += 1
            continue
        with np.errstate(invalid="ignore"):  # inf - inf
            delta = np.abs(b[name].astype(np.float64) - before)
        square, top = float(np.square(delta).sum()), float(delta.max())
        changed.append(TensorChange(name, top, _ratio(square, own_square)))
        delta_square += square
        largest = top if math.isnan(top) else max(largest, top)  # a NaN stays: nothing is larger than it
    changed.sort(key=lambda change: math.inf if math.isnan(change.relative_norm) else change.relative_norm, reverse=True)
    return FileDiff(
        file=file,
        equal=equal,
        max_abs=largest,
        relative_norm=_ratio(delta_square, a_square),
        changed=tuple(changed),
        only_in_a=tuple(sorted(a.keys() - b.keys())),
        only_in_b=tuple(sorted(b.keys() - a.keys())),
        reshaped=tuple(reshaped),
    )


def _ratio(delta_square: float, a_square: float) -> float:
    if a_square == 0.0:
        return math.inf if delta_square else 0.0
    return math.sqrt(delta_square / a_square)
