"""Runs every case of scripts/compare_algorithms.py for two small steps, one after the other in this process.

python every_algorithm.py SCRIPTS_DIR OUT_DIR      writes a line of JSON a case: {"name": ..., "code": ..., "lines": [...]}
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from compare_algorithms import CASES

from agentlightning.verl.config import load_config
from agentlightning.verl.entrypoint import run

SMALL = (
    "trainer.backend=inprocess",
    "trainer.total_training_steps=2",
    "trainer.test_freq=-1",
    "trainer.log_rollout_freq=0",
    "trainer.save_freq=-1",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
)


def main() -> None:
    out = Path(sys.argv[2])
    with (out / "results.jsonl").open("w") as results:
        for number, case in enumerate(CASES):
            run_dir = out / str(number)
            code = run(load_config([*case.overrides, *SMALL, f"trainer.default_local_dir={run_dir}"]))
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            results.write(json.dumps({"name": f"{case.kind}: {case.name}", "code": code, "lines": lines}) + "\n")


if __name__ == "__main__":
    main()
