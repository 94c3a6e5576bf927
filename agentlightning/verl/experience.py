"""What a step trains on: prompts are drawn, sampled, scored, and with dynamic sampling drawn again where they teach nothing.

Enters: a position in the stream of prompts. Leaves: `Experience`, with as many prompts as a batch has, and the position behind
the last prompt drawn, which is all that a resumed run needs to draw the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agentlightning.errors import RewardError
from agentlightning.types import Completion, JournalSpec, Prompt, SamplingParams
from agentlightning.verl.batching import informative_samples, overlong_penalties, truncated
from agentlightning.verl.data import PromptDataset, number_repeats
from agentlightning.verl.estimators import RewardDetails
from agentlightning.verl.rewards import RewardResult
from agentlightning.verl.schema import Config
from agentlightning.verl.tracking_samples import GenerationSample

Timer = Callable[[str], AbstractContextManager[None]]
Generate = Callable[[Sequence[Prompt], SamplingParams, JournalSpec | None], list[Completion]]
Score = Callable[[Sequence[Prompt], Sequence[Completion]], RewardResult]


@dataclass(frozen=True, slots=True)
class Experience:
    """The samples of one step, prompt by prompt."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    rewards: RewardResult
    score_B: np.ndarray  # float32; the rewards with what long answers cost
    left_out_B: np.ndarray  # bool; not to be trained on
    details: RewardDetails
    metrics: Mapping[str, float]
    position: int  # behind the last prompt that was drawn


@dataclass(frozen=True, slots=True)
class _Scored:
    """Whole groups: `n` completions of each prompt, with their rewards."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    rewards: RewardResult


class Collector:
    """Collects the experience of a step. `generate` and `score` are the trainer's: it knows the workers and who may stop it."""

    def __init__(self, config: Config, data: PromptDataset, generate: Generate, score: Score) -> None:
        self.config, self.data, self.generate, self.score = config, data, generate, score
        self.sampling = config.train_sampling()

    def collect(self, position: int, journal: JournalSpec | None, timer: Timer) -> Experience:
        """The experience of the step whose prompts begin at `position`."""
        scored, position, metrics, notes = self._groups(position, journal, timer)
        config, completions = self.config, scored.completions
        penalty_B = self._penalties(completions)
        greedy = self._greedy_rewards(scored.prompts, journal, timer) if config.algorithm.adv_estimator == "remax" else None
        left_out_B, scored_B = self._left_out(scored), ~scored.rewards.masked_B
        if greedy is not None:
            metrics["reward/greedy/mean"] = float(greedy.score_B.mean())
            notes = [*greedy.warnings, *notes]
            lacks_baseline_B = np.repeat(greedy.masked_B, self.sampling.n)
            left_out_B, scored_B = left_out_B | lacks_baseline_B, scored_B & ~lacks_baseline_B
        metrics |= _reward_metrics(scored.rewards, penalty_B if config.reward.overlong_buffer.enable else None)
        if left_out_B.any():
            metrics["training/samples_left_out"] = float(left_out_B.mean())
        return Experience(
            prompts=scored.prompts,
            completions=completions,
            rewards=replace(scored.rewards, warnings=tuple(dict.fromkeys([*scored.rewards.warnings, *notes]))),
            score_B=(scored.rewards.score_B + penalty_B).astype(np.float32),
            left_out_B=left_out_B,
            details=self._details(scored, penalty_B, scored_B, greedy),
            metrics=metrics,
            position=position,
        )

    def _groups(
        self, position: int, journal: JournalSpec | None, timer: Timer
    ) -> tuple[_Scored, int, dict[str, float], list[str]]:
        wanted, settings = self.config.data.train_batch_size, self.config.algorithm.filter_groups
        scored = self._draw([], position, wanted, journal, timer)
        drawn, rounds, position = list(scored.prompts), 1, position + wanted
        if not settings.enable:
            return scored, position, {}, []
        kept, dropped = self._split(scored, wanted)
        idle = len(dropped.prompts)  # prompts drawn since the last one that teaches something
        while len(kept.prompts) < wanted and rounds != settings.max_num_gen_batches and idle < max(len(self.data), wanted):
            missing = wanted - len(kept.prompts)
            # As many as it takes if prompts go on to teach as often as they did, and at most a batch, as verl draws.
            count = min(wanted, math.ceil(missing * len(drawn) / max(len(kept.prompts), 1)))
            scored = self._draw(drawn, position, count, journal, timer)
            more, waste = self._split(scored, missing)
            used = len(more.prompts) + len(waste.prompts)
            drawn, rounds, position = [*drawn, *scored.prompts[:used]], rounds + 1, position + used
            idle = 0 if more.prompts else idle + used
            kept, dropped = _joined([kept, more]), _joined([dropped, waste])
        missing = wanted - len(kept.prompts)
        metrics = {
            "training/num_gen_batches": float(rounds),
            "training/filtered_prompts": float(len(dropped.prompts) - missing),
        }
        notes: list[str] = []
        if missing:  # a batch of fewer prompts would change what a mini-batch is; these have no advantage in their group
            kept = _joined([kept, _rows(dropped, range(missing), self.sampling.n)])
            notes.append(
                f"{missing} of {wanted} prompts of this step are some whose samples all score alike, as "
                f"{len(dropped.prompts)} of {len(drawn)} drawn; see algorithm.filter_groups.max_num_gen_batches="
                f"{settings.max_num_gen_batches}"
            )
        return kept, position, metrics, notes

    def _draw(self, before: Sequence[Prompt], position: int, count: int, journal: JournalSpec | None, timer: Timer) -> _Scored:
        """`count` prompts from `position` on, sampled and scored; a row that was drawn `before` gets samples of its own."""
        prompts = number_repeats([*before, *self.data.prompts_at(position, count)])[len(before) :]
        with timer("gen"):
            completions = self.generate(prompts, self.sampling, journal)
        with timer("reward"):
            return _Scored(prompts, completions, self.score(prompts, completions))

    def _split(self, scored: _Scored, wanted: int) -> tuple[_Scored, _Scored]:
        """The first `wanted` prompts whose samples differ in the metric, and the others before the last of them. What comes
        behind it is in neither: the next step draws it again.

        Samples without a reward differ from nothing; nor is there anything to learn from a prompt of which no sample is trained
        on.
        """
        n = self.sampling.n
        metric_GN = _metric(scored, self.config.algorithm.filter_groups.metric).reshape(-1, n)
        masked_GN = scored.rewards.masked_B.reshape(-1, n)
        one_with_reward_G1 = np.take_along_axis(metric_GN, masked_GN.argmin(axis=1)[:, None], axis=1)
        metric_B = np.where(masked_GN, one_with_reward_G1, metric_GN).ravel()
        differs_G = informative_samples([completion.uid for completion in scored.completions], metric_B)[::n]
        differs_G &= ~self._left_out(scored).reshape(-1, n).all(axis=1)
        places = np.flatnonzero(differs_G)
        end = int(places[wanted - 1]) + 1 if len(places) >= wanted else len(differs_G)
        kept, dropped = places[:wanted], np.flatnonzero(~differs_G[:end])
        return _rows(scored, kept.tolist(), n), _rows(scored, dropped.tolist(), n)

    def _left_out(self, scored: _Scored) -> np.ndarray:
        """Which samples are not to be trained on: those without a reward, and with overlong filtering those that were cut."""
        cut_B = truncated(scored.completions) if self.config.algorithm.overlong_filtering else False
        return scored.rewards.masked_B | cut_B

    def _penalties(self, completions: Sequence[Completion]) -> np.ndarray:
        return overlong_penalties(completions, self.config.reward.overlong_buffer, self.config.data.max_response_length)

    def _details(
        self, scored: _Scored, penalty_B: np.ndarray, scored_B: np.ndarray, greedy: RewardResult | None
    ) -> RewardDetails:
        """What the estimators ask for beside the scores."""
        rewards, reward = scored.rewards, self.config.reward
        details = RewardDetails(scored_B=None if scored_B.all() else scored_B)
        if rewards.components:
            # The punishment of long answers is one more reward: gdpo looks at each of them, and not at their sum.
            punished = reward.overlong_buffer.enable
            weights = [*(reward.functions[name].weight for name in rewards.components), *([1.0] if punished else [])]
            details = replace(
                details,
                components_KB=np.stack([*rewards.components.values(), *([penalty_B] if punished else [])]),
                weights_K=np.array(weights, dtype=np.float32),
            )
        if greedy is not None:
            details = replace(details, baseline_B=np.repeat(greedy.score_B, self.sampling.n))
        return details

    def _greedy_rewards(self, prompts: Sequence[Prompt], journal: JournalSpec | None, timer: Timer) -> RewardResult:
        """Of the greedy answer to each prompt, whose score, with what a long answer costs, is ReMax's baseline."""
        with timer("gen"):
            answers = self.generate(prompts, replace(self.sampling, n=1, temperature=0.0), journal)
        with timer("reward"):
            rewards = self.score(prompts, answers)
        return replace(rewards, score_B=(rewards.score_B + self._penalties(answers)).astype(np.float32))


def generations(prompts: Sequence[Prompt], completions: Sequence[Completion], rewards: RewardResult) -> list[GenerationSample]:
    """Every completion as people read it."""
    by_uid = {prompt.uid: prompt for prompt in prompts}
    columns = {**rewards.components, **rewards.extra}
    return [
        GenerationSample(
            input=_text(by_uid[completion.uid].messages),
            output=_text(completion.turns),
            ground_truth=by_uid[completion.uid].ground_truth,
            score=float(rewards.score_B[i]),
            data_source=by_uid[completion.uid].data_source,
            extra={name: float(values[i]) for name, values in columns.items()},
        )
        for i, completion in enumerate(completions)
    ]


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    """One message as it is, several with their roles before them."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _metric(scored: _Scored, name: str) -> np.ndarray:
    """The number by which dynamic sampling compares a prompt's samples, [B]; 0 for a sample without a reward."""
    rewards = scored.rewards
    if name == "score" or rewards.failed_B.all():  # then nothing else was reported
        return rewards.score_B
    known: dict[str, Any] = {**rewards.components, **rewards.extra}
    if name not in known:
        raise RewardError(
            f"algorithm.filter_groups.metric: given {name!r}, which the reward function does not report for every sample; it "
            f"reports {', '.join(known) or 'nothing beside the score'}; mend it with algorithm.filter_groups.metric=score"
        )
    metric_B = np.asarray(known[name], dtype=np.float32)
    for completion, value in zip(scored.completions, metric_B, strict=True):
        if not np.isfinite(value):
            raise RewardError(
                f"the reward function reported {name}={value} for sample {completion.sample_index} of {completion.uid}, by "
                "which prompts are compared; mend the function, or set algorithm.filter_groups.metric=score"
            )
    return metric_B


def _reward_metrics(rewards: RewardResult, penalty_B: np.ndarray | None) -> dict[str, float]:
    metrics = {f"reward/{name}/mean": float(np.mean(values)) for name, values in rewards.extra.items()}
    metrics |= {f"reward/{name}/mean": float(np.mean(values)) for name, values in rewards.components.items()}
    if rewards.failed_B.any():
        metrics["reward/failed"] = float(rewards.failed_B.mean())
    if penalty_B is not None:
        metrics["reward/overlong/mean"] = float(penalty_B.mean())
        metrics["reward/overlong/share"] = float((penalty_B < 0).mean())
    return metrics


def _rows(scored: _Scored, groups: Iterable[int], n: int) -> _Scored:
    """The groups with these numbers, in that order."""
    groups = list(groups)
    rows = [group * n + i for group in groups for i in range(n)]
    rewards = scored.rewards
    return _Scored(
        [scored.prompts[group] for group in groups],
        [scored.completions[row] for row in rows],
        RewardResult(
            score_B=rewards.score_B[rows],
            extra={name: [values[row] for row in rows] for name, values in rewards.extra.items()},
            components={name: values[rows] for name, values in rewards.components.items()},
            failed_B=rewards.failed_B[rows],
            masked_B=rewards.masked_B[rows],
            warnings=rewards.warnings,
        ),
    )


def _joined(parts: Sequence[_Scored]) -> _Scored:
    """All groups behind each other; of the further numbers those that every part has."""
    parts = [part for part in parts if part.prompts] or list(parts[:1])
    rewards = [part.rewards for part in parts]
    shared = [name for name in rewards[0].extra if all(name in one.extra for one in rewards)]
    return _Scored(
        [prompt for part in parts for prompt in part.prompts],
        [completion for part in parts for completion in part.completions],
        RewardResult(
            score_B=np.concatenate([one.score_B for one in rewards]),
            extra={name: [value for one in rewards for value in one.extra[name]] for name in shared},
            components={name: np.concatenate([one.components[name] for one in rewards]) for name in rewards[0].components},
            failed_B=np.concatenate([one.failed_B for one in rewards]),
            masked_B=np.concatenate([one.masked_B for one in rewards]),
            warnings=tuple(dict.fromkeys(warning for one in rewards for warning in one.warnings)),
        ),
    )
