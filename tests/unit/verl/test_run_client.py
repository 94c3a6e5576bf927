"""The trainer's training client: a step's state goes out by `save_state`, comes back by `load_state`, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agentlightning.checkpoint import store
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint_utils import get_last_checkpoint
from agentlightning.errors import CheckpointError
from agentlightning.types import Batch, LoraShape, MicroBatches, SamplingParams
from agentlightning.verl.batching import MiniBatchPlan, make_batch
from agentlightning.verl.run_client import RunClient
from agentlightning.verl.state import TrainerState, checkpoint_files
from agentlightning.workers.group import InProcess, WorkerGroup
from agentlightning.workers.settings import ActorSettings, OptimSettings, RolloutSettings, WorkerSettings


@pytest.fixture
def settings(base_path) -> WorkerSettings:
    sizes = MicroBatches(5)
    actor = ActorSettings(
        optim=OptimSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=1.0),
        micro_batch=sizes,
        log_prob_micro_batch=sizes,
        ref_micro_batch=sizes,
        temperature=1.0,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        clip_ratio_c=3.0,
        loss_agg_mode="token-mean",
        entropy_coeff=0.0,
        kl_loss_coef=0.0,
        kl_loss_type="low_var_kl",
    )
    rollout = RolloutSettings(max_num_seqs=64, tool="agentlightning.calculator.task:calculate")
    return WorkerSettings(
        base_path, "float32", "cpu", False, LoraShape(4, 32), seed=0, num_threads=1, actor=actor, rollout=rollout
    )


def make_group(settings: WorkerSettings) -> WorkerGroup:
    return WorkerGroup(InProcess(settings, lambda: None))


def sample(group: WorkerGroup, prompts) -> Batch:
    params = SamplingParams(n=2, max_tokens=16, max_assistant_turns=1, max_tokens_per_turn=16)
    completions = group.generate(prompts[:2], params, seed=0, step=1, version=0)
    batch = make_batch(prompts, completions, np.zeros(len(completions)))
    ones = np.ones_like(batch.mask_BT, dtype=np.float32) * np.array([1.0, -1.0, 1.0, -1.0], np.float32)[:, None]
    return batch.with_columns(advantages=np.where(batch.mask_BT, ones, 0.0).astype(np.float32))


def train(group: WorkerGroup, batch: Batch, step: int) -> None:
    group.update_actor(batch, MiniBatchPlan(2, 2, 1, shuffle=False, seq_norm=16.0).mini_batches(batch, 0, step), step)
    group.update_weights(step)


def saved_by(client: RunClient, group: WorkerGroup, manager: CheckpointManager, step: int) -> Path:
    def files_with(parts):
        return checkpoint_files(parts, group.adapter_configs(), TrainerState(global_step=step), {}, {})

    assert client.take_snapshot(step, manager.free_buffer(), files_with) > 0
    return Path(client.save_state(f"global_step_{step}").result(60).path)


def weights_after(group: WorkerGroup, manager: CheckpointManager, step: int) -> dict[str, np.ndarray]:
    path = saved_by(RunClient(group, manager, None, False), group, manager, step)
    return dict(store.load(path).tensors["actor/adapter_model.safetensors"])


def test_another_group_goes_on_from_what_was_saved(settings, prompts, tmp_path):
    group = make_group(settings)
    batch = sample(group, prompts)
    with CheckpointManager(tmp_path / "run", save_freq=1) as manager:
        train(group, batch, 1)
        saved = saved_by(RunClient(group, manager, None, False), group, manager, 1)
        resume_info = get_last_checkpoint(tmp_path / "run")
        assert resume_info is not None
        assert resume_info["state_path"] == str(saved)
        assert resume_info["batch"] == 1
        train(group, batch, 2)
        expected = weights_after(group, manager, 2)
    again, cold = make_group(settings), make_group(settings)
    with CheckpointManager(tmp_path / "other", save_freq=1) as manager:
        RunClient(again, manager, None, False).load_state(resume_info["state_path"]).result()
        train(again, batch, 2)
        resumed = weights_after(again, manager, 2)
        train(cold, batch, 1)
        started_anew = weights_after(cold, manager, 1)
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)
    assert not all(np.array_equal(started_anew[name], expected[name]) for name in expected)


def test_what_the_start_has_verified_is_not_read_again(settings, prompts, tmp_path):
    group = make_group(settings)
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        train(group, sample(group, prompts), 1)
        saved_by(RunClient(group, manager, None, False), group, manager, 1)
        found = manager.load_latest()
        assert found is not None
        (found.path / "actor" / "adapter_model.safetensors").unlink()
        RunClient(group, manager, found, False).load_state(str(found.path)).result()
        with pytest.raises(CheckpointError, match="cannot be resumed from"):
            RunClient(group, manager, None, False).load_state(str(found.path)).result()


def test_only_the_snapshot_that_was_taken_is_saved(settings, tmp_path):
    group = make_group(settings)
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        client = RunClient(group, manager, None, False)
        with pytest.raises(CheckpointError, match="there is no snapshot"):
            client.save_state("global_step_1")
        saved_by(client, group, manager, 1)
        with pytest.raises(CheckpointError, match=r"save_state\('global_step_2'\): there is the snapshot global_step_1"):
            client.save_state("global_step_2")


def test_a_checkpoint_of_another_kind_changes_no_worker(settings, prompts, tmp_path):
    group = make_group(settings)
    with CheckpointManager(tmp_path, save_freq=1) as manager:
        train(group, sample(group, prompts), 1)
        saved = saved_by(RunClient(group, manager, None, False), group, manager, 1)
        found = store.load(saved)
        torn = replace(found, tensors={"actor/adapter_model.safetensors": found.tensors["actor/adapter_model.safetensors"]})
        with pytest.raises(CheckpointError, match="whole, but not of this trainer"):
            RunClient(group, manager, torn, False).load_state(str(saved)).result()
        with pytest.raises(CheckpointError, match="and critic/"):
            RunClient(group, manager, found, True).load_state(str(saved)).result()
