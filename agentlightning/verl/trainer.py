"""The step, on one page: prompts, rollouts, rewards, log-probabilities, advantages, updates, checkpoint.

Enters: a checked `Config`. Leaves: a run directory with a curve that climbed. The controller runs in this process, so
signals, exit codes and breakpoints reach it; the workers do the arithmetic.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from agentlightning.algorithms.kl import AdaptiveKLController, FixedKLController
from agentlightning.checkpoint.lease import LeaseLostError
from agentlightning.checkpoint.manager import METRICS, CheckpointManager
from agentlightning.checkpoint.preemption import Preemption
from agentlightning.checkpoint.retention import name_of
from agentlightning.checkpoint.store import CheckpointFiles, LoadedCheckpoint, PartWriter
from agentlightning.checkpoint.writer import Outcome
from agentlightning.errors import CheckpointError, NumericsError, WorkerError
from agentlightning.types import Batch, Completion, JournalSpec, Prompt, SamplingParams
from agentlightning.verl.batching import (
    KLController,
    MiniBatchPlan,
    make_batch,
    rollout_probs_diff,
    with_advantages,
    with_rollout_correction,
    without_samples,
)
from agentlightning.verl.console import Console, StartInfo, core_validation
from agentlightning.verl.data import PromptDataset, batches
from agentlightning.verl.experience import Collector, Experience, generations
from agentlightning.verl.journals import StepJournals
from agentlightning.verl.metrics import (
    ATTEMPT,
    SCORE,
    VAL_CORE,
    compute_data_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_validation_metrics,
    tokens_of_phase,
)
from agentlightning.verl.rewards import RewardResult, Rewards
from agentlightning.verl.run_client import RunClient
from agentlightning.verl.schema import AlgorithmConfig, Config
from agentlightning.verl.state import TrainerState, checkpoint_files, trainer_state
from agentlightning.verl.tracking import Tracking
from agentlightning.verl.tracking_samples import GenerationSample, choose_samples
from agentlightning.workers.group import WorkerGroup

_SLOW_DISK = 50e6  # bytes a second that a save is expected to take before one was measured


class AgentLightningTrainer:
    """PPO and its relatives over a worker group. `fit` does everything; `_step` reads like the list of timers it fills."""

    def __init__(
        self,
        config: Config,
        *,
        group: WorkerGroup,
        train_data: PromptDataset,
        val_prompts: Sequence[Prompt],
        rewards: Rewards,
        checkpoints: CheckpointManager,
        loaded: LoadedCheckpoint | None,
        tracking: Tracking,
        console: Console,
        total_steps: int,
        fingerprint: Mapping[str, Any],
        facts: Sequence[str],
        stop: Preemption,
    ) -> None:
        self.config, self.group, self.rewards = config, group, rewards
        self.train_data, self.val_prompts = train_data, val_prompts
        self.checkpoints, self.resume_info = checkpoints, loaded
        self.training_client = RunClient(group, checkpoints, loaded, config.uses_critic)
        self.tracking, self.console = tracking, console
        self.total_steps, self.fingerprint, self.facts, self.stop = total_steps, fingerprint, facts, stop
        self.adapter_configs = group.adapter_configs()
        self.shown_interval = 0
        self.journals = StepJournals(checkpoints.root, config.actor_rollout_ref.rollout.journal, fingerprint["breaking"])
        self.state = TrainerState()
        self.kl_controller = _kl_controller(config.algorithm)
        rollout, actor, critic = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor, config.critic
        longest = float(config.data.max_response_length)
        self.actor_plan = MiniBatchPlan(actor.ppo_mini_batch_size, rollout.n, actor.ppo_epochs, actor.shuffle, longest)
        self.critic_plan = MiniBatchPlan(critic.ppo_mini_batch_size, rollout.n, critic.ppo_epochs, actor.shuffle, longest)
        one_update = actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == config.data.train_batch_size
        # With a single optimizer step the policy that is updated is the one that sampled: its pass gives the old log-probs.
        bypass = config.algorithm.rollout_correction.bypass_mode
        self.needs_old_log_prob = not bypass and (not one_update or asks_for_old_log_prob(config.algorithm))
        self.collector = Collector(config, train_data, self._generate, self._score)

    def fit(self) -> None:
        """Train from the last checkpoint, or from the start, to the last step."""
        self._load_checkpoint()
        if self.state.global_step == 0 and self.config.trainer.val_before_train and self.val_prompts:
            before = self._validate(0, {})
            self.tracking.log(0, before)
            self.console.note(f"before training: validation {core_validation(before)}")
        self._announce()
        while self.state.global_step < self.total_steps:
            self.stop.check()
            self._step(self.state.global_step + 1)
        self._finish_saving()

    def validate_only(self) -> None:
        """What `trainer.val_only` is for: the figures under the adapter that was found, and nothing in the run changed."""
        if self.resume_info is not None:
            self._load_state(self.resume_info)
        step = self.state.global_step
        self.console.note(f"validation at step {step}: {core_validation(self._validate(step, {}))}")

    def leave(self) -> int:
        """Make the state after the last finished step durable, however far the present one is; returns that step.

        That state lies in a host buffer, so nothing has to be waited for. Raises `CheckpointError` if it cannot be saved.
        """
        self._hear_of_saves(self.checkpoints.drain())
        finished = self.training_client.snapshot
        if finished is not None and not self.checkpoints.is_safe(finished.step):
            self._save_checkpoint(finished.step)
            self._finish_saving()
        durable = self.checkpoints.last or self.resume_info
        self.state.global_step = durable.step if durable is not None else 0
        return self.state.global_step

    def settle(self) -> None:
        """Hear of the saves in flight when workers died, and of those that died with them."""
        self.training_client.snapshot = None  # what it stands for is gone
        while True:
            try:
                self._hear_of_saves(self.checkpoints.drain())
                return
            except WorkerError as error:
                self.console.warning(str(error))

    def restart(self, group: WorkerGroup, loaded: LoadedCheckpoint | None) -> None:
        """Take over workers that know nothing yet; `fit` then goes on from `loaded`, or from the start."""
        self.group, self.resume_info = group, loaded
        self.training_client = RunClient(group, self.checkpoints, loaded, self.config.uses_critic)
        self.state = TrainerState()
        self.kl_controller = _kl_controller(self.config.algorithm)
        self.tracking.attempt += 1

    def _finish_saving(self) -> None:
        self._hear_of_saves(self.checkpoints.drain())
        finished = self.training_client.snapshot
        if self.checkpoints.failed is not None and finished is not None:  # no next step will try it again
            self._save_checkpoint(finished.step)
            self._hear_of_saves(self.checkpoints.drain())
        if self.checkpoints.failed is not None:
            raise CheckpointError(f"the last checkpoint could not be saved: {self.checkpoints.failed}")

    def _announce(self) -> None:
        past = [float(line[SCORE]) for line in self.tracking.history if SCORE in line]
        self.console.start(
            StartInfo(
                title=self.tracking.title,
                first_step=self.state.global_step + 1,
                total_steps=self.total_steps,
                lines=self.facts,
                phases=self._phases(),
                past_scores=past,
            )
        )

    def _phases(self) -> list[str]:
        """The timers of a step, in order."""
        reference = ["ref"] if self.config.uses_reference else []
        critic = self.config.uses_critic
        before = ["gen", "reward", "old_log_prob", *reference, *(["values"] if critic else []), "adv"]
        return [*before, *(["update_critic"] if critic else []), "update_actor", "update_weights", "testing", "save_checkpoint"]

    def _step(self, step: int) -> None:
        """One batch: sample, score, learn, and keep what was learned."""
        timing_raw: dict[str, float] = {}
        metrics: dict[str, Any] = {}
        start = self._position(step)
        with self._timer("step", timing_raw):
            experience = self.collector.collect(start, self.journals.of_step(step), lambda name: self._timer(name, timing_raw))
            batch = make_batch(experience.prompts, experience.completions, experience.score_B)
            batch = without_samples(batch, experience.left_out_B)
            with self._timer("old_log_prob", timing_raw):
                batch = self._with_old_log_probs(batch, metrics)
            if self.config.uses_reference:
                with self._timer("ref", timing_raw):
                    batch = batch.with_columns(ref_log_prob=self.group.compute_ref_log_prob(batch).log_probs_BT)
            if self.config.uses_critic:
                with self._timer("values", timing_raw):
                    batch = batch.with_columns(values=self.group.compute_values(batch))
            with self._timer("adv", timing_raw):
                batch, kl_metrics = with_advantages(batch, self.config.algorithm, self.kl_controller, experience.details)
                _check_finite(batch)
            if self.config.uses_critic:
                with self._timer("update_critic", timing_raw):
                    plan = self.critic_plan.mini_batches(batch, self.config.data.seed, step)
                    metrics |= _prefixed("critic", self.group.update_critic(batch, plan, step))
            if step > self.config.trainer.critic_warmup:
                with self._timer("update_actor", timing_raw):
                    metrics |= self._update_actor(batch, step)
            with self._timer("update_weights", timing_raw):
                device_gb, host_gb = self.group.update_weights(step)
        metrics |= {"perf/max_memory_allocated_gb": device_gb, "perf/cpu_memory_used_gb": host_gb}
        self.state.global_step, self.state.position = step, experience.position
        self.state.tokens_seen += int(batch.total_len_B.sum())
        metrics |= {**kl_metrics, **experience.metrics, "training/epoch": self._epoch(start)}
        for warning in experience.rewards.warnings:
            self.console.warning(warning)
        self._finish_step(step, batch, experience, metrics, timing_raw)
        self._show_rollout(step, experience)

    def _position(self, step: int) -> int:
        """Where in the stream of prompts the step begins: dynamic sampling may have drawn more than a batch a step."""
        return max(self.state.position, (step - 1) * self.config.data.train_batch_size)

    def _epoch(self, position: int) -> int:
        return self.train_data.epoch_of(position // self.config.data.train_batch_size + 1)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams, journal: JournalSpec | None) -> list[Completion]:
        version = self.state.global_step
        step = version + 1
        completions = self.group.generate(
            prompts, sampling, seed=self.config.trainer.seed, step=step, version=version, journal=journal
        )
        reused = sum(completion.from_journal for completion in completions)
        if reused:
            self.console.note(f"step {step}: {reused} of {len(completions)} rollouts were finished before, and are used again")
        return completions

    def _score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardResult:
        with self.stop.interrupting():
            return self.rewards.score(prompts, completions, self.stop.check)

    def _with_old_log_probs(self, batch: Batch, metrics: dict[str, Any]) -> Batch:
        algorithm = self.config.algorithm
        if algorithm.rollout_correction.bypass_mode:
            return batch.with_columns(old_log_probs=batch.columns["rollout_log_probs"])
        if not self.needs_old_log_prob:
            return batch
        old = self.group.compute_log_prob(batch, algorithm.adv_estimator == "optimal_token_baseline")
        metrics["actor/entropy"] = old.entropy_sum / max(old.tokens, 1)
        metrics |= rollout_probs_diff(batch, old.log_probs_BT)
        if old.sum_pi_squared_BT is not None:
            batch = batch.with_columns(sum_pi_squared=old.sum_pi_squared_BT)
        batch, corrected = with_rollout_correction(batch.with_columns(old_log_probs=old.log_probs_BT), algorithm)
        metrics |= corrected
        return batch

    def _update_actor(self, batch: Batch, step: int) -> dict[str, float]:
        plan = self.actor_plan.mini_batches(batch, self.config.data.seed, step)
        update, log_probs_BT = self.group.update_actor(batch, plan, step)
        entropy, actor = update.pop("entropy"), self.config.actor_rollout_ref.actor
        update.setdefault("pg_loss", 0.0)  # where no sample has an advantage, no pass is run
        if actor.use_kl_loss:
            update["kl_coef"] = actor.kl_loss_coef
        if self.needs_old_log_prob:  # measured over all samples before the update
            return _prefixed("actor", update)
        return _prefixed("actor", update) | {"actor/entropy": entropy} | rollout_probs_diff(batch, log_probs_BT)

    def _finish_step(
        self, step: int, batch: Batch, experience: Experience, metrics: dict[str, Any], timing_raw: dict[str, float]
    ) -> None:
        """Validate and save if it is time, and write the step's line."""
        trainer, is_last = self.config.trainer, step == self.total_steps
        if self.val_prompts and trainer.test_freq > 0 and (is_last or step % trainer.test_freq == 0):
            metrics |= self._validate(step, timing_raw)
        metrics |= compute_data_metrics(
            batch,
            num_turns_B=np.array([completion.num_turns for completion in experience.completions]),
            max_prompt_length=self.config.data.max_prompt_length,
            max_response_length=self.config.data.max_response_length,
        )
        metrics |= compute_throughput_metrics(batch, timing_raw["step"], self.group.world_size)
        metrics["training/global_step"] = step
        tokens = tokens_of_phase(batch)
        metrics |= compute_timing_metrics(timing_raw, tokens)
        if self.config.trainer.rollout_data_dir is not None:
            self.tracking.log_rollouts(step, generations(experience.prompts, experience.completions, experience.rewards))
        self._keep(step, is_last, metrics, timing_raw)
        self.tracking.log(step, metrics)
        if self.tracking.trouble is not None:
            self.console.warning(self.tracking.trouble)
        for phase, count in tokens.items():
            if phase in timing_raw:
                self.console.tokens(phase, count, timing_raw[phase])
        self.console.step_done(step, metrics)

    def _validate(self, step: int, timing_raw: dict[str, float]) -> dict[str, float]:
        """Metrics of the validation set under the present adapter; keeps the best score."""
        with self._timer("testing", timing_raw):
            params = self.config.val_sampling()
            completions: list[Completion] = []
            scores: list[np.ndarray] = []
            extra: dict[str, list[float]] = {}
            warnings: dict[str, None] = {}  # in order, each once
            shown: list[GenerationSample] = []
            for prompts in batches(self.val_prompts, self.config.data.val_batch_size):
                answered = self.group.generate(prompts, params, seed=self.config.trainer.seed, step=step, version=step)
                rewards = self._score(prompts, answered)
                completions += answered
                scores.append(rewards.score_B)
                warnings |= dict.fromkeys(rewards.warnings)
                for name, values in (*rewards.components.items(), *rewards.extra.items()):
                    extra.setdefault(name, []).extend(float(value) for value in values)
                if self.config.trainer.log_val_generations:
                    shown += generations(prompts, answered, rewards)
            source_of = {prompt.uid: prompt.data_source for prompt in self.val_prompts}
            scores_B = np.concatenate(scores)
            extra = {name: values for name, values in extra.items() if len(values) == len(scores_B)}
            metrics = compute_validation_metrics(
                [source_of[completion.uid] for completion in completions], completions, scores_B, extra
            )
        for warning in warnings:
            self.console.warning(f"validation: {warning}")
        if shown:
            rows = choose_samples(self.config.trainer.log_val_generations, len(shown), self.config.trainer.seed)
            self.tracking.log_val_generations(step, [shown[row] for row in rows])
        mean = float(scores_B.mean())
        if mean > self.state.best.get("score", -np.inf):
            self.state.best = {"score": mean, "step": step}
        return metrics

    def _load_checkpoint(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        resume_info = self.resume_info
        if resume_info is None:
            self.tracking.resume(0)
            return
        self._load_state(resume_info)
        dropped = self.tracking.resume(self.state.global_step, self.state.metrics)
        again = f"; {dropped} later steps are done again" if dropped else ""
        done = f"{self.state.global_step} of {self.total_steps} steps are done"
        self.console.note(f"resumed from {resume_info.path}: {done}{again}")

    def _load_state(self, resume_info: LoadedCheckpoint) -> None:
        self.training_client.load_state(str(resume_info.path)).result()
        self.state = trainer_state(resume_info)
        self.kl_controller.load_state_dict(self.state.kl_ctrl)

    def _save_checkpoint(self, step: int) -> None:
        """Have the snapshot of `step` written behind what comes next, and its record after it; `_hear_of_saves` tells."""
        self.training_client.save_state(name_of(step))

    def _keep(self, step: int, is_last: bool, metrics: dict[str, Any], timing_raw: dict[str, float]) -> None:
        """Copy the state after `step` into a host buffer, and have it written if it is time.

        The copy is made whether it is time or not: whoever is told to leave in the middle of the next step can save this one.
        """
        self._hear_of_saves(self.checkpoints.collect())
        durable = self.checkpoints.last or self.resume_info
        self.journals.forget(durable.step if durable is not None else 0, step)
        saving = self.checkpoints.should_save(step, is_last)
        timer = "save_checkpoint" if saving else "snapshot"
        with self._timer(timer, timing_raw):
            buffer = self.checkpoints.free_buffer()
            copied = time.perf_counter()
            with self.stop.deferred():
                files_with = partial(self._checkpoint_files, step, metrics)
                self.stop.expect_save(self.training_client.take_snapshot(step, buffer, files_with) / _SLOW_DISK)
            if saving:
                self._save_checkpoint(step)
        blocked_s = time.perf_counter() - copied
        self.checkpoints.observe(timing_raw["step"], blocked_s if saving else None)
        metrics |= compute_timing_metrics({timer: timing_raw[timer]}, {}) | {"checkpoint/age_s": self.checkpoints.age_s}
        if saving:
            metrics["checkpoint/blocked_s"] = timing_raw[timer]
        last = self.checkpoints.last
        if last is not None:
            metrics |= {"checkpoint/bytes": last.bytes, "checkpoint/write_s": last.seconds}
        choice = self.checkpoints.choice
        if choice is not None and choice.steps != self.shown_interval:
            self.shown_interval = choice.steps
            self.console.note(choice.why)

    def _checkpoint_files(self, step: int, metrics: Mapping[str, Any], parts: PartWriter) -> CheckpointFiles:
        self.state.kl_ctrl = dict(self.kl_controller.state_dict())
        self.state.wandb_run_id, self.state.mlflow_run_id = self.tracking.wandb_run_id, self.tracking.mlflow_run_id
        self.state.metrics = {ATTEMPT: self.tracking.attempt, **metrics}
        wanted = (self.config.trainer.keep_best_by or "").removeprefix("-")
        extra = {
            "epoch": metrics["training/epoch"],
            "attempt": self.tracking.attempt,
            METRICS: {
                name: float(value)
                for name, value in metrics.items()
                if name == wanted or (name.startswith(VAL_CORE) and "/mean@" in name)
            },
        }
        return checkpoint_files(parts, self.adapter_configs, self.state, self.fingerprint, extra)

    def _hear_of_saves(self, outcomes: Sequence[Outcome]) -> None:
        """Tell what became of earlier saves. Only a lost lease ends the run: another one has the directory."""
        for outcome in outcomes:
            if outcome.saved is not None:
                for note in outcome.saved.notes:
                    self.console.warning(note)
                self.console.checkpoint(outcome.saved.path, outcome.saved.seconds)
                self.stop.expect_save(outcome.saved.seconds)
            elif isinstance(outcome.error, LeaseLostError):
                raise outcome.error
            else:
                # The checkpoints before are untouched, and the next step tries again: no reason to lose the run.
                self.console.warning(str(outcome.error))

    def _show_rollout(self, step: int, experience: Experience) -> None:
        every, completions = self.config.trainer.log_rollout_freq, experience.completions
        if every and (step == 1 or step % every == 0):
            longest = max(range(len(completions)), key=lambda i: completions[i].num_turns)
            by_uid = {prompt.uid: prompt for prompt in experience.prompts}
            score = float(experience.score_B[longest])
            self.console.rollout(by_uid[completions[longest].uid], completions[longest], score)

    @contextlib.contextmanager
    def _timer(self, name: str, timing_raw: dict[str, float]) -> Iterator[None]:
        """Add the seconds of the block to `timing_raw[name]`, and tell the console which phase runs."""
        self.console.phase(name)
        start = time.perf_counter()
        yield
        timing_raw[name] = timing_raw.get(name, 0.0) + time.perf_counter() - start


def asks_for_old_log_prob(algorithm: AlgorithmConfig) -> bool:
    """Whether something beside the ratio needs the log-probabilities before the update."""
    correction = algorithm.rollout_correction
    return (
        algorithm.use_kl_in_reward
        or algorithm.adv_estimator == "optimal_token_baseline"
        or correction.rollout_is is not None
        or correction.rollout_rs is not None
    )


def _kl_controller(config: AlgorithmConfig) -> KLController:
    kl = config.kl_ctrl
    if kl.type == "fixed":
        return FixedKLController(kl.kl_coef)
    return AdaptiveKLController(kl.kl_coef, kl.target_kl, kl.horizon)


def _prefixed(section: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{section}/{name}": value for name, value in metrics.items()}


def _check_finite(batch: Batch) -> None:
    """Stop before the update if anything it is made of is NaN or infinite."""
    for name, column_BT in batch.columns.items():
        if np.isfinite(column_BT).all():
            continue
        bad_B = ~np.isfinite(np.where(batch.mask_BT, column_BT, 0.0)).all(axis=1)
        if bad_B.any():
            uid = batch.uids[int(np.flatnonzero(bad_B)[0])]
            raise NumericsError(
                f"NaN or inf in {name} of {int(bad_B.sum())} of {len(batch)} samples, first of prompt {uid!r}; no "
                "weight was changed"
            )
