"""A run from its configuration to its end: everything the trainer stands on is made here, and taken down again.

Enters: a checked `Config`. Leaves: an exit code. What can be wrong is found before training starts; Ray comes up while torch,
the tokenizer and the data load.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import yaml

from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.store import LoadedCheckpoint
from agentlightning.types import Prompt
from agentlightning.verl.assembly import Placement, load_workers, place_workers
from agentlightning.verl.console import Console, Summary, core_validation, make_console
from agentlightning.verl.data import PromptDataset, load_prompts
from agentlightning.verl.fingerprint import check_config, check_data, run_fingerprint
from agentlightning.verl.metrics import SCORE
from agentlightning.verl.rewards import load_reward
from agentlightning.verl.rules import derived_sizes
from agentlightning.verl.schema import Config
from agentlightning.verl.state import wandb_run_id
from agentlightning.verl.tracking import METRICS_FILE, REWARD_PICTURE, WANDB_ID_FILE, Tracking

if TYPE_CHECKING:
    from agentlightning.verl.trainer import AgentLightningTrainer
    from agentlightning.workers.ray_backend import RayWorkers


_RAY_GOODBYE_S = 10.0


class _Stop:
    """The signal that asked the run to end. Kept here because Ray makes a plain KeyboardInterrupt of what a handler raises."""

    number: int = signal.SIGINT

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        raise KeyboardInterrupt(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """What a shell shows for a process that the signal ended."""
        return 128 + self.number


_stop = _Stop()


@dataclass(frozen=True, slots=True)
class _Data:
    train: PromptDataset
    val: Sequence[Prompt]


def launch(config: Config) -> int:
    """Train as `config` says. Returns 0, or 128 plus the number of the signal that ended the run."""
    started = time.monotonic()
    run_dir = Path(config.trainer.default_local_dir).resolve()
    checkpoints = CheckpointManager(run_dir, config.trainer.save_freq, config.trainer.max_actor_ckpt_to_keep)
    with checkpoints, make_console() as console:
        loaded = _find_checkpoint(checkpoints, config, console)
        asked = config.trainer.total_training_steps
        if loaded is not None and asked is not None and loaded.step >= asked:
            return _already_complete(loaded.step, asked, run_dir, console)
        try:
            exit_code = _run(config, checkpoints, loaded, run_dir, console, started)
        except KeyboardInterrupt:
            console.note("stopped before training began; the same command starts it")
            exit_code = _stop.exit_code
    if exit_code >= 128 and config.trainer.backend == "ray":
        _leave_ray(exit_code)
    return exit_code


def _leave_ray(exit_code: int) -> None:
    from agentlightning.workers.ray_backend import leave_ray

    if not leave_ray(_RAY_GOODBYE_S):
        # Whoever stopped us has stopped Ray's processes too; Ray's own exit hook would wait a minute for them and then abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _run(
    config: Config,
    checkpoints: CheckpointManager,
    loaded: LoadedCheckpoint | None,
    run_dir: Path,
    console: Console,
    started: float,
) -> int:
    reward = load_reward(config.custom_reward_function)
    console.phase("starting")
    data, placement, workers = _load_data_while_ray_starts(config)
    total_steps = config.trainer.total_training_steps or data.train.steps_per_epoch * config.trainer.total_epochs
    if loaded is not None and loaded.step >= total_steps:
        return _already_complete(loaded.step, total_steps, run_dir, console)
    fingerprint = run_fingerprint(config, data.train)
    if loaded is not None:
        check_data(loaded, fingerprint)
    group = load_workers(config, placement, workers, total_steps)
    _clear_the_way(checkpoints, config, console)
    tracking = _start_tracking(config, run_dir, loaded)
    from agentlightning.verl.trainer import AgentLightningTrainer

    trainer = AgentLightningTrainer(
        config,
        group=group,
        train_data=data.train,
        val_prompts=data.val,
        reward=reward,
        checkpoints=checkpoints,
        loaded=loaded,
        tracking=tracking,
        console=console,
        total_steps=total_steps,
        fingerprint=fingerprint,
        facts=_facts(config, placement, run_dir),
    )
    exit_code = _fit(trainer)
    console.done(_summary(trainer, run_dir, exit_code, time.monotonic() - started))
    return exit_code


def _fit(trainer: AgentLightningTrainer) -> int:
    """Train, and end what was started, whatever happens."""
    exit_code = 1
    try:
        trainer.fit()
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = _stop.exit_code
    finally:
        trainer.tracking.finish(exit_code)
        if exit_code < 128:
            trainer.group.close()
    return exit_code


def _summary(trainer: AgentLightningTrainer, run_dir: Path, exit_code: int, seconds: float) -> Summary:
    config, history = trainer.config, trainer.tracking.history
    saved = trainer.checkpoints.last or trainer.loaded
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
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return Tracking(
        run_dir,
        logger=config.trainer.logger,
        project_name=config.trainer.project_name,
        experiment_name=config.trainer.experiment_name,
        config=tree,
        wandb_run_id=wandb_run_id(loaded) if loaded is not None else None,
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
        aside = checkpoints.start_over(also=(METRICS_FILE, REWARD_PICTURE, WANDB_ID_FILE, "config.yaml"))
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


def _load_data_while_ray_starts(config: Config) -> tuple[_Data, Placement, RayWorkers | None]:
    """Ray must be started by the main thread (it looks at signals); what torch and the tokenizer need goes on beside it."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(_load_data, config)
        if config.trainer.backend == "ray":
            from agentlightning.workers.ray_backend import start_ray

            trainer = config.trainer
            start_ray(config.ray_kwargs.ray_init, cpus=(trainer.n_gpus_per_node or 1) * trainer.nnodes)
        # Not before: `ray.init` sets a handler of its own, after which a signal aborts whatever uses Ray.
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        placement, workers = place_workers(config)
        return future.result(), placement, workers


def _load_data(config: Config) -> _Data:
    from agentlightning.models.chat import load_tokenizer

    tokenizer = load_tokenizer(config.actor_rollout_ref.model.path)
    return _Data(PromptDataset.from_config(config.data, tokenizer), load_prompts("val", config.data, tokenizer))


def _facts(config: Config, placement: Placement, run_dir: Path) -> list[str]:
    """What the console prints once."""
    unit = (
        "GPU"
        if placement.device == "cuda"
        else f"CPU process ({placement.num_threads} thread{'s' if placement.num_threads > 1 else ''})"
    )
    backend = "in this process" if config.trainer.backend == "inprocess" else "on Ray"
    return [
        f"model {config.actor_rollout_ref.model.path}",
        f"workers {placement.world_size} x {unit}, {backend}",
        *derived_sizes(config, placement.world_size),
        f"run directory {run_dir}",
    ]
