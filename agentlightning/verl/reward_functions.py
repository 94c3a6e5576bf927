"""A reward function: found by its file or name, its form recognised, called, and its answer checked.

Configuration values and samples go in; functions, and `Answer`s or `RewardError`s that name the sample, come out. It imports
the standard library only, for the processes of reward_worker.py run it too and must start quickly.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from agentlightning.errors import ConfigError, RewardError

SINGLE = ("data_source", "solution_str", "ground_truth", "extra_info")  # verl's words
BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")  # verl's BatchRewardManager's
_LARGEST = 3.4028234663852886e38  # of float32


class Sample(NamedTuple):  # made for every completion: four times as fast as a frozen dataclass
    """One completion as a reward function sees it."""

    name: str  # "sample 3 of train:7"
    arguments: Mapping[str, Any]  # by the names of SINGLE


class Answer(NamedTuple):
    """What a reward function says about one sample: a finite score, and further numbers by name."""

    score: float
    extra: Mapping[str, float]


class CallError(RewardError):
    """A function raised, hung or died, so that another try may go better; a wrong answer is a plain `RewardError`."""


Outcome = Answer | RewardError


@dataclass(frozen=True, slots=True)
class LoadedFunction:
    """A user's function and its form."""

    function: Callable[..., Any]
    is_batch: bool
    is_async: bool

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample. Raises `CallError` if the function raises. Takes one sample unless `is_batch`."""
        try:
            result = self.function(**(_plural(samples) if self.is_batch else samples[0].arguments))
        except (Exception, SystemExit) as error:  # user code may raise anything; it is raised again with the sample's name
            raise _raised(error, samples) from error
        return checked_answers(result, samples) if self.is_batch else [checked_answer(result, samples[0])]

    async def call_async(self, samples: Sequence[Sample]) -> list[Outcome]:
        """The same for an `async def`."""
        try:
            awaitable: Awaitable[Any] = self.function(**(_plural(samples) if self.is_batch else samples[0].arguments))
            result = await awaitable
        except (Exception, SystemExit) as error:
            raise _raised(error, samples) from error
        return checked_answers(result, samples) if self.is_batch else [checked_answer(result, samples[0])]


def _plural(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """The arguments of a batch function."""
    return {many: [sample.arguments[one] for sample in samples] for many, one in zip(BATCH, SINGLE, strict=True)}


def as_json(samples: Sequence[Sample], message: Any) -> bytes:
    """`message`, made of `samples`, for another process. Raises `RewardError` if a row holds what JSON cannot say."""
    try:
        return json.dumps(message).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"cannot be sent {names_of(samples)}: {error}; ground_truth and extra_info may hold text, numbers, lists and "
            "dictionaries; mend the data, or call a Python function in this process with reward.timeout_s=null"
        ) from error


def names_of(samples: Sequence[Sample]) -> str:
    """How a message names them: one by its name, many by the first and their number."""
    return samples[0].name if len(samples) == 1 else f"a batch of {len(samples)} samples, {samples[0].name} the first"


def _raised(error: Exception | SystemExit, samples: Sequence[Sample]) -> CallError:
    return CallError(f"raised {type(error).__name__} for {names_of(samples)}: {error}")


def checked_answers(result: Any, samples: Sequence[Sample]) -> list[Outcome]:
    """The outcomes in what a batch function returned: one for each sample, or the same error for all."""
    try:
        answers = list(result)
    except TypeError:
        answers = None
    if answers is None or isinstance(result, str | bytes | Mapping) or len(answers) != len(samples):
        given = f"a {type(result).__name__}" + (f" of {len(answers)}" if answers is not None else "")
        error = RewardError(f"returned {given} for {names_of(samples)}, expected a list of {len(samples)} scores")
        return [error] * len(samples)
    return [checked_answer(answer, sample) for answer, sample in zip(answers, samples, strict=True)]


def checked_answer(result: Any, sample: Sample) -> Outcome:
    """The outcome in what a function returned for one sample: a number, or a mapping with "score" and further numbers."""
    if not isinstance(result, dict | Mapping):  # dict first: the abstract class is slow to ask
        return _answer(result, {}, sample)
    if "score" not in result:
        return RewardError(f'returned {dict(result)!r} for {sample.name}, expected a number or a dict with "score"')
    extra = {str(name): float(v) for name, v in result.items() if name != "score" and isinstance(v, Real)}
    return _answer(result["score"], extra, sample)


def _answer(value: Any, extra: Mapping[str, float], sample: Sample) -> Outcome:
    number = _finite(value)
    if number is None:
        return RewardError(f"returned {value!r} for {sample.name}, expected a finite number")
    return Answer(number, extra)


def _finite(value: Any) -> float | None:
    """`value` as a float that float32 holds. bool, int, numpy's and torch's 0-d numbers are welcome; text is not."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a torch tensor of several numbers
        return None
    return None if math.isnan(number) or abs(number) > _LARGEST else number


def load_function(path: str | None, name: str, key: str) -> LoadedFunction:
    """What `<key>.path` and `<key>.name` name. Raises `ConfigError` if it is not there, or takes other arguments."""
    if path is not None:
        module, function_name = _module_from_file(Path(path).expanduser(), key), name
    else:
        module_name, _, function_name = name.partition(":")
        module = _module_by_name(module_name, key)
    function = vars(module).get(function_name)
    if not callable(function):
        functions = [word for word, value in vars(module).items() if callable(value) and not word.startswith("_")]
        raise ConfigError(
            f"{key}.name: no function {function_name!r} in {path or module.__name__}; it has {', '.join(functions) or 'none'}; "
            f"mend it with {key}.name=<one of them>"
        )
    return recognised(function, key)


def recognised(function: Callable[..., Any], key: str) -> LoadedFunction:
    """`function` with its form. Raises `ConfigError` if it takes neither verl's arguments nor their plurals."""
    called = function if inspect.isroutine(function) else vars(type(function)).get("__call__", function)
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none; what they do will show
        return LoadedFunction(function, is_batch=False, is_async=is_async)
    is_batch = BATCH[1] in signature.parameters
    try:
        signature.bind(**dict.fromkeys(BATCH if is_batch else SINGLE))
    except TypeError as error:
        given = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"{key}.name: given {given}{signature}, which cannot be called with {', '.join(BATCH if is_batch else SINGLE)} "
            f"({error}); expected {given}({', '.join(SINGLE)}), or for the whole batch at once {given}({', '.join(BATCH)}); "
            f"mend the function, or set {key}.name=<another>"
        ) from error
    return LoadedFunction(function, is_batch, is_async)


def _module_from_file(path: Path, key: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"custom_reward_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(
            f"{key}.path: {path} is not a Python file; mend it with {key}.path=<file>.py {key}.name=<function in it>"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a function's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything while it is read
        raise ConfigError(
            f"{key}.path: {path} cannot be imported ({type(error).__name__}: {error}); mend the file, or give another"
        ) from error
    return module


def _module_by_name(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{key}.name: cannot import {name}: {error}; mend it with {key}.name=pkg.mod:fn, "
            f"or {key}.path=<file>.py {key}.name=<function in it>"
        ) from error
