"""What loggers show of the configuration."""

import pytest

from agentlightning.verl.config import load_config
from agentlightning.verl.tracking_secrets import tell_secrets, without_secrets


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("s3://key:pass@bucket/run", "s3://***@bucket/run"),
        ("https://ghp_abc@github.com/a/b", "https://***@github.com/a/b"),
        ("redis://:p@ss@host:6379", "redis://***@host:6379"),
        ("see https://u:p@a/b and https://c@d", "see https://***@a/b and https://***@d"),
        ("https://host/x?user=me&X-Token=abc&n=2#top", "https://host/x?user=me&X-Token=***&n=2#top"),
        ("https://host/mail/me@home", "https://host/mail/me@home"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("token-mean", "token-mean"),
    ],
)
def test_urls(given: str, shown: str) -> None:
    assert without_secrets(given) == shown


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "hf_token",
        "aws_secret_access_key",
        "accessKeyId",
        "password",
        "redis_passwd",
        "Authorization",
        "credentials",
    ],
)
def test_values_under_secret_names(name: str) -> None:
    tree = {"runtime_env": {"env_vars": {name: "abc"}}, "l": [{name: ["a", "b"]}, ({name: {"x": "abc"}},)]}
    assert without_secrets(tree) == {"runtime_env": {"env_vars": {name: "***"}}, "l": [{name: "***"}, [{name: "***"}]]}


def test_numbers_that_count_something_stay_and_a_numeric_password_does_not() -> None:
    tree = {"num_key_value_heads": 8, "ppo_max_token_len_per_gpu": 1024, "password": 1234, "token": None, "use_token": True}
    assert without_secrets(tree) == {**tree, "password": "***"}


def test_the_given_tree_is_left_as_it_is() -> None:
    tree = {"a": {"token": "x"}}
    without_secrets(tree)
    assert tree == {"a": {"token": "x"}}


def test_no_key_of_the_configuration_is_hidden_but_ray_s_secrets_are() -> None:
    plain = load_config([]).model_dump(mode="json")
    assert without_secrets(plain) == plain
    word = "+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY=abc"
    assert "abc" not in str(without_secrets(load_config([word]).model_dump(mode="json")))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("+ray_kwargs.ray_init.runtime_env.env_vars.API_KEY=abc", True),
        ("+ray_kwargs.ray_init.runtime_env={env_vars: {API_KEY: abc}}", True),
        ("trainer.default_local_dir=s3://u:p@bucket/run", True),
        ("data.prompt_key=prompt", False),
        ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512", False),
        ("actor_rollout_ref.actor.loss_agg_mode=token-mean", False),
        ("trainer.seed=2", False),
    ],
)
def test_a_command_line_that_tells_a_secret(word: str, told: bool) -> None:
    assert tell_secrets(["trainer.seed=1", word]) is told
