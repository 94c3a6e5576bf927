"""Every estimator and every loss in the real program, briefly; scripts/compare_algorithms.py is the long form.

And dynamic sampling over a kill: how many prompts a step has drawn is the one thing about the data that must be remembered.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IN_PROCESS = "trainer.backend=inprocess"


def test_every_estimator_and_loss_moves_the_policy_and_gives_finite_numbers(tmp_path):
    command = [sys.executable, str(HERE / "every_algorithm.py"), str(ROOT / "scripts"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == len({result["name"] for result in results}) >= 20
    for result in results:
        assert result["code"] == 0, result["name"]
        assert len(result["lines"]) == 2, result["name"]
        for line in result["lines"]:
            assert [name for name, value in line.items() if value is None] == [], result["name"]
        assert any(line["actor/grad_norm"] > 0 for line in result["lines"]), result["name"]


def test_dynamic_sampling_killed_twice_ends_as_one_that_was_never_killed(new_run):
    overrides = (IN_PROCESS, "algorithm.filter_groups.enable=true", "data.train_max_samples=40")
    whole, run = new_run(*overrides).start(), new_run(*overrides)
    run.kill_inside(2, "_update_actor")
    run.kill_inside(4, "start_save", "append")
    run.again()
    whole.ends()
    run.equals(whole)
    drawn = [run.trainer_state(step)["position"] for step in range(1, 6)]
    assert drawn == sorted(drawn)
    assert drawn[-1] > 5 * 4  # more than a batch a step: the case has something to lose
    assert any(line["training/num_gen_batches"] > 1 for line in run.lines)
