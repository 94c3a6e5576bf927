"""The built-in trainer's update and the same data through `forward_backward` and `optim_step` give the same adapter."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from agentlightning.tinker import AdamParams, Datum, ModelInput, ServiceClient
from agentlightning.types import Batch, LoraShape, MicroBatches, SamplingParams
from agentlightning.verl.batching import MiniBatchPlan, make_batch
from agentlightning.workers.settings import ActorSettings, OptimSettings, RolloutSettings, WorkerSettings
from agentlightning.workers.worker import Worker

RANK, ALPHA = 4, 32  # the alpha that a training client's adapters have
OPTIM = OptimSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=0.2)
ADAM = AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, grad_clip_norm=0.2)
STEPS = 3  # the first step of Adam hides the size of the gradient


def worker_settings(base_path: str) -> WorkerSettings:
    sizes = MicroBatches(5)
    actor = ActorSettings(
        optim=OPTIM,
        micro_batch=sizes,
        log_prob_micro_batch=sizes,
        ref_micro_batch=sizes,
        temperature=1.0,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        clip_ratio_c=1e6,  # no dual clip: Tinker's ppo has none
        loss_agg_mode="token-mean",
        entropy_coeff=0.0,
        kl_loss_coef=0.0,
        kl_loss_type="low_var_kl",
    )
    rollout = RolloutSettings(max_num_seqs=64, tool="agentlightning.calculator.task:calculate")
    shape = LoraShape(RANK, ALPHA)
    return WorkerSettings(base_path, "float32", "cpu", False, shape, seed=0, num_threads=1, actor=actor, rollout=rollout)


@pytest.fixture(scope="module")
def worker(base_path) -> Worker:
    return Worker(worker_settings(base_path))


@pytest.fixture(scope="module")
def start(worker):
    """The worker's state before anything was trained."""
    return worker.state()


@pytest.fixture(scope="module")
def batch(worker, start, prompts) -> Batch:
    """Real samples, tool results among them, of a policy that has moved so far that some ratios are clipped."""
    params = SamplingParams(n=4, max_tokens=48, max_assistant_turns=3, max_tokens_per_turn=16)
    completions = worker.generate(prompts[:4], params, 0, 1, 0)
    made = make_batch(prompts, completions, np.zeros(len(completions)))
    rng = np.random.default_rng(0)
    advantages = np.where(made.mask_BT, rng.normal(size=(len(made), 1)), 0.0).astype(np.float32)
    old = worker.compute_log_prob(made).log_probs_BT + rng.normal(scale=0.2, size=made.mask_BT.shape)
    return made.with_columns(advantages=advantages, old_log_probs=np.where(made.mask_BT, old, 0.0).astype(np.float32))


def data_of(batch: Batch) -> list[Datum]:
    """The batch in the words of a training client: the mean over tokens is in the advantages, what is not trained has none."""
    tokens = int(batch.mask_BT.sum())
    data = []
    for row in range(len(batch)):
        prompt = batch.prompt_BP[row, : batch.prompt_len_B[row]].tolist()
        length = int(batch.response_len_B[row])
        ids = prompt + batch.response_BT[row, :length].tolist()
        columns = {
            name: np.concatenate([np.zeros(len(prompt) - 1), column[row, :length]])
            for name, column in (
                ("logprobs", batch.columns["old_log_probs"]),
                ("advantages", batch.columns["advantages"] * batch.mask_BT / tokens),
            )
        }
        data.append(Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], **columns}))
    return data


@pytest.mark.parametrize("loss_fn", ["ppo", "importance_sampling"])
def test_the_trainers_update_and_the_clients_are_the_same(loss_fn, worker, start, batch, tmp_path, base_path):
    clip = 0.2 if loss_fn == "ppo" else 1e6
    worker.actor.settings = replace(worker.actor.settings, clip_ratio_low=clip, clip_ratio_high=clip)
    with ServiceClient(backend="inprocess", root=tmp_path, num_threads=1) as service:
        client = service.create_lora_training_client(base_path, rank=RANK, train_unembed=False)
        before = load_file(f"{client.save_state('before').result().path}/actor/adapter_model.safetensors")
        worker.load_state(replace(start, actor=replace(start.actor, weights=before)))
        for _ in range(STEPS):
            client.forward_backward(data_of(batch), loss_fn)
            client.optim_step(ADAM)
        after = load_file(f"{client.save_state('after').result().path}/actor/adapter_model.safetensors")
    plan = MiniBatchPlan(4, 4, 1, shuffle=False, seq_norm=48.0).mini_batches(batch, 0, 1)
    norms = [worker.update_actor(batch, plan, step + 1).metrics[0]["grad_norm"] for step in range(STEPS)]
    trained = worker.state().actor.weights
    assert max(norms) > ADAM.grad_clip_norm  # it has clipped
    assert after.keys() == trained.keys()
    moved = np.concatenate([np.abs(after[name] - before[name]).ravel() for name in after])
    apart = np.concatenate([np.abs(after[name] - trained[name]).ravel() for name in after])
    assert moved.max() > 2e-3
    # Adam divides by the gradient's size, so where that is all but zero its rounding error (1e-9) shows, in a few numbers.
    assert np.quantile(apart, 0.999) < 3e-6
    assert apart.max() < 1e-4
