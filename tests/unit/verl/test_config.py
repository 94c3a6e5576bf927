"""From overrides to a Config: YAML and schema agree; every mistake is answered with its key and what mends it."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

import agentlightning
from agentlightning.errors import ConfigError
from agentlightning.types import SamplingParams
from agentlightning.verl.config import check_overrides, config_dir, leaf_keys, load_config, validate
from agentlightning.verl.refused import why_not_here

VERL_KEYS = (Path(__file__).parent / "verl_keys.txt").read_text().splitlines()  # those that verl's examples set
MODELS = ["tiny", "qwen3_0_6b", "qwen3_4b"]


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _raw(path: Path) -> dict:
    tree = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(tree, dict)
    return tree


def test_the_yaml_tree_has_exactly_the_keys_of_the_schema():
    tree = _raw(config_dir() / "trainer.yaml")
    del tree["defaults"], tree["hydra"]
    assert sorted(_leaves(tree)) == sorted(leaf_keys())


@pytest.mark.parametrize("model", MODELS)
def test_a_model_sets_every_key_that_is_left_to_it_and_no_other(model):
    tree = _raw(config_dir() / "trainer.yaml")
    left = {key for key in leaf_keys() if OmegaConf.is_missing(OmegaConf.create(_nested(tree, key)), key.rpartition(".")[2])}
    assert set(_leaves(_raw(config_dir() / "model" / f"{model}.yaml"))) == left


def _nested(tree, key):
    for part in key.split(".")[:-1]:
        tree = tree[part]
    return tree


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("estimator", ["gae", "grpo", "rloo"])
def test_every_model_is_valid_with_every_estimator(model, estimator):
    config = load_config([f"model={model}", f"algorithm.adv_estimator={estimator}"])
    assert config.uses_critic == (estimator == "gae")


def test_the_default_run_is_the_embedded_calculator():
    config = load_config()
    package = Path(agentlightning.__file__).parent / "calculator"
    assert Path(config.actor_rollout_ref.model.path) == package / "base"
    assert config.data.train_files == str(package / "train.jsonl")
    assert config.trainer.default_local_dir == "checkpoints/agentlightning/tiny"
    assert config.train_sampling() == SamplingParams(
        n=8, temperature=1.0, max_tokens=96, max_assistant_turns=4, max_tokens_per_turn=16
    )
    assert config.val_sampling().temperature == 0.0


def test_validation_samples_where_asked():
    val = "actor_rollout_ref.rollout.val_kwargs"
    config = load_config([f"{val}.do_sample=true", f"{val}.temperature=0.7", f"{val}.n=4"])
    assert (config.val_sampling().n, config.val_sampling().temperature) == (4, 0.7)


def test_without_multi_turn_there_is_one_turn_of_the_whole_length():
    sampling = load_config(["actor_rollout_ref.rollout.multi_turn.enable=false"]).train_sampling()
    assert (sampling.max_assistant_turns, sampling.max_tokens_per_turn) == (1, None)


def test_the_command_line_wins_over_the_model_whatever_the_order():
    config = load_config(["data.max_prompt_length=99", "model=qwen3_0_6b"])
    assert config.data.max_prompt_length == 99
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-0.6B"


def test_keys_follow_the_keys_they_are_tied_to():
    config = load_config(["data.train_batch_size=6", "trainer.seed=7", "actor_rollout_ref.actor.clip_ratio=0.3"])
    actor = config.actor_rollout_ref.actor
    assert (actor.ppo_mini_batch_size, config.critic.ppo_mini_batch_size, config.data.seed) == (6, 6, 7)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.3, 0.3)


def test_lists_become_tuples_and_the_config_is_frozen():
    config = load_config(["data.train_files=[a.jsonl,b.jsonl]", "actor_rollout_ref.rollout.stop=[done]"])
    assert config.data.train_files == ("a.jsonl", "b.jsonl")
    with pytest.raises(ValidationError, match="frozen"):
        config.trainer.seed = 2


def test_ray_takes_keys_of_its_own():
    assert load_config(["+ray_kwargs.ray_init.num_cpus=4"]).ray_kwargs.ray_init == {"num_cpus": 4}


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainer.save_frq=1", "trainer.save_freq"),
        ("save_freq=1", "trainer.save_freq"),
        ("trainer.lr=1e-3", "actor_rollout_ref.actor.optim.lr"),
        ("critic.lr=1e-3", "critic.optim.lr"),
        ("actor_rollout_ref.actor.clip_ratio_hgih=0.3", "actor_rollout_ref.actor.clip_ratio_high"),
        ("actor_rollout_ref.rollout.tempreature=1", "actor_rollout_ref.rollout.temperature"),
        ("data.max_promt_length=3", "data.max_prompt_length"),
        ("algorithm.kl_ctrl.kl_coeff=0.1", "algorithm.kl_ctrl.kl_coef"),
        ("+trainer.total_step=3", "trainer.total_epochs"),
        ("modle=tiny", "model"),
    ],
)
def test_a_mistyped_key_is_answered_with_the_nearest_real_one(override, nearest):
    with pytest.raises(ConfigError) as error:
        load_config([override])
    key = override.lstrip("+").partition("=")[0]
    assert f"unknown key {key!r}; did you mean {nearest!r}?" in str(error.value)


def test_every_key_with_its_last_letter_doubled_is_answered_with_itself():
    for key in leaf_keys():
        with pytest.raises(ConfigError) as error:
            check_overrides([f"{key}{key[-1]}=1"])
        assert f"did you mean {key!r}?" in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.save_freq=often", ["trainer.save_freq: given 'often'", "an integer", "trainer.save_freq=1"]),
        ("trainer.seed='1'", ["trainer.seed: given '1'", "an integer", "trainer.seed=1"]),
        ("trainer.seed=true", ["trainer.seed: given true", "an integer", "trainer.seed=1"]),
        ("data.shuffle=1", ["data.shuffle: given 1", "true or false", "data.shuffle=true"]),
        ("actor_rollout_ref.rollout.temperature=0", ["rollout.temperature: given 0", "more than 0", "rollout.temperature=1.0"]),
        ("actor_rollout_ref.rollout.top_p=1.5", ["top_p: given 1.5", "at most 1", "top_p=1.0"]),
        ("actor_rollout_ref.actor.optim.lr=inf", ["optim.lr: given inf", "finite", "optim.lr=0.002"]),
        ("actor_rollout_ref.actor.clip_ratio_low=nan", ["clip_ratio_low: given nan", "clip_ratio_low=0.2"]),
        ("actor_rollout_ref.actor.clip_ratio_c=1", ["clip_ratio_c: given 1", "more than 1", "clip_ratio_c=3.0"]),
        ("actor_rollout_ref.actor.optim.betas=[0.9]", ["optim.betas: given [0.9]", "optim.betas=[0.9,0.999]"]),
        (
            "actor_rollout_ref.rollout.merge_lora=maybe",
            ["merge_lora: given 'maybe'", "'auto', true or false", "merge_lora=auto"],
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.tool=calc",
            ["tool: given 'calc'", "pkg.mod:fn", "multi_turn.tool=agentlightning"],
        ),
        (
            "algorithm.adv_estimator=ppo",
            ["given 'ppo'", "'gae', 'grpo'", "'rloo'", "pkg.mod:fn", "algorithm.adv_estimator=grpo"],
        ),
        ("trainer.logger=[comet]", ["trainer.logger: given 'comet'", "'wandb'", "trainer.logger=[console]"]),
        ("data.train_files=null", ["data.train_files: given null", "a text or a list", "data.train_files=/"]),
        ("data.train_files=[]", ["data.train_files: given []", "not empty"]),
        ("data.max_prompt_length=null", ["data.max_prompt_length: given null", "an integer", "data.max_prompt_length=128"]),
        ("ray_kwargs.ray_init=3", ["ray_kwargs.ray_init: given 3", "ray_kwargs.ray_init={}"]),
        ("model=tinny", ["model: given 'tinny'", "qwen3_0_6b, qwen3_4b, tiny", "model=tiny"]),
        ("ray_kwargs.ray_init.num_cpus=2", ["+ray_kwargs.ray_init.num_cpus=2"]),
        ("~trainer.seed", ["~trainer.seed", "cannot be removed"]),
        ("data.mixture={a: 1}", ["added with a plus: '+data.mixture={a: 1}'"]),
        ("data.mixture.a=1", ["added with a plus: +data.mixture.a=1"]),
        ("+reward.functions.a={name: nothing}", ["reward.functions.a", "pkg.mod:fn"]),
        ("algorithm.adv_estimator=gdpo", ["+reward.functions.answer="]),
        ("fast", ["'fast'", "key=value"]),
        ("trainer.seed=1,2", ["trainer.seed=1,2"]),
        ("trainer.seed=${data.seeds}", ["data.seeds"]),
        ("trainer.experiment_name=???", ["experiment_name"]),
        ("trainer={a: 1}", ["Key 'a'"]),
    ],
)
def test_a_wrong_value_is_answered_with_what_was_given_what_is_expected_and_what_mends_it(override, words):
    with pytest.raises(ConfigError) as error:
        load_config([override])
    for word in words:
        assert word in str(error.value)


def test_the_named_override_mends_the_run():
    with pytest.raises(ConfigError) as error:
        load_config(["trainer.save_freq=often"])
    mending = str(error.value).partition("mend it with ")[2].removesuffix(" (the default)")
    assert load_config(["trainer.save_freq=often", mending]).trainer.save_freq == 1


def test_two_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(["trainer.save_freq=often", "data.shuffle=maybe"])
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == ["data.shuffle", "trainer.save_freq"]


def test_a_wrong_key_is_named_once_though_others_are_tied_to_it():
    with pytest.raises(ConfigError) as error:
        load_config(["data.train_batch_size=-1"])
    assert str(error.value).startswith("data.train_batch_size: given -1, expected at least 1")
    assert "ppo_mini_batch_size" not in str(error.value)


def test_a_config_from_elsewhere_is_checked_alike():
    composed = OmegaConf.create({"data": {"train_file": "a.jsonl"}})
    with pytest.raises(ConfigError) as error:
        validate(composed)
    assert "unknown key 'data.train_file'; did you mean 'data.train_files'?" in str(error.value)
    assert "trainer: not given" in str(error.value)


def test_the_configuration_is_checked_without_torch_ray_or_transformers():
    code = (
        "import sys; import agentlightning.verl.entrypoint; from agentlightning.verl.config import load_config; load_config(); "
        "print(sorted({'torch', 'ray', 'transformers', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.rollout.name=vllm", "on the very weights that train"),
        ("actor_rollout_ref.rollout.response_length=100", "data.max_response_length"),
        ("actor_rollout_ref.actor.checkpoint.async_save=true", "behind the next step"),
        ("actor_rollout_ref.actor.checkpoint.save_contents=[model]", "whole or it is not one"),
        ("trainer.balance_batch=false", "always balanced"),
        ("+trainer.balance_batch=false", "always balanced"),
    ],
)
def test_a_key_of_verl_that_is_not_here_is_refused_with_the_reason(override, words):
    with pytest.raises(ConfigError, match="is a key of verl's that is not here") as error:
        load_config([override])
    assert words in str(error.value)


def test_no_refused_key_is_a_key():
    assert [key for key in leaf_keys() if why_not_here(key) is not None] == []


def test_every_key_that_verls_users_know_is_here_or_refused():
    known = set(leaf_keys())
    sections = {key.rpartition(".")[0] for key in known}
    missing = [key for key in VERL_KEYS if key not in known and key not in sections and why_not_here(key) is None]
    assert missing == []
