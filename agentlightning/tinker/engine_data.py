"""What a caller sends to be trained on, checked whole before anything is computed.

Data in the SDK's words enter; arrays that fit the loss leave, with every column it reads filled. Needs no model, so that a
controller can check before it divides the data among workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agentlightning.algorithms.tinker_losses import PER_POSITION, SERVICE_LOSSES, ServiceLoss
from agentlightning.errors import UserError
from agentlightning.tinker.types import Datum

_COLUMNS = ("weights", "logprobs", "advantages", "sequence_ratio_mask", *PER_POSITION)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the base can take."""

    vocabulary: int  # token ids are below it
    context: int  # tokens


@dataclass(frozen=True, slots=True)
class CheckedDatum:
    """One sequence. T positions, K targets each (1 unless the targets were given in two dimensions)."""

    token_T: np.ndarray  # int64
    target_TK: np.ndarray  # int64
    columns: Mapping[str, np.ndarray]  # float32, [T, K]; all that the loss reads
    shape: tuple[int, ...]  # of target_tokens as given: log-probabilities are handed back in it

    def __len__(self) -> int:
        return len(self.token_T)


@dataclass(frozen=True, slots=True)
class CheckedData:
    """The data of one call, its loss and the loss's configuration with the defaults filled in."""

    data: tuple[CheckedDatum, ...]
    loss_fn: str
    config: Mapping[str, float]

    @property
    def loss(self) -> ServiceLoss:
        """The function and what it reads."""
        return SERVICE_LOSSES[self.loss_fn]

    @property
    def length_B(self) -> np.ndarray:
        """Tokens of each datum."""
        return np.array([len(datum) for datum in self.data], dtype=np.int64)

    def rows(self, places: Sequence[int] | np.ndarray) -> CheckedData:
        """Some of the data."""
        return CheckedData(tuple(self.data[place] for place in places), self.loss_fn, self.config)


def check_data(
    data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None, limits: Limits
) -> CheckedData:
    """Raises `UserError` naming the datum and the field for whatever is wrong."""
    loss = _loss(loss_fn)
    config = _config(loss_fn, loss, loss_fn_config or {})
    if not data:
        raise UserError("forward_backward: given no data, expected at least one datum")
    return CheckedData(tuple(_datum(i, datum, loss_fn, loss, config, limits) for i, datum in enumerate(data)), loss_fn, config)


def _loss(loss_fn: str) -> ServiceLoss:
    if loss_fn not in SERVICE_LOSSES:
        hint = "; a loss of your own runs on the client: forward_backward_custom" if loss_fn == "custom" else ""
        raise UserError(f"loss_fn: given {loss_fn!r}, expected one of {', '.join(SERVICE_LOSSES)}{hint}")
    return SERVICE_LOSSES[loss_fn]


def _config(loss_fn: str, loss: ServiceLoss, given: Mapping[str, float | str]) -> dict[str, float]:
    config = dict(loss.config)
    for key, value in given.items():
        if key not in config:
            names = ", ".join(config)
            expected = f"one of {names} for loss_fn={loss_fn}" if names else f"nothing: loss_fn={loss_fn} has no configuration"
            raise UserError(f"loss_fn_config: given {key!r}, expected {expected}")
        if isinstance(value, str) or not np.isfinite(value):
            raise UserError(f"loss_fn_config.{key}: given {value!r}, expected a finite number")
        config[key] = float(value)
    if PER_POSITION[0] in config and config[PER_POSITION[0]] > config[PER_POSITION[1]]:
        raise UserError(
            f"loss_fn_config: given clip_low_threshold={config[PER_POSITION[0]]:g} above "
            f"clip_high_threshold={config[PER_POSITION[1]]:g}, expected the ratio's lower and upper bound"
        )
    return config


def _datum(
    index: int, datum: Datum, loss_fn: str, loss: ServiceLoss, config: Mapping[str, float], limits: Limits
) -> CheckedDatum:
    token_T = np.array(datum.model_input.to_ints(), dtype=np.int64)
    if not 0 < len(token_T) <= limits.context:
        raise UserError(
            f"datum {index}, model_input: given {len(token_T)} tokens, expected 1 to {limits.context}, the base's context"
        )
    _check_ids(index, "model_input", token_T, limits.vocabulary)
    odd = sorted(datum.loss_fn_inputs.keys() - {"target_tokens", *_COLUMNS})
    if odd:
        known = ", ".join(("target_tokens", *_COLUMNS))
        raise UserError(f"datum {index}, loss_fn_inputs: given {odd[0]!r}, expected some of {known}")
    missing = [name for name in ("target_tokens", *loss.required) if name not in datum.loss_fn_inputs]
    if missing:
        raise UserError(f"datum {index}, {missing[0]}: not given, and loss_fn={loss_fn} needs it in loss_fn_inputs")
    target = datum.loss_fn_inputs["target_tokens"].to_numpy()
    _check_targets(index, target, len(token_T), loss_fn, loss, limits.vocabulary)
    columns = {
        name: _column(index, name, value.to_numpy(), target.shape)
        for name, value in datum.loss_fn_inputs.items()
        if name != "target_tokens"
    }
    filled = _filled(columns, loss_fn, loss, config, target.shape)
    wide = (len(token_T), -1)
    return CheckedDatum(
        token_T, target.reshape(wide), {name: column.reshape(wide) for name, column in filled.items()}, target.shape
    )


def _check_targets(index: int, target: np.ndarray, length: int, loss_fn: str, loss: ServiceLoss, vocabulary: int) -> None:
    if target.dtype != np.int64:
        raise UserError(f"datum {index}, target_tokens: given {target.dtype}, expected int64")
    two_dimensional = loss.several_targets and target.ndim == 2 and target.shape[1] > 0
    if len(target.shape) == 0 or target.shape[0] != length or not (target.ndim == 1 or two_dimensional):
        more = f" or [{length}, k]" if loss.several_targets else f" for loss_fn={loss_fn}"
        raise UserError(
            f"datum {index}, target_tokens: given shape {list(target.shape)}, expected [{length}]{more}: one target for each "
            "token of model_input, shifted already"
        )
    _check_ids(index, "target_tokens", target, vocabulary)


def _check_ids(index: int, name: str, ids: np.ndarray, vocabulary: int) -> None:
    odd = ids[(ids < 0) | (ids >= vocabulary)]
    if odd.size:
        raise UserError(f"datum {index}, {name}: given token id {odd.flat[0]}, expected 0 to {vocabulary - 1}")


def _column(index: int, name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if value.shape != shape:
        raise UserError(
            f"datum {index}, {name}: given shape {list(value.shape)}, expected that of target_tokens, {list(shape)}"
        )
    column = value.astype(np.float32)
    if not np.isfinite(column).all():
        place = int(np.flatnonzero(~np.isfinite(column))[0])
        raise UserError(f"datum {index}, {name}: given {column.flat[place]} at position {place}, expected finite numbers")
    return column


def _filled(
    given: Mapping[str, np.ndarray], loss_fn: str, loss: ServiceLoss, config: Mapping[str, float], shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """All columns that the loss reads, those that were not given with their defaults."""
    columns = {name: given[name] for name in loss.required}
    columns["weights"] = given["weights"] if "weights" in given else np.ones(shape, np.float32)
    for name in PER_POSITION:
        if name in config:
            columns[name] = given[name] if name in given else np.full(shape, config[name], np.float32)
    if loss_fn == "gspo":
        # Nobody says which tokens the policy chose: those that are rewarded or punished.
        by_advantage = (given["advantages"] != 0).astype(np.float32)
        columns["sequence_ratio_mask"] = given.get("sequence_ratio_mask", by_advantage)
    return columns
