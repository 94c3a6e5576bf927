"""`data.sampler`: the user's own order of the rows.

`pkg.mod:fn` goes in, a checked function comes out. `fn(seed, position, rows)` names the row, 0 <= row < rows, at a position
(from 0) of the endless stream of prompts: a curriculum, for files that are sorted by difficulty. A resumed run calls it for the
positions that are left, so it must be a pure function of its arguments; one that is not is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from agentlightning.errors import ConfigError

Sampler = Callable[[int, int, int], int]
_KEY = "data.sampler"
_TRIED = 8  # positions that are asked for twice, the second time backwards


def load_sampler(name: str, seed: int, rows: int) -> Sampler:
    """The function `pkg.mod:fn`, each answer checked. Raises `ConfigError` if it is missing, fails, or is not pure."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything while it is imported
        raise ConfigError(
            f"{_KEY}: cannot import {module_name}: {type(error).__name__}: {error}; "
            f"mend it with {_KEY}=pkg.mod:fn or {_KEY}=null"
        ) from error
    function = vars(module).get(function_name)
    if not callable(function):
        functions = [word for word, value in vars(module).items() if callable(value) and not word.startswith("_")]
        raise ConfigError(
            f"{_KEY}: no function {function_name!r} in {module_name}; it has {', '.join(functions) or 'none'}; "
            f"mend it with {_KEY}={module_name}:<one of them>"
        )

    def checked(seed: int, position: int, rows: int) -> int:
        return _ask(function, name, seed, position, rows)

    _refuse_impure(checked, name, seed, rows)
    return checked


def _ask(function: Callable[..., Any], name: str, seed: int, position: int, rows: int) -> int:
    call = f"{name}(seed={seed}, position={position}, rows={rows})"
    try:
        row = function(seed, position, rows)
    except Exception as error:  # so may the function
        raise ConfigError(
            f"{_KEY}: {call} raised {type(error).__name__}: {error}; mend the function, or set {_KEY}=null"
        ) from error
    if not isinstance(row, int | np.integer) or isinstance(row, bool) or not 0 <= row < rows:
        raise ConfigError(
            f"{_KEY}: {call} returned {row!r}, expected a whole number from 0 to {rows - 1}; "
            f"mend the function, or set {_KEY}=null"
        )
    return int(row)


def _refuse_impure(sampler: Sampler, name: str, seed: int, rows: int) -> None:
    first = [sampler(seed, position, rows) for position in range(_TRIED)]
    again = [sampler(seed, position, rows) for position in reversed(range(_TRIED))][::-1]
    for position, pair in enumerate(zip(first, again, strict=True)):
        if len(set(pair)) > 1:
            raise ConfigError(
                f"{_KEY}: {name} named row {pair[0]} for position {position} and row {pair[1]} when asked again; expected a "
                f"pure function of (seed, position, rows), for a resumed run must get the same rows; draw from "
                f"random.Random(f'{{seed}}:{{position}}'), or set {_KEY}=null"
            )
