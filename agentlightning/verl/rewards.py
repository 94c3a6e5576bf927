"""The user's reward function: found, called for each completion, and its answer checked.

`custom_reward_function.path/name` and completions go in; one finite float32 score a sample comes out, with whatever else the
function reported. What a reward function does wrong ends the step here, before any weight changes, and names the sample.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from agentlightning.errors import ConfigError, RewardError
from agentlightning.types import Completion, Prompt
from agentlightning.verl.schema import RewardFunctionConfig

RewardFunction = Callable[..., Any]  # verl's: (data_source, solution_str, ground_truth, extra_info)
LARGEST = float(np.finfo(np.float32).max)
KEY = "custom_reward_function"


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The scores of B samples, in the order of the completions."""

    score_B: np.ndarray  # float32
    extra: Mapping[str, Sequence[float]]  # further numbers that the function reported for every sample: name -> [B]


def load_reward(config: RewardFunctionConfig) -> RewardFunction:
    """The function that `custom_reward_function` names. Raises `ConfigError` if it is not there."""
    if config.path is not None:
        module, name = _module_from_file(Path(config.path).expanduser()), config.name
    else:
        module_name, _, name = config.name.partition(":")
        module = _module_by_name(module_name)
    function = vars(module).get(name)
    if not callable(function):
        functions = [word for word, value in vars(module).items() if callable(value) and not word.startswith("_")]
        raise ConfigError(
            f"{KEY}.name: no function {name!r} in {config.path or module.__name__}; it has {', '.join(functions) or 'none'}; "
            f"mend it with {KEY}.name=<one of them>"
        )
    return function


def _module_from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"custom_reward_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(
            f"{KEY}.path: {path} is not a Python file; mend it with {KEY}.path=<file>.py {KEY}.name=<function in it>"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a function's module up by name
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{KEY}.path: {path} cannot be imported: {error}; mend the file, or set {KEY}.path=<another>"
        ) from error
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{KEY}.name: cannot import {name}: {error}; mend it with {KEY}.name=pkg.mod:fn, "
            f"or {KEY}.path=<file>.py {KEY}.name=<function in it>"
        ) from error


def _nobody_asks() -> None:
    """Nobody asks to stop between two samples."""


def score(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    check: Callable[[], None] = _nobody_asks,
) -> RewardResult:
    """Call `function` for each completion, with the last assistant turn as `solution_str`; `check` before each.

    `extra_info` is the row's, with `num_turns` and `messages` (the prompt's and the completion's) added. The function returns a
    number, or a dict with "score" and further numbers. Raises `RewardError` with the sample's uid if it raises or if a score is
    not a finite number.
    """
    by_uid = {prompt.uid: prompt for prompt in prompts}
    scores: list[float] = []
    extras: list[Mapping[str, float]] = []
    for completion in completions:
        check()
        value, extra = _score_one(function, by_uid[completion.uid], completion)
        scores.append(value)
        extras.append(extra)
    shared = [name for name in extras[0] if all(name in extra for extra in extras)] if extras else []
    return RewardResult(
        score_B=np.array(scores, dtype=np.float32),
        extra={name: [extra[name] for extra in extras] for name in shared},
    )


def _score_one(function: RewardFunction, prompt: Prompt, completion: Completion) -> tuple[float, dict[str, float]]:
    sample = f"sample {completion.sample_index} of {completion.uid}"
    extra_info = {
        **prompt.extra_info,
        "num_turns": completion.num_turns,
        "messages": [*prompt.messages, *completion.turns],
    }
    try:
        result = function(
            data_source=prompt.data_source,
            solution_str=completion.answer,
            ground_truth=prompt.ground_truth,
            extra_info=extra_info,
        )
    except Exception as error:  # user code may raise anything; it is raised again with the sample's name
        raise RewardError(f"the reward function raised {type(error).__name__} for {sample}: {error}") from error
    if not isinstance(result, Mapping):
        return _finite(result, sample), {}
    if "score" not in result:
        raise RewardError(
            f'the reward function returned {dict(result)!r} for {sample}, expected a number or a dict with "score"'
        )
    extra = {name: float(v) for name, v in result.items() if name != "score" and isinstance(v, int | float | np.number)}
    return _finite(result["score"], sample), extra


def _finite(value: Any, sample: str) -> float:
    """`value` as a float that float32 holds. bool, int, numpy's and torch's 0-d numbers are welcome; text is not."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number) or abs(number) > LARGEST:
        raise RewardError(f"the reward function returned {value!r} for {sample}, expected a finite number")
    return number
