"""verl's keys that are not here, each with the reason: a key that does nothing would be a lie.

Enters: a key that the schema does not know. Leaves: what to tell whoever comes from verl, or nothing.
"""

from __future__ import annotations

_ENGINE = "rollouts are sampled in the worker's own process, on the very weights that train; there is no other engine to choose"
_WHOLE = "a checkpoint is whole or it is not one"
_SHARED = "one frozen base is shared by actor, critic and reference"
_REASONS = {  # the longest prefix that fits a key holds for it
    "actor_rollout_ref.hybrid_engine": _ENGINE,
    "actor_rollout_ref.model.use_remove_padding": "rows are sorted by length and share their prompt's pass, so there is little "
    "padding to remove; see actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.model.use_liger": "log-probabilities are computed in chunks already, without the whole logits",
    "actor_rollout_ref.model.external_lib": "import what you need in the module of your reward function or tool",
    "actor_rollout_ref.model.lora_dropout": "dropout would make the log-probabilities of rollout and training differ",
    "actor_rollout_ref.actor.fsdp_config": "only the frozen base is sharded; see actor_rollout_ref.actor.strategy",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": "a sequence is never split over workers",
    "actor_rollout_ref.actor.checkpoint.async_save": "every save is written behind the next step; see trainer.save_freq",
    "actor_rollout_ref.actor.checkpoint": _WHOLE,
    "actor_rollout_ref.actor.use_torch_compile": "nothing is compiled",
    "actor_rollout_ref.actor.entropy_from_logits_with_chunking": "entropy is always computed in chunks",
    "actor_rollout_ref.rollout.name": _ENGINE,
    "actor_rollout_ref.rollout.mode": _ENGINE,
    "actor_rollout_ref.rollout.gpu_memory_utilization": f"{_ENGINE}; actor_rollout_ref.rollout.max_num_seqs bounds its memory",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": _ENGINE,
    "actor_rollout_ref.rollout.enforce_eager": _ENGINE,
    "actor_rollout_ref.rollout.load_format": _ENGINE,
    "actor_rollout_ref.rollout.prompt_length": "it is data.max_prompt_length",
    "actor_rollout_ref.rollout.response_length": "it is data.max_response_length",
    "actor_rollout_ref.rollout.calculate_log_probs": "every token's log-probability is kept; see training/rollout_probs_diff_*",
    "actor_rollout_ref.rollout.do_sample": "training samples; validation has actor_rollout_ref.rollout.val_kwargs.do_sample",
    "actor_rollout_ref.ref.fsdp_config": _SHARED,
    "actor_rollout_ref.ref.strategy": _SHARED,
    "critic.strategy": _SHARED,
    "critic.model.path": f"{_SHARED}; see critic.kind",
    "critic.model.tokenizer_path": _SHARED,
    "critic.model.use_remove_padding": "see actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "critic.checkpoint": _WHOLE,
    "critic.enable": "it follows from algorithm.adv_estimator: gae has a critic",
    "reward_model.enable": "a reward model is asked over HTTP: custom_reward_function.name=http://host:port/path",
    "reward_model.reward_manager": "reward.* and custom_reward_function.* say how rewards are computed",
    "reward_model.launch_reward_fn_async": "samples are always scored side by side; see reward.num_workers",
    "reward_model.overlong_buffer": "it is reward.overlong_buffer",
    "algorithm.rollout_correction.rollout_token_veto_threshold": "tokens that the policy finds too unlikely are left out, "
    "not their samples: algorithm.rollout_correction.rollout_rs=token",
    "algorithm.rollout_correction.loss_type": "the loss is actor_rollout_ref.actor.policy_loss.loss_mode, in bypass mode too",
    "algorithm.rollout_correction.use_policy_gradient": "see actor_rollout_ref.actor.policy_loss.loss_mode=gpg",
    "algorithm.gdpo_reward_keys": "gdpo compares each of reward.functions",
    "algorithm.use_pf_ppo": "samples are never drawn again by their rewards; see algorithm.filter_groups",
    "algorithm.pf_ppo": "samples are never drawn again by their rewards; see algorithm.filter_groups",
    "actor_rollout_ref.actor.loss_scale_factor": "seq-mean-token-sum-norm divides by data.max_response_length",
    "actor_rollout_ref.actor.data_loader_seed": "the order of mini-batches follows from data.seed and the step",
    "critic.shuffle": "it is actor_rollout_ref.actor.shuffle, for the critic too",
    "critic.rollout_n": "it is actor_rollout_ref.rollout.n",
    "critic.forward_micro_batch_size_per_gpu": "it is critic.ppo_micro_batch_size_per_gpu",
    "custom_reward_function.reward_kwargs": "a reward function has no further arguments; see extra_info in the data's rows",
    "trainer.balance_batch": "workers are always balanced by tokens",
    "trainer.del_local_ckpt_after_load": "nothing is deleted that was not superseded; see trainer.max_actor_ckpt_to_keep",
    "trainer.default_hdfs_dir": "set trainer.default_local_dir to the URL: s3://bucket/run, gs://..., any that fsspec knows",
    "trainer.max_critic_ckpt_to_keep": "actor and critic lie in one checkpoint; see trainer.max_actor_ckpt_to_keep",
    "trainer.esi_redundant_time": "the time of a save is measured; see trainer.must_save_by and trainer.max_run_seconds",
    "trainer.ray_wait_register_center_timeout": "there is no register centre to wait for",
    "data.dataloader_num_workers": "no loader runs beside the trainer; the order is a pure function of (seed, position)",
    "data.sampler.class_path": "data.sampler is pkg.mod:fn(seed, position, rows) -> row: a function, not a class with a state",
    "data.sampler.class_name": "data.sampler is pkg.mod:fn(seed, position, rows) -> row: a function, not a class with a state",
    "data.val_max_samples": "validation takes all rows of data.val_files",
    "data.custom_cls": "rows are read by data.train_files; an order of one's own is data.sampler",
    "data.gen_batch_size": "dynamic sampling draws as many prompts as are missing; see algorithm.filter_groups",
    "data.return_raw_chat": "the messages always reach the reward function: extra_info['messages']",
    "data.image_key": "models take text only",
    "data.video_key": "models take text only",
}


def why_not_here(key: str) -> str | None:
    """The reason why verl's `key` is not a key here, or None if it is not known to be verl's."""
    fitting = [prefix for prefix in _REASONS if key == prefix or key.startswith(f"{prefix}.")]
    return _REASONS[max(fitting, key=len)] if fitting else None
