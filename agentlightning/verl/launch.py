"""A run from its configuration to its end: everything the trainer stands on is made here, and taken down again.

Enters: a checked `Config`. Leaves: an exit code. What can be wrong is found before training starts; Ray comes up while torch,
the tokenizer and the data load.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from agentlightning.checkpoint.fingerprint import compare_fingerprints
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.store import LoadedCheckpoint
from agentlightning.errors import CheckpointError
from agentlightning.types import Prompt
from agentlightning.verl.assembly import Placement, start_workers
from agentlightning.verl.console import Console, Summary, core_validation, make_console
from agentlightning.verl.data import PromptDataset, load_prompts
from agentlightning.verl.metrics import SCORE
from agentlightning.verl.rewards import load_reward
from agentlightning.verl.rules import derived_sizes
from agentlightning.verl.schema import Config
from agentlightning.verl.tracking import METRICS_FILE, REWARD_PICTURE, WANDB_ID_FILE, Tracking

_DATA_DIGEST = "data.train_files"


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True, slots=True)
class _Data:
    train: PromptDataset
    val: Sequence[Prompt]


def launch(config: Config) -> int:
    """Train as `config` says. Returns 0, or 128 plus the number of the signal that ended the run."""
    started = time.monotonic()
    run_dir = Path(config.trainer.default_local_dir).resolve()
    checkpoints = _open_run(run_dir, config)
    with checkpoints, make_console() as console:
        loaded = _find_checkpoint(checkpoints, config, console)
        asked = config.trainer.total_training_steps
        if loaded is not None:
            _check_fingerprint(loaded, run_fingerprint(config, None), console)
        if loaded is not None and asked is not None and loaded.step >= asked:
            return _already_complete(loaded.step, asked, run_dir, console)
        return _run(config, checkpoints, loaded, run_dir, console, started)


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
    data = _load_data_while_ray_starts(config)
    total_steps = config.trainer.total_training_steps or data.train.steps_per_epoch * config.trainer.total_epochs
    if loaded is not None and loaded.step >= total_steps:
        return _already_complete(loaded.step, total_steps, run_dir, console)
    fingerprint = run_fingerprint(config, data.train)
    if loaded is not None:
        _check_data(loaded, fingerprint)
        aside = checkpoints.go_on()
        if aside is not None:
            console.note(f"checkpoints that this run does not go on from are kept in {aside}")
    from agentlightning.verl.trainer import AgentLightningTrainer

    group, placement = start_workers(config, total_steps)
    tree = config.model_dump(mode="json")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    tracking = Tracking(
        run_dir,
        logger=config.trainer.logger,
        project_name=config.trainer.project_name,
        experiment_name=config.trainer.experiment_name,
        config=tree,
        wandb_run_id=loaded.json["trainer_state.json"].get("wandb_run_id") if loaded is not None else None,
    )
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
    exit_code = 1
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        trainer.fit()
        exit_code = 0
    except Stopped as stopped:
        exit_code = 128 + stopped.number
    finally:
        tracking.finish(exit_code)
        group.close()
    saved = checkpoints.last.path if checkpoints.last is not None else loaded.path if loaded is not None else None
    history = tracking.history
    console.done(
        Summary(
            run_dir=run_dir,
            step=trainer.state.global_step,
            total_steps=total_steps,
            finished=exit_code == 0,
            seconds=time.monotonic() - started,
            scores=[float(line[SCORE]) for line in history if SCORE in line],
            overrides=sys.argv[1:],
            model_path=config.actor_rollout_ref.model.path,
            seed=config.trainer.seed,
            experiment_name=config.trainer.experiment_name,
            picture=tracking.picture,
            adapter=saved / "actor" if saved is not None else None,
            val=next((line for line in reversed(history) if core_validation(line)), {}),
        )
    )
    return exit_code


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _open_run(run_dir: Path, config: Config) -> CheckpointManager:
    """Take the run directory; nobody else may write to it from now on."""
    return CheckpointManager(run_dir, config.trainer.save_freq, config.trainer.max_actor_ckpt_to_keep)


def _find_checkpoint(checkpoints: CheckpointManager, config: Config, console: Console) -> LoadedCheckpoint | None:
    """The checkpoint to go on from, as `trainer.resume_mode` says; None for a new run."""
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        aside = checkpoints.start_over(also=(METRICS_FILE, REWARD_PICTURE, WANDB_ID_FILE, "config.yaml"))
        if aside is not None:
            console.note(f"resume_mode=disable: the run that lay here is kept in {aside}")
        return None
    if trainer.resume_mode == "resume_path":
        assert trainer.resume_from_path is not None  # a rule of the configuration
        loaded = checkpoints.load(trainer.resume_from_path)
    else:
        loaded = checkpoints.load_latest()
    if loaded is not None:
        for name, reason in loaded.skipped:
            console.warning(f"{name} was passed over: {reason}")
        for note in loaded.notes:
            console.note(note)
    return loaded


def _already_complete(step: int, total_steps: int, run_dir: Path, console: Console) -> int:
    console.note(
        f"already complete: {step} steps are done in {run_dir}, {total_steps} were asked for; go on with "
        f"trainer.total_training_steps={step * 2}, start another run with trainer.experiment_name=NAME, or start over with "
        "trainer.resume_mode=disable"
    )
    return 0


def _load_data_while_ray_starts(config: Config) -> _Data:
    """Ray must be started by the main thread (it looks at signals); what torch and the tokenizer need goes on beside it."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(_load_data, config)
        if config.trainer.backend == "ray":
            from agentlightning.workers.ray_backend import start_ray

            trainer = config.trainer
            start_ray(config.ray_kwargs.ray_init, cpus=(trainer.n_gpus_per_node or 1) * trainer.nnodes)
        return future.result()


def _load_data(config: Config) -> _Data:
    from agentlightning.models.chat import load_tokenizer

    tokenizer = load_tokenizer(config.actor_rollout_ref.model.path)
    return _Data(PromptDataset.from_config(config.data, tokenizer), load_prompts("val", config.data, tokenizer))


def run_fingerprint(config: Config, train_data: PromptDataset | None) -> dict[str, Any]:
    """What must be the same for a checkpoint to mean the same (`breaking`), and what is worth a warning (`harmless`).

    Without `train_data` the digest of the data is left out.
    """
    model, actor, trainer = config.actor_rollout_ref.model, config.actor_rollout_ref.actor, config.trainer
    breaking: dict[str, Any] = {
        "actor_rollout_ref.model.path": _model_identity(model.path),
        "actor_rollout_ref.model.lora_rank": model.lora_rank,
        "actor_rollout_ref.model.lora_alpha": model.lora_alpha,
        "actor_rollout_ref.model.target_modules": model.target_modules,
        "algorithm.adv_estimator": config.algorithm.adv_estimator,
        "data.train_batch_size": config.data.train_batch_size,
        "data.shuffle": config.data.shuffle,
        "data.seed": config.data.seed,
        "trainer.seed": trainer.seed,
    }
    if train_data is not None:
        breaking[_DATA_DIGEST] = train_data.fingerprint()
    if config.uses_critic:
        breaking["critic.kind"] = config.critic.kind
        breaking["critic.model.lora_rank"] = config.critic.model.lora_rank
    optim = actor.optim.model_dump(mode="json")
    if actor.optim.lr_scheduler_type != "constant":
        optim["total_training_steps"] = trainer.total_training_steps
    losses = actor.model_dump(mode="json", exclude={"optim", "ppo_micro_batch_size_per_gpu", "ppo_max_token_len_per_gpu"})
    harmless = {
        "actor_rollout_ref.actor": losses | {"optim": optim},
        "actor_rollout_ref.rollout.n": config.actor_rollout_ref.rollout.n,
        "actor_rollout_ref.rollout.temperature": config.actor_rollout_ref.rollout.temperature,
        "algorithm": config.algorithm.model_dump(mode="json"),
        "trainer.num_threads": trainer.num_threads,
        "trainer.n_gpus_per_node": trainer.n_gpus_per_node,
    }
    return {"breaking": breaking, "harmless": harmless}


def _model_identity(path: str) -> str:
    """A digest of the model's configuration and of its files' names and sizes; a hub name stands for itself."""
    directory = Path(path)
    if not directory.is_dir():
        return path
    digest = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return digest.hexdigest()


def _check_fingerprint(loaded: LoadedCheckpoint, now: Mapping[str, Any], console: Console) -> None:
    """Refuse a checkpoint of another model, shape or order of data; warn of other changes. The data come later."""
    saved = {**loaded.fingerprint, "breaking": {**loaded.fingerprint["breaking"]}}
    saved["breaking"].pop(_DATA_DIGEST, None)
    breaking, harmless = compare_fingerprints(saved, now)
    if breaking:
        raise _belongs_to_another_run(loaded, breaking)
    for line in harmless:
        console.warning(f"changed since the checkpoint: {line}")


def _check_data(loaded: LoadedCheckpoint, now: Mapping[str, Any]) -> None:
    breaking, _ = compare_fingerprints(loaded.fingerprint, now)
    if breaking:
        raise _belongs_to_another_run(loaded, breaking)


def _belongs_to_another_run(loaded: LoadedCheckpoint, differences: Sequence[str]) -> CheckpointError:
    lines = [
        f"{loaded.path} belongs to another run:",
        *(f"  {line}" for line in differences),
        "go on with the values it was saved with, give this run a directory of its own with trainer.experiment_name=NAME, or",
        "start over here with trainer.resume_mode=disable",
    ]
    return CheckpointError("\n".join(lines))


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
