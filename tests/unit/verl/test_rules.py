"""Rules across keys: each broken one names its keys and an override, and that override mends it."""

import os
import re
from pathlib import Path

import pytest

from agentlightning.errors import ConfigError
from agentlightning.verl.config import load_config
from agentlightning.verl.rules import check_paths, check_world_size, derived_sizes, optimizer_steps_per_step

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def _mending(message: str) -> list[str]:
    """The first override (or overrides) that a message offers."""
    offered = message.partition("mend it with ")[2]
    return re.split(r",? or |, | for ", offered)[0].split()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([f"{ACTOR}.ppo_mini_batch_size=5"], f"{ACTOR}.ppo_mini_batch_size: given 5"),
        ([f"{ACTOR}.ppo_mini_batch_size=32"], f"{ACTOR}.ppo_mini_batch_size: given 32"),
        (["algorithm.adv_estimator=gae", "critic.ppo_mini_batch_size=3"], "critic.ppo_mini_batch_size: given 3"),
        ([f"{ROLLOUT}.n=1"], f"{ROLLOUT}.n: given 1"),
        ([f"{ROLLOUT}.n=1", "algorithm.adv_estimator=rloo"], "algorithm.adv_estimator=rloo"),
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=200"], f"{ACTOR}.ppo_max_token_len_per_gpu: given 200"),
        (["trainer.resume_mode=resume_path"], "trainer.resume_from_path: given null"),
        (["trainer.resume_from_path=3"], "trainer.resume_mode: given auto"),
        ([f"{ROLLOUT}.multi_turn.tool=null"], f"{ROLLOUT}.multi_turn.tool: given null"),
        (["data.val_files=null"], "data.val_files: given null"),
        (["data.val_files=null", "trainer.test_freq=-1", "trainer.val_before_train=true"], "trainer.val_before_train=true"),
        (["trainer.save_freq=0"], "trainer.save_freq: given 0"),
        (["trainer.test_freq=0"], "trainer.test_freq: given 0"),
        ([f"{ROLLOUT}.top_k=0"], f"{ROLLOUT}.top_k: given 0"),
        (
            ["custom_reward_function.path=r.py"],
            "custom_reward_function.name: given 'agentlightning.calculator.task:compute_score'",
        ),
        (["trainer.backend=inprocess", "trainer.n_gpus_per_node=2"], "trainer.backend: given inprocess with 2 workers"),
        (["trainer.nnodes=4", "trainer.n_gpus_per_node=8"], "data.train_batch_size: given 16 prompts a step for 32 workers"),
    ],
)
def test_a_broken_rule_names_its_keys_and_the_override_mends_it(overrides, named):
    with pytest.raises(ConfigError) as error:
        load_config(overrides)
    assert named in str(error.value)
    mended = _mending(str(error.value))
    assert mended
    assert all("=" in word for word in mended)
    load_config([*overrides, *mended])


def test_a_reward_name_without_a_module_needs_a_file():
    with pytest.raises(ConfigError, match=re.escape("mend it with custom_reward_function.path=<file>.py")):
        load_config(["custom_reward_function.name=compute_score"])
    load_config(["custom_reward_function.name=compute_score", "custom_reward_function.path=r.py"])


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{ROLLOUT}.n=1", "algorithm.adv_estimator=gae"],
        [f"{ACTOR}.ppo_max_token_len_per_gpu=8", f"{ACTOR}.use_dynamic_bsz=false"],
        ["critic.ppo_mini_batch_size=3"],
        [f"{ROLLOUT}.multi_turn.tool=null", f"{ROLLOUT}.multi_turn.enable=false"],
        ["data.val_files=null", "trainer.test_freq=-1", "trainer.val_before_train=false"],
        ["trainer.n_gpus_per_node=3"],
        ["trainer.resume_mode=resume_path", "trainer.resume_from_path=40"],
        ["trainer.resume_mode=resume_path", "trainer.resume_from_path=global_step_40"],
    ],
)
def test_what_is_right_passes(overrides):
    load_config(overrides)


def test_more_workers_than_prompts_is_told_when_the_cluster_is_known():
    config = load_config(["data.train_batch_size=4"])
    check_world_size(config, 4)
    with pytest.raises(ConfigError, match=re.escape("mend it with data.train_batch_size=5 or trainer.nnodes=1")):
        check_world_size(config, 5)


def test_a_model_path_that_is_not_there(tmp_path):
    config = load_config([f"actor_rollout_ref.model.path={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigError, match=r"actor_rollout_ref\.model\.path: given .*nowhere, which is not there.*model=tiny"):
        check_paths(config)


def test_a_model_directory_without_a_config(tmp_path):
    config = load_config([f"actor_rollout_ref.model.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"actor_rollout_ref\.model\.path: given .*without config\.json"):
        check_paths(config)


def test_a_model_path_that_is_a_file(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    config = load_config([f"actor_rollout_ref.model.path={tmp_path / 'model.gguf'}"])
    with pytest.raises(ConfigError, match=r"actor_rollout_ref\.model\.path"):
        check_paths(config)


def test_a_hub_name_is_left_to_the_hub(tmp_path):
    check_paths(load_config(["model=qwen3_4b", f"trainer.default_local_dir={tmp_path}/a/b"]))
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_below_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    for run_dir in (tmp_path / "taken", tmp_path / "taken" / "run"):
        config = load_config([f"trainer.default_local_dir={run_dir}"])
        with pytest.raises(ConfigError, match=r"trainer\.default_local_dir: given .* is a file; mend it with trainer"):
            check_paths(config)


@pytest.mark.skipif(os.access("/proc/1", os.W_OK) and os.geteuid() != 0, reason="needs a place that nobody may write")
def test_a_run_directory_that_cannot_be_written(monkeypatch, tmp_path):
    # root may write everywhere, so the answer of the operating system is given here for it
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    config = load_config([f"trainer.default_local_dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"trainer\.default_local_dir: given .*/run, but .* cannot be written; mend it with"):
        check_paths(config)


def test_derived_sizes_by_hand():
    config = load_config(
        [
            "data.train_batch_size=12",
            f"{ACTOR}.ppo_mini_batch_size=4",
            f"{ACTOR}.ppo_epochs=2",
            f"{ACTOR}.use_dynamic_bsz=false",
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=5",
        ]
    )
    assert optimizer_steps_per_step(config) == 6
    text = "\n".join(derived_sizes(config, world_size=2))
    assert "12 prompts x 8 samples = 96 samples of at most 224 tokens" in text
    assert "3 of 4 prompts (32 samples), 2 epoch(s): 6 optimizer step(s)" in text
    assert "48 samples a step, 16 a mini-batch, in 4 micro-batch(es) of at most 5 samples (2 worker(s))" in text
    assert "critic" not in text


def test_derived_sizes_of_an_uneven_split_and_a_critic():
    config = load_config(["algorithm.adv_estimator=gae", "critic.ppo_mini_batch_size=8", f"{ROLLOUT}.n=1"])
    text = "\n".join(derived_sizes(config, world_size=3))
    assert "6 samples a step, 6 a mini-batch, in micro-batches of at most 1024 tokens (3 worker(s))" in text
    assert "critic        2 optimizer step(s) on mini-batches of 8 prompts" in text
