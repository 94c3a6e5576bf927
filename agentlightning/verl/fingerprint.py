"""Whether a checkpoint fits the run that wants to go on from it.

Enters: the configuration, the data, a checkpoint. Leaves: an error with a diff where the state would lose its meaning, warnings
where it would not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentlightning.checkpoint.fingerprint import MODEL_PATH, compare_fingerprints, model_identity
from agentlightning.checkpoint.store import LoadedCheckpoint
from agentlightning.errors import CheckpointError
from agentlightning.verl.data import PromptDataset
from agentlightning.verl.rules import logical_shards
from agentlightning.verl.schema import Config, ModelConfig

_DATA_DIGEST = "data.train_files"
# Of actor_rollout_ref.actor: what changes no loss, and `optim`, which stands beside it.
_NOT_THE_LOSS = {"optim", "ppo_micro_batch_size_per_gpu", "ppo_max_token_len_per_gpu", "strategy"}


def run_fingerprint(config: Config, train_data: PromptDataset | None) -> dict[str, Any]:
    """What must be the same for a checkpoint to mean the same (`breaking`), and what is worth a warning (`harmless`).

    Without `train_data` the digest of the data is left out.
    """
    model, actor, trainer = config.actor_rollout_ref.model, config.actor_rollout_ref.actor, config.trainer
    breaking: dict[str, Any] = {
        MODEL_PATH: model_identity(model.path),
        "tokenizer": _tokenizer_identity(model.tokenizer_path),
        "actor_rollout_ref.model.lora_rank": model.lora_rank,
        "actor_rollout_ref.model.lora_alpha": model.lora_alpha,
        "actor_rollout_ref.model.target_modules": model.target_modules,
        "algorithm.adv_estimator": config.algorithm.adv_estimator,
        "data.train_batch_size": config.data.train_batch_size,
        "data.shuffle": config.data.shuffle,
        "data.seed": config.data.seed,
        "trainer.seed": trainer.seed,
        **_model_options(model),
    }
    if config.data.mixture:
        breaking["data.mixture"] = dict(config.data.mixture)
    if config.data.sampler is not None:
        breaking["data.sampler"] = config.data.sampler
    if train_data is not None:
        breaking[_DATA_DIGEST] = train_data.fingerprint()
    if config.uses_critic:
        breaking["critic.kind"] = config.critic.kind
        breaking["critic.model.lora_rank"] = config.critic.model.lora_rank
    optim = actor.optim.model_dump(mode="json")
    if actor.optim.lr_scheduler_type != "constant":
        optim["total_training_steps"] = trainer.total_training_steps
    losses = actor.model_dump(mode="json", exclude=_NOT_THE_LOSS)
    harmless = {
        "actor_rollout_ref.actor": losses | {"optim": optim},
        "actor_rollout_ref.rollout.n": config.actor_rollout_ref.rollout.n,
        "actor_rollout_ref.rollout.temperature": config.actor_rollout_ref.rollout.temperature,
        "actor_rollout_ref.rollout.top_k": config.actor_rollout_ref.rollout.top_k,
        "actor_rollout_ref.rollout.top_p": config.actor_rollout_ref.rollout.top_p,
        "actor_rollout_ref.model.dtype": model.dtype,
        "data.max_response_length": config.data.max_response_length,
        "custom_reward_function": config.custom_reward_function.model_dump(mode="json"),
        "reward": config.reward.model_dump(mode="json", exclude={"num_workers", "timeout_s", "retries"}),
        "algorithm": config.algorithm.model_dump(mode="json"),
        # Sums of floats differ with the number of threads: a run that goes on with another one is not the same to the last bit.
        "trainer.num_threads": trainer.num_threads or f"{os.cpu_count()} cores",
        "trainer.n_gpus_per_node": trainer.n_gpus_per_node,
        **({"trainer.logical_shards": logical_shards(config)} if trainer.exact_elastic else {}),
    }
    return {"breaking": breaking, "harmless": harmless}


def _model_options(model: ModelConfig) -> dict[str, Any]:
    """Those of the model's options that are in use, so that a checkpoint written before an option existed still fits."""
    adapter = None if model.lora_adapter_path is None else _adapter_identity(Path(model.lora_adapter_path).expanduser())
    options = {
        "exclude_modules": model.exclude_modules,
        "use_rslora": model.use_rslora,
        "use_dora": model.use_dora,
        "lora_adapter_path": adapter,
        "quantization": model.quantization,
        "override_config": model.override_config,
    }
    return {f"actor_rollout_ref.model.{name}": value for name, value in options.items() if value}


def _adapter_identity(directory: Path) -> str:
    """A digest of what the adapter is, wherever it lies."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _tokenizer_identity(path: str) -> str:
    """A digest of what turns messages into tokens; a hub name stands for itself."""
    directory = Path(path)
    if not directory.is_dir():
        return path
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(directory.glob("*token*.json")) + sorted(directory.glob("chat_template*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def check_config(loaded: LoadedCheckpoint, config: Config) -> list[str]:
    """Refuse a checkpoint of another model, shape or order of data; returns the other changes. The data come later.

    Raises `CheckpointError` with a line for each difference.
    """
    now = run_fingerprint(config, None)
    saved = {**loaded.fingerprint, "breaking": {**loaded.fingerprint["breaking"]}}
    saved["breaking"].pop(_DATA_DIGEST, None)
    breaking, harmless = compare_fingerprints(saved, now)
    if breaking:
        raise _belongs_to_another_run(loaded, breaking)
    return harmless


def check_data(loaded: LoadedCheckpoint, now: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was trained on other data. `now` is the run's whole fingerprint."""
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
