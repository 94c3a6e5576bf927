"""The rules of a configuration that span keys, files or the cluster, and the sizes that follow from it.

A `Config` whose single values are right goes in; a `ConfigError` with the mending override comes out where they do not fit each
other, or the lines that tell a person how large each part of the step is. Pure, but for `check_paths`, which looks at the disk.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from agentlightning.checkpoint.remote import is_url
from agentlightning.errors import ConfigError
from agentlightning.types import LoraShape
from agentlightning.verl.schema import Config, ModelConfig

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # by which Ray tells the program of `ray job submit` what it was submitted with
_RAY_PACKAGES = "runtime_resources"  # the folder of a Ray session in which submitted working directories are unpacked


def check_rules(config: Config) -> None:
    """Raise `ConfigError` for the first rule that `config` breaks."""
    for rule in _RULES:
        complaint = rule(config)
        if complaint is not None:
            raise ConfigError(complaint)


def logical_shards(config: Config) -> int | None:
    """How many logical shards a step is cut into; None where `trainer.exact_elastic` is off: then one for each worker."""
    if not config.trainer.exact_elastic:
        return None
    return config.trainer.logical_shards or min(8, _largest_power_of_two(_prompts_of_a_mini_batch(config)))


def _prompts_of_a_mini_batch(config: Config) -> int:
    actor = config.actor_rollout_ref.actor.ppo_mini_batch_size
    return min(actor, config.critic.ppo_mini_batch_size) if config.uses_critic else actor


def _largest_power_of_two(number: int) -> int:
    """That is at most `number`."""
    return 1 << (number.bit_length() - 1)


def check_world_size(config: Config, world_size: int) -> None:
    """Each of the `world_size` workers must find a prompt in a step, and a logical shard where there are any."""
    shards = logical_shards(config)
    if shards is not None and world_size > shards:
        raise ConfigError(
            f"trainer.logical_shards: {shards} for {world_size} workers, expected one each or more with "
            f"trainer.exact_elastic=true; mend it with trainer.logical_shards={2 * _largest_power_of_two(world_size - 1)} "
            "(another number changes the last bits once) or trainer.exact_elastic=false"
        )
    if shards is not None and shards % world_size and config.actor_rollout_ref.actor.strategy == "fsdp2":
        key = "actor_rollout_ref.actor.strategy"
        raise ConfigError(
            f"{key}: given fsdp2, whose workers run the same passes, with {world_size} workers for {shards} logical shards, "
            f"expected a divisor; mend it with trainer.nnodes=1 trainer.n_gpus_per_node={_largest_power_of_two(world_size)} or "
            "trainer.exact_elastic=false"
        )
    prompts = config.data.train_batch_size
    if world_size > prompts:
        raise ConfigError(
            f"data.train_batch_size: given {prompts} prompts a step for {world_size} workers, expected one each or more; "
            f"mend it with data.train_batch_size={world_size} or trainer.nnodes=1 trainer.n_gpus_per_node={prompts}"
        )


def check_paths(config: Config) -> None:
    """Model, tokenizer and adapter are where `actor_rollout_ref.model` says, and the run directory can be written."""
    model = config.actor_rollout_ref.model
    _check_model_path(model.path)
    _check_tokenizer_path(model.tokenizer_path)
    if model.lora_adapter_path is not None:
        _check_adapter(Path(model.lora_adapter_path).expanduser(), model)
    if not is_url(config.trainer.default_local_dir):
        check_job_directory(Path(config.trainer.default_local_dir), os.environ, Path.cwd())
        _check_run_dir(Path(config.trainer.default_local_dir))


def check_job_directory(given: Path, environment: Mapping[str, str], cwd: Path) -> None:
    """Under `ray job submit` the run directory must not lie in the copy of the working directory that Ray unpacks for one job.

    Raises `ConfigError` for a relative path there, or one within any session's packages.
    """
    in_job = _RAY_JOB in environment or _RAY_PACKAGES in cwd.parts
    if not in_job or (given.is_absolute() and _RAY_PACKAGES not in given.parts):
        return
    raise ConfigError(
        f"trainer.default_local_dir: given {given}, which under `ray job submit` lies below {cwd}, a place of this job alone: "
        "the same submit again would not find it; expected an absolute path that all nodes share, or a URL; mend it with "
        f"trainer.default_local_dir=/shared/{given.name}"
    )


def _check_model_path(given: str) -> None:
    key = "actor_rollout_ref.model.path"
    path = Path(given).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{key}: given {given}, a directory without config.json; expected a directory written by save_pretrained; "
                f"mend it with {key}=<such a directory>, or model=tiny for the model in the package"
            )
        return
    if not HUB_NAME.match(given) or path.exists():
        raise ConfigError(
            f"{key}: given {given}, which is not there; expected a directory with config.json, or a hub name such as "
            f"Qwen/Qwen3-0.6B; mend it with {key}=<directory>, or model=tiny for the model in the package"
        )


def _check_tokenizer_path(given: str) -> None:
    key = "actor_rollout_ref.model.tokenizer_path"
    path = Path(given).expanduser()
    if not path.is_dir() and (path.exists() or not HUB_NAME.match(given)):
        raise ConfigError(
            f"{key}: given {given}, which is not there; expected a directory with a tokenizer, or a hub name; "
            f"mend it with {key}=<directory>"
        )


def _check_adapter(directory: Path, model: ModelConfig) -> None:
    """The adapter to start from can be read, and is the one that the configuration describes."""
    key = "actor_rollout_ref.model.lora_adapter_path"
    try:
        found = LoraShape.from_peft(json.loads((directory / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{key}: given {directory}: {error}; expected a directory written by PEFT's save_pretrained; mend it with "
            f"{key}=null"
        ) from error
    if not (directory / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"{key}: given {directory}, which has no adapter_model.safetensors; expected one (adapter_model.bin is a pickle, "
            f"which is not opened: save the adapter again with PEFT's save_pretrained); mend it with {key}=null"
        )
    unlike = _unlike_the_adapter(found, model)
    if unlike:
        raise ConfigError(
            f"{key}: given {directory}, whose adapter differs in {', '.join(unlike)}; mend it with "
            + " ".join(f"actor_rollout_ref.model.{name}={value}" for name, value in unlike.items())
        )


def _unlike_the_adapter(found: LoraShape, model: ModelConfig) -> dict[str, str]:
    """What must be said otherwise, as overrides. Modules and variant are the adapter's, unless something else was asked for."""
    unlike = {}
    if model.lora_rank != found.rank:
        unlike["lora_rank"] = str(found.rank)
    if model.lora_alpha != found.alpha:
        unlike["lora_alpha"] = f"{found.alpha:g}"
    if model.target_modules != "all-linear" and _sorted(model.target_modules) != _sorted(found.target_modules):
        unlike["target_modules"] = "all-linear"
    if model.exclude_modules is not None and _sorted(model.exclude_modules) != _sorted(found.exclude_modules):
        unlike["exclude_modules"] = "null"
    if model.use_rslora and not found.use_rslora:
        unlike["use_rslora"] = "false"
    if model.use_dora and not found.use_dora:
        unlike["use_dora"] = "false"
    return unlike


def _sorted(modules: str | tuple[str, ...] | None) -> str | list[str] | None:
    return sorted(modules) if isinstance(modules, tuple) else modules


def _check_run_dir(run_dir: Path) -> None:
    """The nearest part of the path that exists must be a directory in which this user may write."""
    key = "trainer.default_local_dir"
    existing = run_dir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{key}: given {run_dir}, but {existing} is a file; mend it with {key}=<a directory>")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}: given {run_dir}, but {existing} cannot be written; mend it with {key}=<a directory of yours>"
        )


def derived_sizes(config: Config, world_size: int) -> list[str]:
    """What the batch sizes mean for one step on `world_size` workers, as lines to print."""
    actor = config.actor_rollout_ref.actor
    prompts, n = config.data.train_batch_size, config.actor_rollout_ref.rollout.n
    samples, mini_samples = prompts * n, actor.ppo_mini_batch_size * n
    minis = prompts // actor.ppo_mini_batch_size
    mini_per_worker = math.ceil(mini_samples / world_size)
    steps = optimizer_steps_per_step(config)
    longest = config.data.max_prompt_length + config.data.max_response_length
    lines = [
        f"step          {prompts} prompts x {n} samples = {samples} samples of at most {longest} tokens",
        f"mini-batches  {minis} of {actor.ppo_mini_batch_size} prompts ({mini_samples} samples), {actor.ppo_epochs} epoch(s): "
        f"{steps} optimizer step(s)",
        f"per worker    {math.ceil(samples / world_size)} samples a step, {mini_per_worker} a mini-batch, "
        f"{_micro_batches(config, mini_per_worker)} ({world_size} worker(s))",
    ]
    lines.append(f"last bits     {_last_bits(config)}")
    if config.uses_critic:
        critic = config.critic
        count = (prompts // critic.ppo_mini_batch_size) * critic.ppo_epochs
        lines.append(f"critic        {count} optimizer step(s) on mini-batches of {critic.ppo_mini_batch_size} prompts")
    return lines


def _last_bits(config: Config) -> str:
    """Whether they change with the number of workers."""
    shards = logical_shards(config)
    if shards is None:
        return "may differ on another number of workers (trainer.exact_elastic=true: they do not)"
    same = f"the same on 1 to {shards} workers ({shards} logical shards)"
    threads = "" if config.trainer.num_threads is not None else ", on CPUs with the same trainer.num_threads"
    return same + threads


def optimizer_steps_per_step(config: Config) -> int:
    """Optimizer steps of the actor in one step of the trainer."""
    actor = config.actor_rollout_ref.actor
    return config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs


def _micro_batches(config: Config, samples: int) -> str:
    actor = config.actor_rollout_ref.actor
    if actor.use_dynamic_bsz:
        return f"in micro-batches of at most {actor.ppo_max_token_len_per_gpu} tokens"
    micro = actor.ppo_micro_batch_size_per_gpu
    return f"in {math.ceil(samples / micro)} micro-batch(es) of at most {micro} samples"


def _mini_batches_divide(config: Config) -> str | None:
    prompts = config.data.train_batch_size
    minis = {"actor_rollout_ref.actor.ppo_mini_batch_size": config.actor_rollout_ref.actor.ppo_mini_batch_size}
    if config.uses_critic:
        minis["critic.ppo_mini_batch_size"] = config.critic.ppo_mini_batch_size
    for key, mini in minis.items():
        if prompts % mini:
            # The divisor nearest to what was asked for, so that the mended run is close to the meant one.
            nearest = min((d for d in range(1, prompts + 1) if prompts % d == 0), key=lambda d: abs(d - mini))
            return (
                f"{key}: given {mini}, expected a divisor of data.train_batch_size={prompts}; "
                f"mend it with {key}={nearest} or data.train_batch_size={math.ceil(prompts / mini) * mini}"
            )
    return None


_COMPARE_SAMPLES = (
    *("grpo", "grpo_passk", "gdpo", "rloo", "opo", "gpg"),
    *("reinforce_plus_plus_baseline", "optimal_token_baseline"),
)


def _logical_shards_fit(config: Config) -> str | None:
    given, prompts, key = config.trainer.logical_shards, _prompts_of_a_mini_batch(config), "trainer.logical_shards"
    if given is None:
        return None
    if not config.trainer.exact_elastic:
        return (
            f"{key}: given {given} with trainer.exact_elastic=false, which has none; mend it with trainer.exact_elastic=true, "
            f"or {key}=null"
        )
    fitting = min(_largest_power_of_two(given), _largest_power_of_two(prompts))
    if given != fitting:
        return (
            f"{key}: given {given}, expected a power of two of at most the {prompts} prompts of a mini-batch; mend it with "
            f"{key}={fitting}"
        )
    return None


def _sharded_base_is_plain(config: Config) -> str | None:
    ref, key = config.actor_rollout_ref, "actor_rollout_ref.actor.strategy"
    if ref.actor.strategy != "fsdp2":
        return None
    if config.trainer.backend == "inprocess":
        return f"{key}: given fsdp2 with trainer.backend=inprocess, expected workers; mend it with {key}=replicated"
    if ref.model.quantization is not None:
        return f"{key}: given fsdp2 with a quantised base, expected a plain one; mend it with {key}=replicated"
    if ref.rollout.merge_lora is True:
        return (
            f"actor_rollout_ref.rollout.merge_lora: given true with {key}=fsdp2, whose base takes no merge; mend it with "
            "actor_rollout_ref.rollout.merge_lora=auto"
        )
    return None


def _groups_are_groups(config: Config) -> str | None:
    estimator, n = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n
    if estimator in _COMPARE_SAMPLES and n < 2:
        return (
            f"actor_rollout_ref.rollout.n: given {n}, expected at least 2 with algorithm.adv_estimator={estimator}, "
            f"which compares samples of one prompt; mend it with actor_rollout_ref.rollout.n=8 or algorithm.adv_estimator=gae"
        )
    return None


def _gdpo_has_rewards(config: Config) -> str | None:
    if config.algorithm.adv_estimator == "gdpo" and not config.reward.functions:
        return (
            "reward.functions: given none, expected several rewards with algorithm.adv_estimator=gdpo, which compares each of "
            "them on its own; mend it with '+reward.functions.answer={name: pkg.mod:fn, weight: 1.0}', or "
            "algorithm.adv_estimator=grpo"
        )
    return None


def _validation_alone_has_files(config: Config) -> str | None:
    if config.trainer.val_only and config.data.val_files is None:
        return "trainer.val_only: given true, but data.val_files is null; mend it with data.val_files=<file>"
    return None


def _longest_sample_fits(config: Config) -> str | None:
    actor, data = config.actor_rollout_ref.actor, config.data
    longest = data.max_prompt_length + data.max_response_length
    if actor.use_dynamic_bsz and actor.ppo_max_token_len_per_gpu < longest:
        key = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
        return (
            f"{key}: given {actor.ppo_max_token_len_per_gpu}, expected at least one whole sample, data.max_prompt_length + "
            f"data.max_response_length = {longest}; mend it with {key}={longest}"
        )
    return None


def _resume_is_whole(config: Config) -> str | None:
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path is None:
        return (
            "trainer.resume_from_path: given null, expected a step, name, directory or record with "
            "trainer.resume_mode=resume_path; "
            "mend it with trainer.resume_from_path=40, or trainer.resume_mode=auto for the newest checkpoint"
        )
    if trainer.resume_mode != "resume_path" and trainer.resume_from_path is not None:
        return (
            f"trainer.resume_mode: given {trainer.resume_mode}, which does not look at trainer.resume_from_path="
            f"{trainer.resume_from_path}; mend it with trainer.resume_mode=resume_path or trainer.resume_from_path=null"
        )
    return None


def instant(given: str | float | None) -> float | None:
    """`trainer.must_save_by` in seconds since the epoch. ValueError if the text is no ISO 8601 instant."""
    return datetime.fromisoformat(given).timestamp() if isinstance(given, str) else given


def _deadline_is_an_instant(config: Config) -> str | None:
    given = config.trainer.must_save_by
    try:
        instant(given)
    except ValueError:
        return (
            f"trainer.must_save_by: given {given!r}, expected an instant such as 2026-01-31T12:00:00+00:00, or seconds since "
            "the epoch; mend it with trainer.must_save_by=null, or trainer.max_run_seconds=3600"
        )
    return None


def _turns_have_a_tool(config: Config) -> str | None:
    turns = config.actor_rollout_ref.rollout.multi_turn
    if turns.enable and turns.tool is None:
        return (
            "actor_rollout_ref.rollout.multi_turn.tool: given null, expected pkg.mod:fn with multi_turn.enable=true; "
            "mend it with actor_rollout_ref.rollout.multi_turn.enable=false"
        )
    return None


def _validation_has_files(config: Config) -> str | None:
    trainer = config.trainer
    if config.data.val_files is None and (trainer.test_freq > 0 or trainer.val_before_train):
        return (
            f"data.val_files: given null, expected a file with trainer.test_freq={trainer.test_freq} and "
            f"trainer.val_before_train={str(trainer.val_before_train).lower()}; "
            "mend it with trainer.test_freq=-1 trainer.val_before_train=false"
        )
    return None


def _never_is_minus_one(config: Config) -> str | None:
    rollout = config.actor_rollout_ref.rollout
    given = {
        "trainer.save_freq": (config.trainer.save_freq, "only the last step"),
        "trainer.test_freq": (config.trainer.test_freq, "never"),
        "actor_rollout_ref.rollout.top_k": (rollout.top_k, "all tokens"),
        "actor_rollout_ref.rollout.val_kwargs.top_k": (rollout.val_kwargs.top_k, "all tokens"),
    }
    for key, (value, meaning) in given.items():
        if value == 0:
            return f"{key}: given 0, expected at least 1, or -1 ({meaning}); mend it with {key}=-1"
    return None


def _in_process_is_one_worker(config: Config) -> str | None:
    trainer = config.trainer
    workers = trainer.nnodes * (trainer.n_gpus_per_node or 1)
    if trainer.backend == "inprocess" and workers > 1:
        return (
            f"trainer.backend: given inprocess with {workers} workers, expected one; "
            f"mend it with trainer.nnodes=1 trainer.n_gpus_per_node=1, or trainer.backend=ray"
        )
    return None


def _workers_have_prompts(config: Config) -> str | None:
    trainer = config.trainer
    check_world_size(config, trainer.nnodes * (trainer.n_gpus_per_node or 1))
    return None


def _reward_has_a_module(config: Config) -> str | None:
    named = {f"reward.functions.{name}": function for name, function in config.reward.functions.items()}
    for key, reward in (named or {"custom_reward_function": config.custom_reward_function}).items():
        is_server = re.match(r"^https?://", reward.name) is not None
        if reward.path is None and not is_server and not re.match(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", reward.name):
            return (
                f"{key}.name: given {reward.name!r} without {key}.path, expected pkg.mod:fn, or the URL of a reward server; "
                f"mend it with {key}.path=<file>.py"
            )
        if reward.path is not None and is_server:
            return (
                f"{key}.path: given {reward.path} with the URL {reward.name}, expected one of the two; "
                f"mend it with {key}.path=null, or {key}.name=compute_score"
            )
        if reward.path is not None and ":" in reward.name:
            return (
                f"{key}.name: given {reward.name!r}, expected the name of a function in {reward.path}; "
                f"mend it with {key}.name=compute_score"
            )
    return None


def _four_bits_need_a_gpu(config: Config) -> str | None:
    if config.actor_rollout_ref.model.quantization is not None and config.trainer.device == "cpu":
        return (
            f"actor_rollout_ref.model.quantization: given {config.actor_rollout_ref.model.quantization} with "
            "trainer.device=cpu, expected a GPU; mend it with actor_rollout_ref.model.quantization=null or trainer.device=auto"
        )
    return None


def _four_bits_stay_unmerged(config: Config) -> str | None:
    given = config.actor_rollout_ref.model.quantization
    if given is not None and config.actor_rollout_ref.rollout.merge_lora is True:
        return (
            f"actor_rollout_ref.rollout.merge_lora: given true with actor_rollout_ref.model.quantization={given}, whose "
            "weights take no merge; mend it with actor_rollout_ref.rollout.merge_lora=auto"
        )
    return None


_RULES: tuple[Callable[[Config], str | None], ...] = (
    _mini_batches_divide,
    _logical_shards_fit,
    _sharded_base_is_plain,
    _groups_are_groups,
    _gdpo_has_rewards,
    _validation_alone_has_files,
    _longest_sample_fits,
    _resume_is_whole,
    _deadline_is_an_instant,
    _turns_have_a_tool,
    _validation_has_files,
    _never_is_minus_one,
    _reward_has_a_module,
    _in_process_is_one_worker,
    _workers_have_prompts,
    _four_bits_need_a_gpu,
    _four_bits_stay_unmerged,
)
