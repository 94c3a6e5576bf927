"""In one process, where Ray is not the point: killed at delicate places, stopped, finished, extended, given bad numbers."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
IN_PROCESS = "trainer.backend=inprocess"
PPO = (
    IN_PROCESS,
    "algorithm.adv_estimator=gae",
    "algorithm.use_kl_in_reward=true",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.horizon=100",
    "actor_rollout_ref.actor.ppo_epochs=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
)
KILLED_INSIDE = {
    # in the actor's third optimizer step, and while the state is being copied
    "head": [(2, ("_update_actor", *["_backward"] * 3)), (4, ("_keep", "snapshot", "copy_from"))],
    # between the critic's update and the actor's, and with a save in flight whose step has no line yet
    "adapter": [(3, ("update_critic", "_update_actor", "update")), (4, ("start_save", "append"))],
}


@pytest.mark.parametrize("kind", KILLED_INSIDE)
def test_row_adaptive_kl_resets_ppo_killed_twice_ends_as_one_that_was_never_killed(kind, new_run):
    overrides = (*PPO, f"critic.kind={kind}")
    whole, run = new_run(*overrides).start(), new_run(*overrides)
    for step, functions in KILLED_INSIDE[kind]:
        run.kill_inside(step, *functions)
        assert run.steps == list(range(1, step))
    run.again()
    whole.ends()
    run.equals(whole)
    assert "critic/value_head.safetensors" in run.files(5)
    assert ("critic/adapter_model.safetensors" in run.files(5)) == (kind == "adapter")
    coefficients = [run.trainer_state(step)["kl_ctrl"]["value"] for step in range(1, 6)]
    assert len(set(coefficients)) == 5  # the adaptive controller has something to lose


def test_row_rollouts_before_the_kill_are_thrown_away_they_are_used_again(references, new_run):
    run = new_run(IN_PROCESS)
    run.kill_inside(3, "_update_actor")
    run.again()
    assert "step 3: 16 of 16 rollouts were finished before, and are used again" in run.stdout
    assert run.stdout.count("rollouts were finished before") == 1
    run.equals(references["inprocess"])
    assert list((run.directory / "rollouts").glob("step_[1-4]")) == []


def test_row_epoch_boundary_killed_there_twice_in_one_epoch_and_at_the_last_step(new_run):
    overrides = (IN_PROCESS, "data.train_max_samples=8", "trainer.total_epochs=3")  # two steps an epoch
    whole, run = new_run(*overrides).start(), new_run(*overrides)
    run.kill_inside(2, "start_save", "append")  # the epoch's last step, not yet in metrics.jsonl
    run.kill_inside(3, "update_actor")
    run.kill_inside(4, "_update_actor", "step")
    run.kill_inside(5, "start_save")
    run.again()
    whole.ends()
    run.equals(whole)
    assert [line["training/epoch"] for line in run.lines] == [line["training/epoch"] for line in whole.lines]
    assert len({line["training/epoch"] for line in run.lines}) == 3


def test_row_finished_run_trains_on_it_says_so_and_goes_on_when_more_is_asked_for(references, new_run):
    run = new_run(IN_PROCESS)
    run.start("trainer.total_training_steps=3").ends()
    before = run.snapshot()
    run.start("trainer.total_training_steps=3").ends()
    assert "already complete: 3 steps are done" in run.stdout
    assert run.snapshot() == before
    run.again()
    run.equals(references["inprocess"])


def test_a_torn_checkpoint_is_passed_over_and_done_again(references, new_run):
    run = new_run(IN_PROCESS)
    shutil.copytree(references["inprocess"].directory, run.directory)
    adapter = run.directory / "global_step_5" / "actor" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    run.again()
    assert "global_step_5.pt was passed over: " in run.output
    run.equals(references["inprocess"])


def test_row_two_jobs_one_directory_held_by_one_run_stopped_by_a_signal_and_gone_on_with(references, new_run):
    run = new_run(IN_PROCESS)
    run.hold_in("reward", step=3)
    second = new_run(IN_PROCESS, f"trainer.default_local_dir={run.directory}").start().ends(2)
    assert f"{run.directory} is in use by pid {run.process.pid} on " in second.stderr
    assert "trainer.default_local_dir=DIR" in second.stderr
    assert "Traceback" not in second.output

    run.signal_group(signal.SIGINT)
    run.ends(75)
    assert "SIGINT: the state after step 2 is durable; exit code 75, the same command goes on" in run.stdout
    assert "stopped at step 2 of 5" in run.stdout
    assert re.search(r"go on +python -m agentlightning.verl .*trainer.default_local_dir=run", run.stdout)
    assert "Traceback" not in run.output
    run.again()
    run.equals(references["inprocess"])


def test_a_signal_before_training_starts_ends_the_run_as_well(new_run):
    run = new_run(IN_PROCESS).start()
    run.wait_until((run.directory / ".lease").exists, "the run directory")
    run.signal_group(signal.SIGINT)
    run.ends(75)
    assert "stopped before training began (SIGINT); the same command starts it" in run.output
    assert "Traceback" not in run.output


def test_row_no_signal_handler_and_save_freq_needed_a_signal_saves_without_and_a_second_leaves_at_once(references, new_run):
    run = new_run(IN_PROCESS, "trainer.save_freq=-1")
    run.hold_in("reward", step=3, durable=False)
    assert not list(run.directory.glob("*.pt"))
    run.kill(signal.SIGUSR1)
    run.ends(75)
    assert run.newest_valid() == 2
    run.hold_in("tool", step=4, durable=False)  # the tool runs in the main thread here, and looks at no flag
    run.kill(signal.SIGTERM)
    time.sleep(1.2)  # sooner it would count as the same request
    run.kill(signal.SIGINT)
    assert run.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert run.newest_valid() == 2
    run.again()
    run.equals(references["inprocess"])


def test_row_validation_runs_again_on_every_resume_it_does_not(new_run):
    run = new_run(IN_PROCESS, "trainer.val_before_train=true", "trainer.test_freq=1")
    run.start("trainer.total_training_steps=1").ends()
    assert "before training: validation" in run.stdout
    run.start("trainer.total_training_steps=2").ends()
    assert "before training: validation" not in run.stdout
    assert run.steps == [0, 1, 2]
    assert all(any(name.startswith("val-core/") for name in line) for line in run.lines)


def test_validation_alone_changes_nothing_of_the_run(references, new_run):
    run = new_run(IN_PROCESS)
    shutil.copytree(references["inprocess"].directory, run.directory)
    before = run.snapshot()
    run.start("trainer.val_only=true", "trainer.resume_mode=resume_path", "trainer.resume_from_path=3").ends()
    assert "validation at step 3: calculator/reward/mean@1 0." in run.stdout
    assert run.snapshot() == before


def test_a_deadline_ends_the_run_in_time(new_run):
    run = new_run(IN_PROCESS, "trainer.must_save_by=2026-01-31T12:00:00+00:00").start().ends(75)
    assert "stopped before training began (trainer.must_save_by)" in run.output
    assert run.steps == []


def test_nan_from_the_reward_stops_the_step_before_the_weights_change(references, new_run):
    run = new_run(IN_PROCESS)
    run.stop_at("reward", 3, "nan").start().ends(1)
    assert "error: the reward function returned nan for sample 0 of train:" in run.stderr
    assert run.steps == [1, 2]
    assert run.newest_valid() == 2
    run.again()
    run.equals(references["inprocess"])


def test_nan_in_the_base_stops_the_step_before_the_weights_change(base_path, new_run):
    run = new_run(IN_PROCESS, "actor_rollout_ref.model.path=base", "trainer.total_training_steps=3")
    shutil.copytree(base_path, run.cwd / "base")
    run.start("trainer.total_training_steps=1").ends()
    before = run.files(1)
    _spoil(run.cwd / "base" / "model.safetensors")
    run.start().ends(1)
    assert "error: NaN or inf in the " in run.stderr
    assert "'train:" in run.stderr
    assert run.steps == [1]
    assert run.newest_valid() == 1
    assert run.files(1) == before


def _spoil(weights: Path) -> None:
    """One NaN in the first layer; names, shapes and the file's size stay."""
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})


def test_row_wandb_run_lost_it_is_kept_over_a_kill(new_run):
    run = new_run(IN_PROCESS, "trainer.logger=[console,wandb]", WANDB_MODE="offline")
    run.hold_in("reward", step=3)
    run.kill()
    run.ends(-signal.SIGKILL)
    run.leaves_nobody_behind()
    run.again()
    assert run.steps == [1, 2, 3, 4, 5]
    run_id = run.trainer_state(5)["wandb_run_id"]
    assert run_id == run.trainer_state(1)["wandb_run_id"]
    starts = sorted(path.name for path in (run.directory / "wandb").glob("offline-run-*"))
    assert [name.rpartition("-")[2] for name in starts] == [run_id, run_id]
