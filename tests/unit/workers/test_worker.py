"""A worker's updates against one whole-batch loss by autograd; splitting changes nothing; state goes round."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agentlightning.errors import ConfigError, NumericsError, StaleAdapterError
from agentlightning.models.base import load_base
from agentlightning.types import Batch, LoraShape, MicroBatches, SamplingParams
from agentlightning.verl.batching import MiniBatchPlan, make_batch, rollout_probs_diff, with_advantages
from agentlightning.verl.config import load_config
from agentlightning.workers.actor import Actor
from agentlightning.workers.settings import ActorSettings, CriticSettings, OptimSettings, RolloutSettings, WorkerSettings
from agentlightning.workers.shards import balanced_shards, prompt_shards
from agentlightning.workers.worker import Worker, load_tool

SAMPLING = SamplingParams(n=4, max_tokens=48, max_assistant_turns=3, max_tokens_per_turn=16)
OPTIM = OptimSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0)
ACTOR = ActorSettings(
    optim=OPTIM,
    micro_batch=MicroBatches(64),
    log_prob_micro_batch=MicroBatches(64),
    ref_micro_batch=MicroBatches(64),
    temperature=1.0,
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
    loss_agg_mode="token-mean",
    entropy_coeff=0.0,
    kl_loss_coef=0.0,
    kl_loss_type="low_var_kl",
)
CRITIC = CriticSettings(
    kind="head",
    lora=LoraShape(4, 8),
    optim=replace(OPTIM, lr=1e-2),
    micro_batch=MicroBatches(64),
    cliprange_value=0.5,
    loss_agg_mode="token-mean",
)


def worker_settings(base_path: str) -> WorkerSettings:
    return WorkerSettings(
        model_path=base_path,
        dtype="float32",
        device="cpu",
        gradient_checkpointing=False,
        lora=LoraShape(4, 8),
        seed=0,
        num_threads=1,
        actor=ACTOR,
        rollout=RolloutSettings(max_num_seqs=64, tool="agentlightning.calculator.task:calculate"),
    )


@pytest.fixture
def settings(base_path):
    return worker_settings(base_path)


@pytest.fixture(scope="module")
def batch(base_path, prompts) -> Batch:
    """Real samples with made-up advantages, some of them zero."""
    settings = worker_settings(base_path)
    completions = Worker(settings).generate(prompts[:4], SAMPLING, 0, 1, 0)
    rng = np.random.default_rng(0)
    made = make_batch(prompts, completions, np.zeros(len(completions)))
    advantages = rng.normal(size=made.mask_BT.shape[0]) * (rng.random(made.mask_BT.shape[0]) < 0.8)
    return made.with_columns(
        advantages=np.where(made.mask_BT, advantages[:, None], 0.0).astype(np.float32),
        returns=np.where(made.mask_BT, rng.normal(size=made.mask_BT.shape), 0.0).astype(np.float32),
        values=np.zeros(made.mask_BT.shape, dtype=np.float32),
    )


def plan(batch: Batch, prompts_per_mini_batch: int = 4, epochs: int = 1):
    return MiniBatchPlan(prompts_per_mini_batch, 4, epochs, shuffle=False, seq_norm=48.0).mini_batches(batch, 0, 1)


def weights(worker: Worker) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in worker.actor.parameters.values()])


def gradient_of_one_update(settings: WorkerSettings, batch: Batch) -> np.ndarray:
    worker = Worker(settings)
    worker.update_actor(batch, plan(batch), 1)
    return worker.actor.optimizer.flat_grad.numpy().copy()


def test_the_gradient_is_that_of_the_loss_on_the_whole_batch(settings, batch, base_path):
    settings = replace(
        settings, actor=replace(ACTOR, optim=replace(OPTIM, grad_clip=1e9), kl_loss_coef=0.05, entropy_coeff=0.01)
    )
    worker = Worker(settings)
    with torch.no_grad():  # away from the start, where half of the gradients are zero
        for i, parameter in enumerate(worker.actor.parameters.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.02)
    state = worker.state()
    reference = Worker(settings)
    reference.load_state(state)
    base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False)
    parameters = reference.actor.optimizer.parameters
    terms, tokens = [], int(batch.mask_BT.sum())
    for row in range(len(batch)):
        prompt = batch.prompt_BP[row, : batch.prompt_len_B[row]].tolist()
        response = batch.response_BT[row, : batch.response_len_B[row]].tolist()
        ids = torch.tensor([prompt + response])
        log_p = reference.adapters.base(ids).logits[0].log_softmax(-1)
        with torch.no_grad():
            ref = base(ids).logits[0].log_softmax(-1)
        for t in np.flatnonzero(batch.mask_BT[row]):
            here = log_p[len(prompt) + t - 1]
            logp, ref_logp = here[response[t]], ref[len(prompt) + t - 1, response[t]]
            ratio = (logp - logp.detach()).exp()
            k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
            entropy = -(here.exp() * here).sum()
            terms.append(-ratio * float(batch.columns["advantages"][row, t]) + 0.05 * k3 - 0.01 * entropy)
    expected = torch.autograd.grad(sum(terms) / tokens, list(parameters.values()))
    expected = torch.cat([g.flatten() for g in expected]).numpy()
    with_ref = batch.with_columns(ref_log_prob=worker.compute_ref_log_prob(batch).log_probs_BT)
    worker.update_actor(with_ref, plan(batch), 1)
    ours = worker.actor.optimizer.flat_grad.numpy()
    assert np.linalg.norm(ours - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_micro_batches_do_not_change_the_gradient(settings, batch, mode):
    gradients = []
    for sizes in (MicroBatches(64), MicroBatches(3), MicroBatches(1, 60)):
        actor = replace(ACTOR, loss_agg_mode=mode, micro_batch=sizes)
        gradients.append(gradient_of_one_update(replace(settings, actor=actor), batch))
    for other in gradients[1:]:
        assert np.linalg.norm(other - gradients[0]) < 1e-5 * np.linalg.norm(gradients[0])


def test_shards_of_workers_add_up_to_the_whole_gradient(settings, batch):
    whole = gradient_of_one_update(replace(settings, actor=replace(ACTOR, optim=replace(OPTIM, grad_clip=1e9))), batch)
    parts = []
    for shard in prompt_shards(batch, 3):
        worker = Worker(replace(settings, actor=replace(ACTOR, optim=replace(OPTIM, grad_clip=1e9))))
        [mini] = plan(batch)
        worker.update_actor(batch.rows(shard), [replace(mini, rows=np.arange(len(shard)))], 1)
        parts.append(worker.actor.optimizer.flat_grad.numpy().copy())
    assert np.linalg.norm(sum(parts) - whole) < 1e-5 * np.linalg.norm(whole)


def test_leaving_out_samples_without_advantage_is_exact(settings, batch, monkeypatch):
    ours = gradient_of_one_update(settings, batch)
    monkeypatch.setattr(Actor, "_can_move", lambda self, batch, rows, selected_BT: np.ones(len(rows), dtype=bool))
    everything = gradient_of_one_update(settings, batch)
    assert np.linalg.norm(everything - ours) < 1e-6 * np.linalg.norm(ours)


def test_the_rollouts_log_probs_are_the_training_passs(settings, batch):
    worker = Worker(settings)
    fresh = worker.compute_log_prob(batch)
    assert rollout_probs_diff(batch, fresh.log_probs_BT)["training/rollout_probs_diff_max"] < 1e-4
    assert fresh.entropy_sum > 0
    assert fresh.tokens == int(batch.mask_BT.sum())
    worker.update_actor(batch, plan(batch), 1)
    moved = rollout_probs_diff(batch, worker.compute_log_prob(batch).log_probs_BT)
    assert moved["training/rollout_probs_diff_max"] > 1e-3, "the measure must be able to see another policy"


def test_the_engine_samples_from_the_weights_that_were_trained(settings, batch, prompts):
    worker = Worker(settings)
    worker.update_actor(batch, plan(batch), 1)
    worker.update_weights(1)
    completions = worker.generate(prompts[:4], SAMPLING, 0, 2, 1)
    made = make_batch(prompts, completions, np.zeros(len(completions)))
    assert rollout_probs_diff(made, worker.compute_log_prob(made).log_probs_BT)["training/rollout_probs_diff_max"] < 1e-4


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_the_critic_learns_the_returns(settings, batch, kind):
    worker = Worker(replace(settings, critic=replace(CRITIC, kind=kind)))
    before = weights(worker)
    losses = []
    for step in range(1, 9):
        values = worker.compute_values(batch)
        [metrics] = worker.update_critic(batch.with_columns(values=values), plan(batch), step)
        by_hand = 0.5 * ((values - batch.columns["returns"])[batch.mask_BT] ** 2).mean()
        assert metrics["vf_loss"] == pytest.approx(by_hand, rel=1e-4), "at the first pass nothing is clipped"
        losses.append(metrics["vf_loss"])
    assert losses[-1] < losses[0]
    assert np.array_equal(before, weights(worker)), "the actor's adapter is not the critic's to change"


def test_nan_in_the_base_is_named_and_changes_nothing(settings, batch):
    worker = Worker(settings)
    before = weights(worker)
    with torch.no_grad():
        worker.adapters.base.get_output_embeddings().weight[5, 3] = torch.nan
    with pytest.raises(NumericsError, match=r"log-probabilities of a sample of prompt 'train:\d+'"):
        worker.update_actor(batch, plan(batch), 1)
    assert np.array_equal(before, weights(worker))


def test_row_first_rollout_with_base_weights_another_version_than_asked_for_is_an_error(settings, prompts):
    worker = Worker(settings)
    worker.update_weights(3)
    with pytest.raises(StaleAdapterError, match="version 2, but the engine holds 3"):
        worker.generate(prompts[:1], SAMPLING, 0, 1, 2)
    assert worker.generate(prompts[:1], SAMPLING, 0, 1, 3)[0].adapter_version == 3


@pytest.mark.parametrize("kind", [None, "head", "adapter"])
def test_state_goes_round_bit_for_bit(settings, batch, kind):
    settings = replace(settings, critic=replace(CRITIC, kind=kind) if kind else None)
    first, second = Worker(settings), Worker(settings)

    def train(worker: Worker, step: int) -> None:
        if kind:
            worker.update_critic(batch, plan(batch), step)
        worker.update_actor(batch, plan(batch), step)
        worker.update_weights(step)

    train(first, 1)
    second.load_state(first.state())
    assert second.version == 1
    for worker in (first, second):
        train(worker, 2)
    a, b = first.state(), second.state()
    for mine, theirs in ((a.actor, b.actor), (a.critic, b.critic)):
        if mine is not None and theirs is not None:
            assert all(np.array_equal(mine.weights[name], theirs.weights[name]) for name in mine.weights)
            assert all(np.array_equal(mine.optimizer[name], theirs.optimizer[name]) for name in mine.optimizer)
    if a.value_head is not None and b.value_head is not None:
        assert all(np.array_equal(a.value_head[name], b.value_head[name]) for name in a.value_head)


def test_the_saved_adapter_is_one_that_peft_loads(settings, batch, base_path, tmp_path):
    import json

    from peft import PeftModel
    from safetensors.numpy import save_file

    worker = Worker(settings)
    worker.update_actor(batch, plan(batch), 1)
    state = worker.state().actor
    (tmp_path / "adapter_config.json").write_text(json.dumps(state.config))
    save_file(dict(state.weights), tmp_path / "adapter_model.safetensors")
    base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    worker.adapters.use("actor")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, worker.adapters.base(ids).logits)


def test_mini_batches_cover_each_epoch_and_shuffle_by_seed_and_step(batch):
    shuffled = MiniBatchPlan(2, 4, 2, shuffle=True, seq_norm=48.0)
    first = [mini.rows.tolist() for mini in shuffled.mini_batches(batch, 0, 1)]
    assert len(first) == 4
    for epoch in (first[:2], first[2:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(16))
    assert first == [mini.rows.tolist() for mini in shuffled.mini_batches(batch, 0, 1)]
    assert any([m.rows.tolist() for m in shuffled.mini_batches(batch, 0, step)] != first for step in range(2, 6))


def test_advantages_of_the_group(batch):
    config = load_config().algorithm
    scores = np.arange(16, dtype=np.float32) % 4
    last = batch.response_len_B - 1
    token_scores = np.zeros(batch.mask_BT.shape, dtype=np.float32)
    token_scores[np.arange(16), last] = scores
    done, _ = with_advantages(batch.with_columns(token_level_scores=token_scores), config, None)  # pyright: ignore[reportArgumentType]
    expected = (scores - 1.5) / (np.std([0, 1, 2, 3], ddof=1) + 1e-6)
    for row in range(16):
        assert done.columns["advantages"][row][batch.mask_BT[row]] == pytest.approx(expected[row], rel=1e-5)


def test_shards_are_balanced_and_whole():
    lengths = np.array([100, 1, 1, 50, 50, 2, 99, 3])
    shards = balanced_shards(lengths, 3)
    assert sorted(np.concatenate(shards)) == list(range(8))
    assert max(lengths[shard].sum() for shard in shards) <= 110


def test_prompts_that_move_the_policy_are_shared_out_evenly(batch):
    uids = np.array(batch.uids)
    some = list(dict.fromkeys(batch.uids))[:2]  # the others' samples all score alike
    moves_B = np.isin(uids, some)
    advantages_BT = np.where(batch.mask_BT & moves_B[:, None], 1.0, 0.0).astype(np.float32)
    shards = prompt_shards(batch.with_columns(advantages=advantages_BT), 2)
    assert sorted(np.concatenate(shards)) == list(range(len(batch)))
    for shard in shards:
        assert len(set(uids[shard][moves_B[shard]])) == 1
        assert len(set(uids[shard])) == len(set(uids)) / 2
        assert uids[shard].tolist() == sorted(uids[shard].tolist(), key=batch.uids.index)


def test_a_prompt_counts_once_for_all_its_samples():
    prompts = [3, 3, 100, 100, 100, 100, 3, 3, 3, 3, 3, 3]
    responses = [90, 90, 1, 1, 1, 1, 45, 45, 1, 1, 40, 40]
    uids = ["a"] * 2 + ["b"] * 4 + ["c"] * 2 + ["d"] * 2 + ["e"] * 2
    rows, width = len(uids), max(responses)
    batch = Batch(
        uids=tuple(uids),
        prompt_BP=np.zeros((rows, 100), dtype=np.int32),
        prompt_len_B=np.array(prompts, dtype=np.int32),
        response_BT=np.zeros((rows, width), dtype=np.int32),
        response_len_B=np.array(responses, dtype=np.int32),
        mask_BT=np.ones((rows, width), dtype=np.bool_),
        adapter_version=0,
    )
    of_workers = [{uids[row] for row in shard} for shard in prompt_shards(batch, 2)]
    assert of_workers == [{"a", "d", "e"}, {"b", "c"}]  # 183 + 5 + 83 and 104 + 93 tokens


def test_a_tool_that_is_not_there():
    with pytest.raises(ConfigError, match=r"multi_turn\.tool="):
        load_tool("agentlightning.calculator.task:nothing")
