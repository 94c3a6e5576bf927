"""Bad input through the real program: exit code 2, no traceback, and the override that mends it."""

import json
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
IN_PROCESS = "trainer.backend=inprocess"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["actor_rollout_ref.model.path=/no/where"], ["actor_rollout_ref.model.path", "/no/where"]),
        (["trainer.n_gpus_per_node=5", "trainer.device=cpu"], ["trainer.n_gpus_per_node", "5", "data.train_batch_size"]),
        (["trainer.default_local_dir=stdout/run"], ["trainer.default_local_dir", "stdout"]),
        (["trainer.default_local_dir=/proc/run"], ["trainer.default_local_dir", "/proc/run"]),
        (["data.train_files=nowhere.jsonl", IN_PROCESS], ["data.train_files", "nowhere.jsonl"]),
        (["custom_reward_function.path=nowhere.py", IN_PROCESS], ["custom_reward_function.path", "nowhere.py"]),
        (
            ["actor_rollout_ref.rollout.multi_turn.tool=no_such_module:fn", IN_PROCESS],
            ["actor_rollout_ref.rollout.multi_turn.tool", "no_such_module:fn"],
        ),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path=7"], ["trainer.resume_from_path=7"]),
    ],
)
def test_the_user_can_mend_it(given, words, new_run):
    run = new_run(*given).start()
    _refused(run, words)


@pytest.mark.parametrize("backend", ["inprocess", "ray"])
def test_gpus_where_there_are_none(backend, new_run):
    run = new_run("trainer.device=cuda", f"trainer.backend={backend}", CUDA_VISIBLE_DEVICES="").start()
    _refused(run, ["there are 0", "trainer.device=cpu"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trainer.seed=2", ["trainer.seed: saved 1, now 2", "trainer.resume_mode=disable"]),
        ("actor_rollout_ref.model.lora_rank=4", ["actor_rollout_ref.model.lora_rank: saved 8, now 4"]),
        ("actor_rollout_ref.model.path={base}", ["actor_rollout_ref.model.path: saved "]),
        ("data.train_files={rows}", ["data.train_files: saved "]),
    ],
)
def test_another_run_than_the_one_that_lies_there(change, words, references, new_run, base_path):
    there = references["inprocess"]
    run = new_run(IN_PROCESS, f"trainer.default_local_dir={there.directory}", "trainer.total_training_steps=6")
    shutil.copytree(base_path, run.cwd / "base")
    settings = json.loads((run.cwd / "base" / "config.json").read_text())
    (run.cwd / "base" / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    rows = (Path(base_path).parent / "train.jsonl").read_text().splitlines()
    (run.cwd / "rows.jsonl").write_text("\n".join(rows[:64]) + "\n")
    before = there.snapshot()
    run.start(change.format(base=run.cwd / "base", rows=run.cwd / "rows.jsonl"))
    _refused(run, words)
    assert there.snapshot() == before


def _refused(run, words) -> None:
    run.ends(2)
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.output
    for word in words:
        assert word in run.stderr
