"""Rewards: every completion of a step is scored, by one function or by several, wherever they run.

`custom_reward_function`, or `reward.functions` in its place, and completions go in; one finite float32 score a sample comes
out, with whatever else the functions reported. What a function does wrong names the sample, and ends the step here, before any
weight changes, unless `reward.on_error` says that the sample goes without. Where a function runs follows from its form:

    def                          in this process, one sample after the other
    def, with reward.timeout_s   in reward.num_workers processes that can be killed    reward_pool.py, reward_worker.py
    async def                    reward.num_workers at a time on one event loop        reward_loop.py
    http://host:port/path        the same, a request for several samples               reward_remote.py
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from agentlightning.errors import RewardError
from agentlightning.types import Completion, Prompt
from agentlightning.verl.reward_functions import (
    Answer,
    CallError,
    LoadedFunction,
    Outcome,
    Sample,
    checked_answer,
    load_function,
    recognised,
)
from agentlightning.verl.reward_loop import ConcurrentCalls
from agentlightning.verl.reward_pool import WorkerPool
from agentlightning.verl.schema import Config, RewardConfig, RewardFunctionConfig

RewardFunction = Callable[..., Any]  # verl's: (data_source, solution_str, ground_truth, extra_info)
KEY = "custom_reward_function"
URL = re.compile(r"^https?://")
_SLOW_S = 5.0  # a step's rewards that take longer are worth a hint


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The scores of B samples, in the order of the completions."""

    score_B: np.ndarray  # float32
    extra: Mapping[str, Sequence[float]]  # further numbers reported for every sample: name -> [B]; 0 where there is no reward
    components: Mapping[str, np.ndarray]  # of reward.functions: name -> float32 [B], before its weight; empty for one function
    failed_B: np.ndarray  # bool: no reward was to be had, the score is 0
    masked_B: np.ndarray  # bool: those of them that reward.on_error=mask takes out of the loss
    warnings: tuple[str, ...]  # to be shown once, after the step


class Caller(Protocol):
    """Where a reward function runs."""

    def outcomes(self, samples: Sequence[Sample], check: Callable[[], None]) -> Iterator[tuple[int, Outcome]]:
        """(index, outcome) for each sample, in any order. `check` is called often; what it raises ends the calls."""
        ...

    def close(self) -> None:
        """End its threads and processes."""
        ...


class InProcess:
    """Calls in this thread, one after the other."""

    def __init__(self, function: LoadedFunction, retries: int = 0) -> None:
        self._function, self._retries = function, retries

    def outcomes(self, samples: Sequence[Sample], check: Callable[[], None]) -> Iterator[tuple[int, Outcome]]:
        """(index, outcome) in order."""
        if self._function.is_batch:
            check()
            yield from enumerate(self._call(samples) if samples else ())
            return
        for index, sample in enumerate(samples):
            check()
            yield index, self._call([sample])[0]

    def close(self) -> None:
        """Nothing was started."""

    def _call(self, samples: Sequence[Sample]) -> list[Outcome]:
        for _ in range(self._retries):
            with contextlib.suppress(CallError):
                return self._function(samples)
        try:
            return self._function(samples)
        except CallError as error:
            return [error] * len(samples)


@dataclass(frozen=True, slots=True)
class _Source:
    """One reward function."""

    name: str | None  # in reward.functions
    label: str  # how messages name it
    weight: float
    caller: Caller


class Rewards:
    """The reward functions of a run: made once, closed at its end.

    Example: `with Rewards.from_config(config) as rewards: rewards.score(prompts, completions, stop.check).score_B`.
    """

    def __init__(
        self, sources: Sequence[_Source], on_error: Literal["stop", "zero", "mask"] = "stop", num_workers: int = 1
    ) -> None:
        self._sources, self._on_error, self._num_workers = sources, on_error, num_workers
        self._hinted = False

    @classmethod
    def from_config(cls, config: Config) -> Rewards:
        """Find and check every function, and start the processes that some need. Raises `ConfigError`."""
        reward = config.reward
        if not reward.functions:
            caller = _caller(config.custom_reward_function, KEY, reward)()
            return cls([_Source(None, "the reward function", 1.0, caller)], reward.on_error, reward.num_workers)
        # All are found before the first process starts.
        makers = {name: _caller(one, f"reward.functions.{name}", reward) for name, one in reward.functions.items()}
        sources = [
            _Source(name, f"the reward function {name}", reward.functions[name].weight, make()) for name, make in makers.items()
        ]
        return cls(sources, reward.on_error, reward.num_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all threads and processes; may be called again."""
        for source in self._sources:
            source.caller.close()

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        check: Callable[[], None] = lambda: None,
    ) -> RewardResult:
        """Score each completion, with the last assistant turn as `solution_str`; `check` is called at least every 0.05 s.

        (A function in this process is not interrupted by `check`, only by what a signal handler raises.) `extra_info` is the
        row's, with `num_turns` and `messages` (the prompt's and the completion's) added. Raises `RewardError` with the sample's
        uid for the first sample without a reward if `reward.on_error=stop`.
        """
        samples = _samples(prompts, completions)
        failures: dict[int, str] = {}
        hints: list[str] = []
        answers = [self._answers(source, samples, check, failures, hints) for source in self._sources]
        totals = answers[0] if self._sources[0].name is None else self._sums(answers, samples, failures)
        failed_B = np.zeros(len(samples), dtype=bool)
        failed_B[list(failures)] = True
        return RewardResult(
            score_B=np.where(failed_B, 0.0, [answer.score for answer in totals]).astype(np.float32),
            extra=self._extra(answers, failed_B),
            components={
                source.name: np.array([answer.score for answer in answered], dtype=np.float32)
                for source, answered in zip(self._sources, answers, strict=True)
                if source.name is not None
            },
            failed_B=failed_B,
            masked_B=failed_B if self._on_error == "mask" else np.zeros_like(failed_B),
            warnings=(*self._about(failures, len(samples)), *hints),
        )

    def _answers(
        self,
        source: _Source,
        samples: Sequence[Sample],
        check: Callable[[], None],
        failures: dict[int, str],
        hints: list[str],
    ) -> list[Answer]:
        """What one function says of each sample, 0 for those that it fails on; these are added to `failures`."""
        nothing = Answer(0.0, {})
        answers = [nothing] * len(samples)
        began = time.monotonic()
        with _closing(source.caller.outcomes(samples, check)) as outcomes:
            for index, outcome in _labelled(outcomes, source.label):
                if isinstance(outcome, Answer):
                    answers[index] = outcome
                else:
                    self._note_failure(index, f"{source.label} {outcome}", outcome.__cause__, failures)
        seconds = time.monotonic() - began
        if isinstance(source.caller, InProcess) and seconds > _SLOW_S and self._num_workers > 1 and not self._hinted:
            self._hinted = True
            hints.append(
                f"{source.label} took {seconds:.1f} s, one sample after the other; with reward.timeout_s=60 (say) it is called "
                f"in reward.num_workers={self._num_workers} processes"
            )
        return answers

    def _note_failure(self, index: int, text: str, cause: BaseException | None, failures: dict[int, str]) -> None:
        if self._on_error == "stop":
            raise RewardError(
                f"{text}; mend the function, or go on without such samples: reward.on_error=zero (they score 0) or "
                "reward.on_error=mask (they are not trained on)"
            ) from cause
        failures.setdefault(index, text)

    def _sums(self, answers: Sequence[Sequence[Answer]], samples: Sequence[Sample], failures: dict[int, str]) -> list[Answer]:
        """The weighted sum of the functions' scores for each sample."""
        totals: list[Answer] = []
        for index, parts in enumerate(zip(*answers, strict=True)):
            total = sum(source.weight * part.score for source, part in zip(self._sources, parts, strict=True))
            outcome = checked_answer(total, samples[index])
            if not isinstance(outcome, Answer):
                self._note_failure(index, f"the weighted sum of reward.functions {outcome}", None, failures)
                outcome = Answer(0.0, {})
            totals.append(outcome)
        return totals

    def _extra(self, answers: Sequence[Sequence[Answer]], failed_B: np.ndarray) -> dict[str, list[float]]:
        """The numbers that every sample with a reward has, under the function's name if there are several functions."""
        extra: dict[str, list[float]] = {}
        for source, answered in zip(self._sources, answers, strict=True):
            good = [answer for answer, failed in zip(answered, failed_B, strict=True) if not failed]
            shared = [name for name in good[0].extra if all(name in answer.extra for answer in good)] if good else []
            for name in shared:
                full_name = name if source.name is None else f"{source.name}/{name}"
                extra[full_name] = [
                    0.0 if failed else answer.extra[name] for answer, failed in zip(answered, failed_B, strict=True)
                ]
        return extra

    def _about(self, failures: Mapping[int, str], count: int) -> Iterator[str]:
        if failures:
            first = failures[min(failures)]
            yield f"{len(failures)} of {count} samples have no reward (reward.on_error={self._on_error}); the first: {first}"


@contextlib.contextmanager
def _closing(outcomes: Iterator[tuple[int, Outcome]]) -> Iterator[Iterator[tuple[int, Outcome]]]:
    """Generators end what they wait for when they are closed, not when they are forgotten."""
    try:
        yield outcomes
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()


def _labelled(outcomes: Iterator[tuple[int, Outcome]], label: str) -> Iterator[tuple[int, Outcome]]:
    """The same; an error that concerns no single sample says whose it is."""
    try:
        yield from outcomes
    except RewardError as error:
        raise RewardError(f"{label} {error}") from error.__cause__


def _samples(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Sample]:
    by_uid = {prompt.uid: prompt for prompt in prompts}
    return [_sample(by_uid[completion.uid], completion) for completion in completions]


def _sample(prompt: Prompt, completion: Completion) -> Sample:
    return Sample(
        name=f"sample {completion.sample_index} of {completion.uid}",
        arguments={
            "data_source": prompt.data_source,
            "solution_str": completion.answer,
            "ground_truth": prompt.ground_truth,
            "extra_info": {
                **prompt.extra_info,
                "num_turns": completion.num_turns,
                "messages": [*prompt.messages, *completion.turns],
            },
        },
    )


def _caller(function: RewardFunctionConfig, key: str, reward: RewardConfig) -> Callable[[], Caller]:
    """How to make the `Caller` that fits. Raises `ConfigError` if the function is not there or cannot be called."""
    if URL.match(function.name):
        from agentlightning.verl import reward_remote as remote

        server = remote.RewardServer(function.name, key)
        return lambda: ConcurrentCalls(
            server.score,
            samples_per_call=remote.SAMPLES_PER_REQUEST,
            num_workers=reward.num_workers,
            timeout_s=reward.timeout_s or remote.TIMEOUT_S,
            timeout_per_sample=False,
            retries=reward.retries,
            backoff_s=remote.BACKOFF_S,
            last=server.close,
        )
    loaded = load_function(function.path, function.name, key)
    if loaded.is_async:
        return lambda: ConcurrentCalls(
            loaded.call_async,
            samples_per_call=None if loaded.is_batch else 1,
            num_workers=reward.num_workers,
            timeout_s=reward.timeout_s,
            retries=reward.retries,
        )
    timeout_s = reward.timeout_s
    if timeout_s is None:
        return lambda: InProcess(loaded, reward.retries)
    return lambda: WorkerPool(
        function.path,
        function.name,
        key,
        batch=loaded.is_batch,
        num_workers=reward.num_workers,
        timeout_s=timeout_s,
        retries=reward.retries,
    )


def load_reward(config: RewardFunctionConfig) -> RewardFunction:
    """The function that `custom_reward_function` names. Raises `ConfigError` if it is not there."""
    return load_function(config.path, config.name, KEY).function


def score(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    check: Callable[[], None] = lambda: None,
) -> RewardResult:
    """Score each completion by `function`, a `def` called in this process, as `Rewards.score` does."""
    source = _Source(None, "the reward function", 1.0, InProcess(recognised(function, KEY)))
    return Rewards([source]).score(prompts, completions, check)
