"""What a configuration says about logical shards, the sharded base and the number of workers."""

import pytest

from agentlightning.errors import ConfigError
from agentlightning.verl.config import load_config
from agentlightning.verl.fingerprint import run_fingerprint
from agentlightning.verl.rules import check_world_size, derived_sizes, logical_shards

EXACT = "trainer.exact_elastic=true"
FSDP2 = "actor_rollout_ref.actor.strategy=fsdp2"


@pytest.mark.parametrize(
    ("overrides", "shards"),
    [
        ([], None),
        ([EXACT], 8),
        ([EXACT, "actor_rollout_ref.actor.ppo_mini_batch_size=4"], 4),
        ([EXACT, "data.train_batch_size=12", "actor_rollout_ref.actor.ppo_mini_batch_size=6"], 4),
        ([EXACT, "algorithm.adv_estimator=gae", "critic.ppo_mini_batch_size=2"], 2),
        ([EXACT, "trainer.logical_shards=16"], 16),
    ],
)
def test_the_number_of_shards_follows_from_the_configuration_alone(overrides, shards):
    assert logical_shards(load_config(overrides)) == shards


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([EXACT, "trainer.logical_shards=6"], "trainer.logical_shards=4"),
        ([EXACT, "trainer.logical_shards=32"], "trainer.logical_shards=16"),
        (["trainer.logical_shards=4"], "trainer.exact_elastic=true"),
        ([FSDP2, "trainer.backend=inprocess"], "actor_rollout_ref.actor.strategy=replicated"),
        ([FSDP2, "actor_rollout_ref.rollout.merge_lora=true"], "actor_rollout_ref.rollout.merge_lora=auto"),
        ([EXACT, "trainer.n_gpus_per_node=9"], "trainer.logical_shards=16"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_mends_it(overrides, words):
    with pytest.raises(ConfigError) as refused:
        load_config(overrides)
    assert f"mend it with {words}" in str(refused.value)


def test_workers_of_a_sharded_base_need_the_same_number_of_shards_each():
    config = load_config([EXACT, FSDP2])
    check_world_size(config, 4)
    check_world_size(load_config([EXACT]), 3)
    with pytest.raises(ConfigError, match=r"trainer\.n_gpus_per_node=2 or trainer\.exact_elastic=false"):
        check_world_size(config, 3)


def test_auto_is_what_the_cluster_has():
    assert load_config(["trainer.n_gpus_per_node=auto"]) == load_config(["trainer.n_gpus_per_node=null"])


def test_the_start_says_whether_the_last_bits_hang_on_the_workers():
    assert "may differ on another number of workers" in "\n".join(derived_sizes(load_config([]), 1))
    assert "the same on 1 to 8 workers (8 logical shards)" in "\n".join(derived_sizes(load_config([EXACT]), 1))


def test_another_number_of_workers_or_a_sharded_base_breaks_no_checkpoint():
    plain = run_fingerprint(load_config([EXACT]), None)
    other = run_fingerprint(load_config([EXACT, FSDP2, "trainer.n_gpus_per_node=2"]), None)
    assert other["breaking"] == plain["breaking"]
    assert other["harmless"]["actor_rollout_ref.actor"] == plain["harmless"]["actor_rollout_ref.actor"]
    shards = run_fingerprint(load_config([EXACT, "trainer.logical_shards=4"]), None)
    assert shards["breaking"] == plain["breaking"]
    assert shards["harmless"] != plain["harmless"], "the last bits change, which is worth a warning"
