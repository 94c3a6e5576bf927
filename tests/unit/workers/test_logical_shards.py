"""One, two, three and four workers give the same bits; the tree's sum against float64 and against one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from several_workers import Processes

from agentlightning.checkpoint import store
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.types import LoraShape, MicroBatches, SamplingParams
from agentlightning.verl.batching import MiniBatchPlan, make_batch
from agentlightning.verl.state import TrainerState, checkpoint_files, worker_state
from agentlightning.workers.group import WorkerGroup
from agentlightning.workers.logical_shards import GradientTree, subtrees
from agentlightning.workers.settings import ActorSettings, CriticSettings, OptimSettings, RolloutSettings, WorkerSettings
from agentlightning.workers.shards import shards_of_workers

SAMPLING = SamplingParams(n=2, max_tokens=24, max_assistant_turns=2, max_tokens_per_turn=8)
OPTIM = OptimSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0)
SHARDS = 4
ACTOR = ActorSettings(
    optim=OPTIM,
    micro_batch=MicroBatches(64, 160),
    log_prob_micro_batch=MicroBatches(64, 160),
    ref_micro_batch=MicroBatches(64, 160),
    temperature=1.0,
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
    loss_agg_mode="token-mean",
    entropy_coeff=0.001,
    kl_loss_coef=0.01,
    kl_loss_type="low_var_kl",
)
CRITIC = CriticSettings("head", LoraShape(4, 8), replace(OPTIM, lr=1e-2), MicroBatches(64, 160), 0.5, "token-mean")
CASES = {
    "grpo": (ACTOR, None),
    "head, kl_cov": (replace(ACTOR, loss_mode="kl_cov", kl_cov_ratio=0.05, entropy_coeff=0.0, kl_loss_coef=0.0), CRITIC),
    "adapter, clip_cov": (
        replace(ACTOR, loss_mode="clip_cov", clip_cov_ratio=0.05, clip_cov_lb=-1.0),
        replace(CRITIC, kind="adapter"),
    ),
}


@pytest.fixture(scope="module")
def processes():
    processes = Processes(4)
    yield processes
    processes.end()


def settings_of(case: str, base_path: str, logical_shards: int | None = SHARDS) -> WorkerSettings:
    actor, critic = CASES[case]
    return WorkerSettings(
        model_path=base_path,
        dtype="float32",
        device="cpu",
        gradient_checkpointing=False,
        lora=LoraShape(4, 8),
        seed=0,
        num_threads=1,
        actor=actor,
        rollout=RolloutSettings(max_num_seqs=16, tool="agentlightning.calculator.task:calculate"),
        critic=critic,
        logical_shards=logical_shards,
    )


def train(group: WorkerGroup, prompts, critic: bool, first_step: int = 1, steps: int = 1) -> list[object]:
    """All that a trainer would see of these steps: samples, numbers, metrics."""
    seen: list[object] = []
    for step in range(first_step, first_step + steps):
        completions = group.generate(prompts, SAMPLING, seed=7, step=step, version=step - 1)
        seen += [(c.token_ids.tobytes(), c.logprobs.tobytes()) for c in completions]
        batch = make_batch(prompts, completions, np.zeros(len(completions)))
        rng = np.random.default_rng(step)
        advantages_BT = np.where(batch.mask_BT, rng.normal(size=len(batch))[:, None], 0.0).astype(np.float32)
        old, ref = group.compute_log_prob(batch, with_squares=True), group.compute_ref_log_prob(batch)
        assert old.sum_pi_squared_BT is not None
        seen += [old.log_probs_BT.tobytes(), old.entropy_sum, old.tokens, old.sum_pi_squared_BT.tobytes()]
        seen += [ref.log_probs_BT.tobytes(), ref.entropy_sum]
        batch = batch.with_columns(
            advantages=advantages_BT, returns=advantages_BT, old_log_probs=old.log_probs_BT, ref_log_prob=ref.log_probs_BT
        )
        plan = MiniBatchPlan(5, SAMPLING.n, 1, shuffle=True, seq_norm=24.0).mini_batches(batch, 0, step)
        if critic:
            batch = batch.with_columns(values=group.compute_values(batch))
            seen += [batch.columns["values"].tobytes(), group.update_critic(batch, plan, step)]
        metrics, log_probs_BT = group.update_actor(batch, plan, step)
        seen += [metrics, log_probs_BT.tobytes()]
        group.update_weights(step)
    return seen


def bits(state) -> dict[str, bytes]:
    """Every tensor of a `WorkerState`."""
    parts = {"actor": state.actor.weights, "actor.optim": state.actor.optimizer}
    if state.critic is not None:
        parts |= {"critic": state.critic.weights, "critic.optim": state.critic.optimizer, "head": state.value_head}
    return {f"{part} {name}": array.tobytes() for part, arrays in parts.items() for name, array in arrays.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_workers_changes_no_bit(case, processes, base_path, prompts, tmp_path):
    settings = settings_of(case, base_path)
    seen, states = {}, {}
    for world_size in {"grpo": (1, 2, 3, 4), "head, kl_cov": (1, 2)}.get(case, (1, 3)):
        backend = processes.backend(settings, world_size, tmp_path / f"rendezvous{world_size}")
        seen[world_size] = train(WorkerGroup(backend, SHARDS), prompts[:10], settings.critic is not None)
        of_workers = [bits(state) for state in backend.call("state", [()] * world_size)]
        assert all(state == of_workers[0] for state in of_workers)
        states[world_size] = of_workers[0]
    for world_size in seen:
        assert seen[world_size] == seen[1], f"{world_size} workers"
        assert states[world_size] == states[1], f"{world_size} workers"


def test_what_four_workers_saved_goes_on_with_two_and_one(processes, base_path, prompts, tmp_path):
    settings = settings_of("grpo", base_path)
    backend = processes.backend(settings, 4, tmp_path / "four")
    train(WorkerGroup(backend, SHARDS), prompts[:10], critic=False)
    saved = backend.call_first("state")
    ends = []
    for world_size in (4, 2, 1):
        if world_size < 4:
            backend = processes.backend(settings, world_size, tmp_path / f"again{world_size}")
        group = WorkerGroup(backend, SHARDS)
        group.load_state(saved)
        seen = train(group, prompts[6:16], critic=False, first_step=2)
        ends.append((seen, bits(backend.call_first("state"))))
    assert ends[1] == ends[0]
    assert ends[2] == ends[0]


@pytest.mark.parametrize(("share_bytes", "writers"), [(1, 4), (None, 1)])
def test_as_many_workers_write_as_there_is_to_write(share_bytes, writers, processes, base_path, prompts, tmp_path):
    """And what they have written is what the first of them holds."""
    backend = processes.backend(settings_of("grpo", base_path), 4, tmp_path / "rendezvous")
    group = WorkerGroup(backend, SHARDS)
    (tmp_path / "witness").write_text("here")
    group.choose_writers(tmp_path / "witness", *([] if share_bytes is None else [share_bytes]))
    train(group, prompts[:10], critic=False)
    expected = backend.call_first("state").actor
    with CheckpointManager(tmp_path / "run", save_freq=1) as manager:
        files = checkpoint_files(group.snapshot(1), group.adapter_configs(), TrainerState(global_step=1), {}, {})
        saved = store.load(manager.save(1, files).path)
    first = 0 if writers == 1 else 1  # the first of several has its share in the adapter itself
    assert sorted(path for path in saved.tensors if "optimizer" in path) == [
        f"actor/optimizer-{writer:05}-of-{writers:05}.safetensors" for writer in range(first, writers)
    ]
    held = worker_state(saved, uses_critic=False).actor
    for mine, theirs in ((held.weights, expected.weights), (held.optimizer, expected.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_without_logical_shards_the_same_is_learned_but_not_to_the_last_bit(processes, base_path, prompts, tmp_path):
    """What the other tests compare can differ, and by how little."""
    settings = settings_of("grpo", base_path, logical_shards=None)
    weights = []
    for world_size in (1, 3):
        backend = processes.backend(settings, world_size, tmp_path / f"plain{world_size}")
        train(WorkerGroup(backend), prompts[:10], critic=False)
        state = backend.call_first("state")
        weights.append(np.concatenate([state.actor.weights[name].ravel() for name in sorted(state.actor.weights)]))
    assert not np.array_equal(*weights)
    assert np.abs(weights[0] - weights[1]).max() < 2e-3


@pytest.mark.parametrize(("shards", "world_size"), [(8, 1), (8, 3), (8, 8), (4, 3), (1, 1)])
def test_workers_have_neighbouring_shards_and_whole_subtrees(shards, world_size):
    parts = shards_of_workers(shards, world_size)
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        leaves = [place * 2**level + i for level, place in subtrees(part) for i in range(2**level)]
        assert leaves == list(part)


def test_the_tree_adds_in_pairs():
    leaves = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, 3.0]), torch.tensor([1.0, 4.0])]
    tree = GradientTree(4, 0)
    for leaf in leaves:
        tree.add(leaf)
    pairs = [np.float32(1e8) + np.float32(1.0), np.float32(-1e8) + np.float32(1.0)]
    assert tree.total().tolist() == [float(pairs[0] + pairs[1]), 10.0]
    assert torch.equal(leaves[0], torch.tensor([1e8, 1.0])), "leaves are only read"


@pytest.mark.parametrize(("case", "logical_shards"), [("adapter, clip_cov", SHARDS), ("head, kl_cov", None)])
def test_a_sharded_base_gives_the_bits_of_a_whole_one(case, logical_shards, processes, base_path, prompts, tmp_path):
    settings = settings_of(case, base_path, logical_shards)
    settings = replace(
        settings,
        rollout=replace(settings.rollout, merge_lora=False),
        gradient_checkpointing=logical_shards is None,  # whole rows instead of shared prompts
    )
    ends = []
    for sharded in (False, True):
        backend = processes.backend(replace(settings, sharded_base=sharded), 2, tmp_path / f"sharded{sharded}")
        seen = train(WorkerGroup(backend, logical_shards), prompts[:10], critic=True)
        ends.append((seen, bits(backend.call_first("state"))))
        if sharded:
            assert all(backend.call("base_is_sharded", [()] * 2))
    assert ends[0] == ends[1]
