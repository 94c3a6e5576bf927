"""The built-in trainer's update and the same data through `forward_backward` and `optim_step` give the same adapter.

And a loop of one's own goes on from a checkpoint of the trainer, optimizer and all.
"""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from agentlightning.checkpoint.fingerprint import MODEL_PATH, model_identity
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint_utils import get_last_checkpoint
from agentlightning.errors import CheckpointError, UserError
from agentlightning.tinker import AdamParams, Datum, ModelInput, ServiceClient
from agentlightning.types import Batch, LoraShape, MicroBatches, SamplingParams
from agentlightning.verl.batching import MiniBatchPlan, make_batch
from agentlightning.verl.run_client import RunClient
from agentlightning.verl.state import TrainerState, checkpoint_files
from agentlightning.workers.group import InProcess, WorkerGroup
from agentlightning.workers.settings import ActorSettings, OptimSettings, RolloutSettings, WorkerSettings
from agentlightning.workers.worker import Worker

RANK, ALPHA = 4, 32  # the alpha that a training client's adapters have
OPTIM = OptimSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=0.2)
ADAM = AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, grad_clip_norm=0.2)
STEPS = 3  # the first step of Adam hides the size of the gradient


def worker_settings(base_path: str, alpha: int = ALPHA, **adapter: bool) -> WorkerSettings:
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
    shape = LoraShape(RANK, alpha, **adapter)
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


def run_of(settings: WorkerSettings, batch: Batch, steps: int, root, identity: str) -> WorkerGroup:
    """A run directory with a checkpoint after `steps`, as the trainer writes it, and the workers that go on."""
    group = WorkerGroup(InProcess(settings, lambda: None))
    plan = MiniBatchPlan(4, 4, 1, shuffle=False, seq_norm=48.0).mini_batches(batch, 0, 1)
    for step in range(steps):
        group.update_actor(batch, plan, step + 1)
    with CheckpointManager(root, save_freq=1) as manager:
        client = RunClient(group, manager, None, uses_critic=False)
        fingerprint = {"breaking": {MODEL_PATH: identity}, "harmless": {}}
        state = TrainerState(global_step=steps)
        client.take_snapshot(steps, 0, lambda parts: checkpoint_files(parts, group.adapter_configs(), state, fingerprint, {}))
        client.save_state(f"global_step_{steps}").result(60)
    return group


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_loop_of_ones_own_goes_on_from_a_run(optimizer, batch, tmp_path, base_path):
    settings = worker_settings(base_path, alpha=16)  # not the clients' own
    group = run_of(settings, batch, 2, tmp_path / "run", model_identity(base_path))
    resume_info = get_last_checkpoint(tmp_path / "run")
    assert resume_info is not None
    with ServiceClient(backend="inprocess", root=tmp_path / "loop", num_threads=1) as service:
        client = service.create_lora_training_client(base_path, rank=RANK, train_unembed=False)
        client.load_state(resume_info["state_path"], optimizer=optimizer).result()
        before = load_file(f"{client.save_state('before').result().path}/actor/adapter_model.safetensors")
        client.forward_backward(data_of(batch), "ppo")
        client.optim_step(ADAM)
        after = load_file(f"{client.save_state('after').result().path}/actor/adapter_model.safetensors")
        # What the loop saves is of the run's shape too, and a client made from the run's state has it from the start.
        again = service.create_training_client_from_state_with_optimizer(resume_info["state_path"])
        logp = again.forward(data_of(batch), "cross_entropy").result().metrics["loss:sum"]
        client.load_state(resume_info["state_path"])
        assert client.forward(data_of(batch), "cross_entropy").result().metrics["loss:sum"] == logp
    held = load_file(f"{resume_info['state_path']}/actor/adapter_model.safetensors")
    assert all(np.array_equal(before[name], held[name]) for name in held)
    plan = MiniBatchPlan(4, 4, 1, shuffle=False, seq_norm=48.0).mini_batches(batch, 0, 1)
    group.update_actor(batch, plan, 3)
    trained = group.backend.worker.state().actor.weights
    moved = np.concatenate([np.abs(trained[name] - before[name]).ravel() for name in after])
    apart = np.concatenate([np.abs(after[name] - trained[name]).ravel() for name in after])
    assert moved.max() > 5e-4
    assert (np.quantile(apart, 0.999) < 3e-6) == optimizer  # a cold optimizer steps elsewhere
    assert optimizer == (apart.max() < 1e-4)


def test_the_adapter_that_a_loop_saves_keeps_the_runs_scale(batch, tmp_path, base_path):
    run_of(worker_settings(base_path, alpha=16), batch, 1, tmp_path / "run", model_identity(base_path))
    with ServiceClient(backend="inprocess", root=tmp_path / "loop", num_threads=1) as service:
        client = service.create_training_client_from_state(f"{tmp_path}/run/global_step_1")
        saved = client.save_state("a").result().path
        expected = client.forward(data_of(batch), "cross_entropy").result().metrics["loss:sum"]
        again = service.create_training_client_from_state(saved)
        assert again.forward(data_of(batch), "cross_entropy").result().metrics["loss:sum"] == expected
        fresh = service.create_lora_training_client(base_path, rank=RANK, train_unembed=False)
        assert fresh.forward(data_of(batch), "cross_entropy").result().metrics["loss:sum"] != expected
        sampled = client.create_sampling_client(saved).compute_logprobs(ModelInput.from_ints([1, 2, 3, 4])).result()
        assert (
            sampled
            == client.create_sampling_client(f"{tmp_path}/run/global_step_1")
            .compute_logprobs(ModelInput.from_ints([1, 2, 3, 4]))
            .result()
        )


def test_a_run_that_a_client_cannot_hold_is_refused(batch, tmp_path, base_path):
    run_of(worker_settings(base_path), batch, 1, tmp_path / "run", model_identity(base_path))
    run_of(worker_settings(base_path), batch, 1, tmp_path / "other", "of another base")
    run_of(worker_settings(base_path, use_rslora=True), batch, 1, tmp_path / "rs", model_identity(base_path))
    with ServiceClient(backend="inprocess", root=tmp_path / "loop", num_threads=1) as service:
        client = service.create_lora_training_client(base_path, rank=RANK, train_unembed=False)
        with pytest.raises(UserError, match="whose weights are others"):
            client.load_state(f"{tmp_path}/other/global_step_1").result()
        with pytest.raises(CheckpointError, match="use_rslora=True, and a training client's adapter is plain LoRA"):
            client.load_state(f"{tmp_path}/rs/global_step_1").result()
        wide = service.create_lora_training_client(base_path, rank=RANK)
        with pytest.raises(UserError, match="expected a model created with train_unembed=False"):
            wide.load_state(f"{tmp_path}/run/global_step_1").result()
