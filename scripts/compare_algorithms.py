"""Train the embedded agent with every advantage estimator and every policy loss, and say what each has reached.

    python scripts/compare_algorithms.py                          all of them, 60 steps each: a table, and the curves as PNG
    python scripts/compare_algorithms.py --only gspo kl_cov       some of them
    python scripts/compare_algorithms.py --steps 20 --out /tmp/x  shorter, elsewhere

Each is one run of `python -m agentlightning.verl` in a process of its own, with the overrides that the table names and the
defaults for the rest; nothing is tuned for any of them. The losses are compared with two optimizer steps a batch, since in the
first step the new policy is the old one and most losses are the same. A run that is there already is not run again. The figure
is the share of right answers, also for gdpo, which is paid for their form as well.

The exit code is 1 if one of them has not come above the base, which answers about one in five of the training problems.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agentlightning.tools.plot import plot_runs

SCORE = "critic/score/mean"
BASE = 0.230  # the mean over the first ten steps of the default run, in which little has been learned yet
LAST = 10
_TWO_STEPS = ("actor_rollout_ref.actor.ppo_mini_batch_size=8",)
_ANSWER = "reward.functions.answer={name: agentlightning.calculator.task:compute_score, weight: 1.0}"
_FORM = "reward.functions.form={name: agentlightning.calculator.task:compute_form_score, weight: 0.1}"
_PPO = (
    "algorithm.adv_estimator=gae",
    "data.train_batch_size=64",
    "actor_rollout_ref.rollout.n=1",
    "actor_rollout_ref.actor.ppo_mini_batch_size=32",
    "actor_rollout_ref.actor.ppo_epochs=2",
    "actor_rollout_ref.actor.optim.lr=1e-3",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    kind: str
    name: str
    overrides: tuple[str, ...]
    metric: str = SCORE


def _estimator(name: str, *more: str) -> Case:
    return Case("estimator", name, (f"algorithm.adv_estimator={name}", *more))


def _loss(name: str, *more: str) -> Case:
    return Case("loss", name, (f"actor_rollout_ref.actor.policy_loss.loss_mode={name}", *_TWO_STEPS, *more))


CASES = (
    Case("estimator", "gae", _PPO),
    _estimator("grpo"),
    Case(
        "estimator",
        "grpo, as Dr.GRPO",
        ("algorithm.norm_adv_by_std_in_grpo=false", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm"),
    ),
    _estimator("grpo_passk"),
    Case("estimator", "gdpo", ("algorithm.adv_estimator=gdpo", f"+{_ANSWER}", f"+{_FORM}"), "reward/answer/mean"),
    _estimator("rloo"),
    _estimator("remax"),
    _estimator("opo"),
    _estimator("gpg", "actor_rollout_ref.actor.policy_loss.loss_mode=gpg"),
    _estimator("reinforce_plus_plus"),
    _estimator("reinforce_plus_plus_baseline"),
    _estimator("optimal_token_baseline"),
    *(_loss(name) for name in ("vanilla", "gspo", "sapo", "gpg", "clip_cov")),
    *(_loss(name) for name in ("kl_cov", "geo_mean", "cispo", "per_rollout_mean")),
)


def main(words: Sequence[str] | None = None) -> int:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/compare_algorithms"))
    given = parser.parse_args(words)
    only: list[str] = given.only or [case.name for case in CASES]
    cases = [case for case in CASES if case.name in only]
    if not cases:
        parser.error(f"--only {' '.join(only)}: expected some of {', '.join(case.name for case in CASES)}")
    runs = {f"{case.kind}: {case.name}": given.out / _directory(case) for case in cases}
    reached = [_reached(case, run_dir, given.steps, given.seed) for case, run_dir in zip(cases, runs.values(), strict=True)]
    print(f"\n| kind | name | first {LAST} steps | last {LAST} of {given.steps} | overrides |\n|---|---|---|---|---|")
    for case, (first, last) in zip(cases, reached, strict=True):
        print(f"| {case.kind} | {case.name} | {first:.2f} | {last:.2f} | `{' '.join(case.overrides)}` |")
    for kind in dict.fromkeys(case.kind for case in cases):
        picture = given.out / f"{kind}s.png"
        picture.unlink(missing_ok=True)  # of an earlier comparison
        plot_runs([run_dir for name, run_dir in runs.items() if name.startswith(f"{kind}: ")], picture)
        print(f"curves: {picture}")
    below = [case.name for case, (_, last) in zip(cases, reached, strict=True) if last <= BASE]
    if below:
        print(f"not above the base ({BASE}): {', '.join(below)}")
    return 1 if below else 0


def _directory(case: Case) -> str:
    return f"{case.kind}-{case.name}".replace(", as ", "-").replace(".", "").lower()


def _reached(case: Case, run_dir: Path, steps: int, seed: int) -> tuple[float, float]:
    """Mean reward over the first and the last ten steps."""
    command = [
        *(sys.executable, "-m", "agentlightning.verl", *case.overrides, f"trainer.total_training_steps={steps}"),
        *(f"trainer.default_local_dir={run_dir}", f"trainer.seed={seed}", "trainer.backend=inprocess"),
        *("trainer.log_rollout_freq=0", "trainer.test_freq=-1", "trainer.save_freq=20"),
    ]
    print(f"{case.kind} {case.name}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[:steps]  # a run that is there already may be longer
    scores = [json.loads(line)[case.metric] for line in lines]
    return sum(scores[:LAST]) / len(scores[:LAST]), sum(scores[-LAST:]) / len(scores[-LAST:])


if __name__ == "__main__":
    sys.exit(main())
