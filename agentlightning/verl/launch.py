"""A run from its configuration to its end: everything the trainer stands on is made here, and taken down again.

Enters: a checked `Config`. Leaves: an exit code. What can be wrong is found before training starts; Ray comes up while torch,
the tokenizer and the data load.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import yaml

from agentlightning.checkpoint.files import replace_file
from agentlightning.checkpoint.history import Ending
from agentlightning.checkpoint.lease import LEASE_FILE
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.preemption import EXIT_CODE, SIGNALS, Preempted, Preemption
from agentlightning.checkpoint.remote import is_url, mask
from agentlightning.checkpoint.store import LoadedCheckpoint
from agentlightning.errors import AgentLightningError, WorkerError
from agentlightning.types import Prompt
from agentlightning.verl.assembly import Placement, load_workers, place_workers, place_workers_again
from agentlightning.verl.console import Console, Summary, core_validation, make_console
from agentlightning.verl.data import PromptDataset, load_prompts
from agentlightning.verl.fingerprint import check_config, check_data, run_fingerprint
from agentlightning.verl.journals import JOURNALS
from agentlightning.verl.loggers import check_installed
from agentlightning.verl.metrics import SCORE
from agentlightning.verl.rewards import Rewards
from agentlightning.verl.rules import derived_sizes, instant
from agentlightning.verl.schema import Config
from agentlightning.verl.state import logger_run_ids
from agentlightning.verl.tracking import RUN_FILES, Tracking
from agentlightning.verl.tracking_secrets import without_secrets
from agentlightning.workers.cluster import NodeDrained

if TYPE_CHECKING:
    from agentlightning.verl.trainer import AgentLightningTrainer
    from agentlightning.workers.group import WorkerGroup
    from agentlightning.workers.ray_backend import RayWorkers


_RAY_GOODBYE_S = 10.0


@dataclass(frozen=True, slots=True)
class _Data:
    train: PromptDataset
    val: Sequence[Prompt]


@dataclass(slots=True)
class _Deaths:
    """How often workers have died in this run, and how often that is borne."""

    limit: int
    count: int = 0

    def bear(self, error: WorkerError) -> str:
        """What there is to say of one more; raises it where it is one too many. A node that is left in time is no death."""
        if isinstance(error, NodeDrained):
            return f"{error}; the workers are started again elsewhere"
        self.count += 1
        if self.count > self.limit:
            raise error
        return f"{error}\nstarting the workers again, {self.count} of trainer.max_restarts={self.limit}"


def launch(config: Config) -> int:
    """Train as `config` says. Returns 0, or 75 if the run was asked to leave: the same command goes on then."""
    started = time.monotonic()
    trainer = config.trainer
    stop = Preemption(trainer.max_run_seconds, instant(trainer.must_save_by), began=psutil.Process().create_time())
    stop.install()
    # Before any thread or process is made, for they inherit it: Ray's own must not be taken away by a scheduler that signals
    # the whole session, before what the workers hold is saved; and `ray.init` must not meet a signal half-way.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    exit_code = 1
    try:
        exit_code = _hold_directory_and_run(config, stop, started)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if trainer.backend == "ray":
            with _unheard(SIGNALS):  # it is short, and a second signal would leave processes of Ray's behind
                _leave_ray(exit_code)
    return exit_code


@contextmanager
def _unheard(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """These signals change nothing."""
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def _hold_directory_and_run(config: Config, stop: Preemption, started: float) -> int:
    trainer = config.trainer
    checkpoints = CheckpointManager(
        trainer.default_local_dir if is_url(trainer.default_local_dir) else Path(trainer.default_local_dir).resolve(),
        trainer.save_freq,
        trainer.max_actor_ckpt_to_keep,
        best_by=trainer.keep_best_by,
        keep_every=trainer.keep_every,
        digest=trainer.checkpoint_digest,
        staging_parent=Path(trainer.staging_dir).expanduser().resolve() if trainer.staging_dir is not None else None,
    )
    with checkpoints, make_console() as console:
        loaded = _find_checkpoint(checkpoints, config, console)
        asked = trainer.total_training_steps
        if loaded is not None and asked is not None and loaded.step >= asked and not trainer.val_only:
            return _already_complete(loaded.step, asked, checkpoints.root, console)
        check_installed(trainer.logger)
        try:
            with Rewards.from_config(config) as rewards:
                return _run(config, checkpoints, loaded, rewards, console, stop, started)
        except Preempted as reason:
            console.note(f"stopped before training began ({reason}); the same command starts it")
            return EXIT_CODE


def _leave_ray(exit_code: int) -> None:
    if "ray" not in sys.modules:  # an error came before Ray did
        return
    from agentlightning.workers.ray_backend import leave_ray

    if not leave_ray(_RAY_GOODBYE_S) and exit_code == EXIT_CODE:
        # Whoever stopped us has stopped Ray's processes too; Ray's own exit hook would wait a minute for them and then abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _run(
    config: Config,
    checkpoints: CheckpointManager,
    loaded: LoadedCheckpoint | None,
    rewards: Rewards,
    console: Console,
    stop: Preemption,
    started: float,
) -> int:
    run_dir = checkpoints.root
    console.phase("starting")
    data, placement, workers = _load_data_while_ray_starts(config, run_dir, stop, console)
    stop.check()
    total_steps = config.trainer.total_training_steps or data.train.steps_per_epoch * config.trainer.total_epochs
    if loaded is not None and loaded.step >= total_steps and not config.trainer.val_only:
        return _already_complete(loaded.step, total_steps, run_dir, console)
    fingerprint = run_fingerprint(config, data.train)
    if loaded is not None:
        check_data(loaded, fingerprint)
    first, deaths = placement, _Deaths(config.trainer.max_restarts)
    placement, group = _load_through_deaths(config, first, workers, total_steps, run_dir, stop, console, deaths)
    if not config.trainer.val_only:
        _clear_the_way(checkpoints, config, console)
    tracking = _start_tracking(config, run_dir, loaded)
    if not config.trainer.val_only:
        _begin_history(checkpoints, tracking.attempt, deaths.count, console)
    from agentlightning.verl.trainer import AgentLightningTrainer

    trainer = AgentLightningTrainer(
        config,
        group=group,
        train_data=data.train,
        val_prompts=data.val,
        rewards=rewards,
        checkpoints=checkpoints,
        loaded=loaded,
        tracking=tracking,
        console=console,
        total_steps=total_steps,
        fingerprint=fingerprint,
        facts=_facts(config, placement, run_dir),
        stop=stop,
    )
    if config.trainer.val_only:
        trainer.validate_only()
        group.close()
        return 0
    exit_code = _fit(trainer, first, deaths)
    console.done(_summary(trainer, run_dir, exit_code, time.monotonic() - started))
    return exit_code


def _load_through_deaths(
    config: Config,
    first: Placement,
    workers: RayWorkers | None,
    total_steps: int,
    run_dir: Path,
    stop: Preemption,
    console: Console,
    deaths: _Deaths,
) -> tuple[Placement, WorkerGroup]:
    """Load the model on the workers that were placed as `first`; those that die at it are started again.

    What a worker raises itself (a model that cannot be read, too little memory) would come again each time, and ends the run.
    """
    placement = first
    while True:
        try:
            group = load_workers(config, placement, workers, total_steps, run_dir / LEASE_FILE, stop)
            _tell_of_blind_nodes(workers, run_dir, console)
            tight = group.memory_warning()
            group.adapter_configs()  # asked for here, so that what comes before training asks nothing of the workers
        except WorkerError as error:
            console.warning(deaths.bear(error))
            if workers is not None:
                workers.close()
            placement, workers = place_workers_again(config, first, placement.world_size, run_dir, stop, console.note)
            continue
        if tight is not None:
            console.warning(tight)
        return placement, group


def _tell_of_blind_nodes(workers: RayWorkers | None, run_dir: Path, console: Console) -> None:
    """A run directory that some nodes share is enough to save in; it is not what was meant."""
    blind = workers.blind_nodes(run_dir / LEASE_FILE) if workers is not None else []
    if blind:
        console.warning(
            f"{run_dir} is not shared with {', '.join(blind)}: workers there write no checkpoints, journals or logs into it; "
            "mount a file system that all nodes share, and mend it with trainer.default_local_dir=DIR"
        )


def _fit(trainer: AgentLightningTrainer, first: Placement, deaths: _Deaths) -> int:
    """Train, and end what was started, whatever happens."""
    exit_code, how = 1, "failed"
    try:
        exit_code, how = _fit_through_deaths(trainer, first, deaths)
    except Exception:
        _keep_what_is_finished(trainer)
        raise
    finally:
        with _harmless("attempts.jsonl", trainer.console):
            trainer.checkpoints.history.end(how, trainer.state.global_step)
        if exit_code != EXIT_CODE:  # the workers of a run that leaves may be in the middle of something: they go with Ray
            trainer.group.close()
        with _harmless("the last of metrics.jsonl and reward.png", trainer.console):
            trainer.tracking.finish(exit_code)
        if trainer.tracking.trouble is not None:
            trainer.console.warning(trainer.tracking.trouble)
    return exit_code


def _keep_what_is_finished(trainer: AgentLightningTrainer) -> None:
    """An error ends the run: the step before it is worth keeping, and must not hide the error if it cannot be kept."""
    try:
        step = trainer.leave()
        trainer.console.note(f"the state after step {step} is durable" if step else "no step was finished")
    except AgentLightningError as error:
        trainer.console.warning(str(error))


def _fit_through_deaths(trainer: AgentLightningTrainer, first: Placement, deaths: _Deaths) -> tuple[int, Ending]:
    """Train; workers that die are started again, a request to leave is answered by a save. The exit code, and how it went.

    `first` is how the run has begun, `deaths` those it has borne.
    """
    alive = True
    try:
        while True:
            try:
                if not alive:
                    _start_workers_again(trainer, first)
                alive = True
                trainer.fit()
                return 0, "finished"
            except NodeDrained as notice:
                alive = False
                trainer.console.warning(deaths.bear(notice))
                _keep_what_is_finished(trainer)
                trainer.settle()
            except WorkerError as error:
                alive = False
                trainer.settle()
                words = deaths.bear(error)
                with _harmless("attempts.jsonl", trainer.console):
                    trainer.checkpoints.history.worker_died()
                trainer.console.warning(words)
    except Preempted as reason:
        step = trainer.leave()
        what = f"the state after step {step} is durable" if step else "no step was finished"
        trainer.console.note(f"{reason}: {what}; exit code {EXIT_CODE}, the same command goes on")
        return EXIT_CODE, "preempted"


def _start_workers_again(trainer: AgentLightningTrainer, first: Placement) -> None:
    """New workers in the place of those of which one died, at the last checkpoint. `first` is how the run has begun."""
    config, checkpoints = trainer.config, trainer.checkpoints
    trainer.group.close()
    loaded = checkpoints.load_again()
    placement, workers = place_workers_again(
        config, first, trainer.group.world_size, checkpoints.root, trainer.stop, trainer.console.note
    )
    try:
        group = load_workers(config, placement, workers, trainer.total_steps, checkpoints.root / LEASE_FILE, trainer.stop)
    except BaseException:
        if workers is not None:
            workers.close()
        raise
    checkpoints.go_on()
    trainer.facts = _facts(config, placement, checkpoints.root)
    trainer.restart(group, loaded)


@contextmanager
def _harmless(what: str, console: Console) -> Iterator[None]:
    """What is written beside the checkpoints: a disk that refuses it is no reason to end a run, or to hide why one ends."""
    try:
        yield
    except OSError as error:
        console.warning(f"{what} could not be written: {error}")


def _begin_history(checkpoints: CheckpointManager, attempt: int, deaths: int, console: Console) -> None:
    """`deaths`: of workers, before there was an attempt to note them for."""
    previous = checkpoints.lease.previous
    with _harmless("attempts.jsonl", console):
        checkpoints.history.begin(attempt, previous.last_beat if previous is not None else None)
        for _ in range(deaths):
            checkpoints.history.worker_died()


def _summary(trainer: AgentLightningTrainer, run_dir: Path, exit_code: int, seconds: float) -> Summary:
    config, history = trainer.config, trainer.tracking.history
    saved = trainer.checkpoints.last or trainer.resume_info
    return Summary(
        run_dir=run_dir,
        step=trainer.state.global_step,
        total_steps=trainer.total_steps,
        finished=exit_code == 0,
        seconds=seconds,
        scores=[float(line[SCORE]) for line in history if SCORE in line],
        overrides=sys.argv[1:],
        model_path=config.actor_rollout_ref.model.path,
        seed=config.trainer.seed,
        experiment_name=config.trainer.experiment_name,
        picture=trainer.tracking.picture,
        adapter=saved.path / "actor" if saved is not None else None,
        val=next((line for line in reversed(history) if core_validation(line)), {}),
    )


def _start_tracking(config: Config, run_dir: Path, loaded: LoadedCheckpoint | None) -> Tracking:
    tree = config.model_dump(mode="json")
    if not config.trainer.val_only:  # which changes nothing of the run, and logs nothing
        replace_file(run_dir / "config.yaml", yaml.safe_dump(without_secrets(tree), sort_keys=False).encode())
    return Tracking(
        run_dir,
        logger=() if config.trainer.val_only else config.trainer.logger,
        project_name=config.trainer.project_name,
        experiment_name=config.trainer.experiment_name,
        config=tree,
        rollout_data_dir=Path(config.trainer.rollout_data_dir) if config.trainer.rollout_data_dir is not None else None,
        **logger_run_ids(loaded),
    )


def _find_checkpoint(checkpoints: CheckpointManager, config: Config, console: Console) -> LoadedCheckpoint | None:
    """The checkpoint to go on from, as `trainer.resume_mode` says; None for a new run. Moves nothing."""
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        assert trainer.resume_from_path is not None  # a rule of the configuration
        loaded = checkpoints.load(trainer.resume_from_path)
    else:
        loaded = checkpoints.load_latest()
    if loaded is None:
        return None
    for name, reason in loaded.skipped:
        console.warning(f"{name} was passed over: {reason}")
    for note in loaded.notes:
        console.note(note)
    for change in check_config(loaded, config):
        console.warning(f"changed since the checkpoint: {change}")
    return loaded


def _clear_the_way(checkpoints: CheckpointManager, config: Config, console: Console) -> None:
    """Move aside what this run does not go on from, now that nothing can be wrong with it any more."""
    if config.trainer.resume_mode == "disable":
        aside = checkpoints.start_over(also=(*RUN_FILES, "config.yaml", JOURNALS))
    else:
        aside = checkpoints.go_on()
    if aside is not None:
        console.note(f"what this run does not go on from is kept in {aside}")


def _already_complete(step: int, total_steps: int, run_dir: Path, console: Console) -> int:
    console.note(
        f"already complete: {step} steps are done in {run_dir}, {total_steps} were asked for; go on with "
        f"trainer.total_training_steps={step * 2}, start another run with trainer.experiment_name=NAME, or start over with "
        "trainer.resume_mode=disable"
    )
    return 0


def _load_data_while_ray_starts(
    config: Config, run_dir: Path, stop: Preemption, console: Console
) -> tuple[_Data, Placement, RayWorkers | None]:
    """Ray must be started by the main thread (it looks at signals); what torch and the tokenizer need goes on beside it."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(_load_data, config)
        if config.trainer.backend == "ray":
            from agentlightning.workers.ray_backend import start_ray

            trainer = config.trainer
            start_ray(config.ray_kwargs.ray_init, cpus=(trainer.n_gpus_per_node or 1) * trainer.nnodes)
            # Once more: `ray.init` sets a handler of its own, after which a signal aborts whatever uses Ray.
            stop.install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        stop.check()
        placement, workers = place_workers(config, run_dir, stop, console.note)
        return future.result(), placement, workers


def _load_data(config: Config) -> _Data:
    from agentlightning.models.chat import load_tokenizer
    from agentlightning.verl.batching import check_algorithm
    from agentlightning.workers.settings import load_policy_loss

    check_algorithm(config)
    load_policy_loss(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    model = config.actor_rollout_ref.model
    tokenizer = load_tokenizer(model.tokenizer_path, model.trust_remote_code)
    return _Data(PromptDataset.from_config(config.data, tokenizer), load_prompts("val", config.data, tokenizer))


def _facts(config: Config, placement: Placement, run_dir: Path) -> list[str]:
    """What the console prints once."""
    unit = (
        "GPU"
        if placement.device == "cuda"
        else f"CPU process ({placement.num_threads} thread{'s' if placement.num_threads > 1 else ''})"
    )
    given = config.trainer.default_local_dir
    backend = "in this process" if config.trainer.backend == "inprocess" else "on Ray"
    return [
        f"model {config.actor_rollout_ref.model.path}",
        f"workers {placement.world_size} x {unit}, {backend}",
        *derived_sizes(config, placement.world_size),
        f"run directory {run_dir}" + (f", mirrored to {mask(given)}" if is_url(given) else ""),
    ]
