"""A cluster on paper: the real controller over fake workers, and goodput under preemption against the save interval.

    python scripts/simulate_scale.py                                     64, 256 and 1,024 workers, both tables
    python scripts/simulate_scale.py --workers 256 --days 365 --only goodput
    python scripts/simulate_scale.py --workers 1024 --only controller algorithm.adv_estimator=gae

Numbers of workers enter; two tables in markdown leave. The first: what a step costs the controller when the workers cost
nothing (simulate_controller.py). The second: useful time / wall time in virtual time (simulate_goodput.py), for fixed save
intervals and `trainer.save_freq=auto`, beside what theory expects of each and the optimum of Young and Daly.

`--mtbf-hours` is the cluster's mean time between failures with `--mtbf-workers` workers; every worker fails by itself, so with
four times as many it is a quarter. `at most` is what saves that cost nothing, after every step, would leave: a failure then
costs the restart and the step that it interrupts; `nothing lost` is the restarts alone.

`controller s` is the CPU time of the controller's one thread, pickling of arguments and answers in it, Ray's own cost of a call
not (bench_ray_calls.py measures that); what share of a step it is, `--step-s` says. Words with `=` are overrides of the run's
configuration, beside those of `Load`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulate_goodput import (
    Costs,
    best_interval,
    daly_seconds,
    expected_goodput,
    preemptions,
    restart_bound,
    simulate,
    step_bound,
)

INTERVALS = (1, 2, 4, 8, 16, 32)
SECONDS_A_DAY = 86400.0


def controller_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first table."""
    from simulate_controller import Load, measure_controller

    load = Load(
        args.prompts_per_worker,
        args.samples,
        args.prompt_tokens,
        args.response_tokens,
        args.mean_response,
        args.mini_batches,
        overrides=tuple(args.overrides),
    )
    rows: list[dict[str, Any]] = []
    for workers in args.workers:
        report = measure_controller(workers, load, args.steps)
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        rows.append(asdict(report) | {"share": report.controller_s / args.step_s})
    return rows


def goodput_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The second table."""
    rows: list[dict[str, Any]] = []
    steps = max(1, round(args.days * SECONDS_A_DAY / args.step_s))
    for workers in args.workers:
        mtbf_s = args.mtbf_hours * 3600 * args.mtbf_workers / workers
        for save_s in args.save_s:
            costs = Costs(args.step_s, save_s, args.write_s, args.restart_s)
            best = best_interval(costs, mtbf_s)
            daly = daly_seconds(save_s, mtbf_s) / args.step_s
            for save_freq in (*args.intervals, "auto"):
                run = simulate(costs, save_freq, preemptions(workers, mtbf_s, args.seed), steps)
                rows.append(
                    {
                        "workers": workers,
                        "mtbf_s": mtbf_s,
                        "save_s": save_s,
                        "save_freq": save_freq,
                        "interval": run.interval,
                        "goodput": run.share,
                        "standard_error": standard_error(run.share, run.failures),
                        "expected": expected_goodput(costs, best if save_freq == "auto" else save_freq, mtbf_s),
                        "failures": run.failures,
                        "daly_steps": daly,
                        "best_interval": best,
                        "restart_bound": restart_bound(costs, mtbf_s),
                        "step_bound": step_bound(costs, mtbf_s),
                    }
                )
    return rows


def standard_error(share: float, failures: int) -> float:
    """Of a simulated goodput: about all that is lost is lost by failures, whose number is that of a Poisson process."""
    return (1 - share) / math.sqrt(failures) if failures else 0.0


def print_controller(rows: Sequence[dict[str, Any]], step_s: float) -> None:
    """In markdown."""
    print(
        f"| workers | samples | tokens | controller s | of a {step_s:g} s step | sent MB | received MB | checkpoint files "
        "| commit s | restart s |"
    )
    print("|" + "---:|" * 10)
    for row in rows:
        cells = [
            f"{row['workers']:,}",
            f"{row['samples']:,}",
            f"{row['tokens']:,}",
            f"{row['controller_s']:.3f}",
            f"{row['share']:.2%}",
            f"{row['sent_bytes'] / 1e6:.1f}",
            f"{row['received_bytes'] / 1e6:.1f}",
            f"{row['checkpoint_files']:,}",
            f"{row['commit_s']:.2f}",
            f"{row['restart_s']:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["phases_s"].items())
        print(f"\n{row['workers']:,} workers, by phase: {phases}; wall {row['wall_s']:.3f} s")


def print_goodput(rows: Sequence[dict[str, Any]]) -> None:
    """In markdown."""
    print(
        "| workers | failure every | save s | save_freq | steps between saves | goodput | expected | at most | nothing lost "
        "| Young-Daly steps | best |"
    )
    print("|" + "---:|" * 11)
    for row in rows:
        cells = [
            f"{row['workers']:,}",
            f"{row['mtbf_s'] / 3600:g} h",
            f"{row['save_s']:g}",
            str(row["save_freq"]),
            f"{row['interval']:.1f}",
            f"{row['goodput']:.4f} ± {row['standard_error']:.4f}",
            f"{row['expected']:.4f}",
            f"{row['step_bound']:.4f}",
            f"{row['restart_bound']:.4f}",
            f"{row['daly_steps']:.1f}",
            str(row["best_interval"]),
        ]
        print("| " + " | ".join(cells) + " |")


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--only", choices=("controller", "goodput"))
    parser.add_argument("--step-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    parser.add_argument("--json", type=Path, help="write both tables there too")
    controller = parser.add_argument_group("controller")
    controller.add_argument("--steps", type=int, default=5, help="measured")
    controller.add_argument("--prompts-per-worker", type=int, default=1)
    controller.add_argument("--samples", type=int, default=8, help="of each prompt")
    controller.add_argument("--prompt-tokens", type=int, default=256)
    controller.add_argument("--response-tokens", type=int, default=1024, help="the limit")
    controller.add_argument("--mean-response", type=int, default=512, help="tokens, before the limit cuts")
    controller.add_argument("--mini-batches", type=int, default=1, help="optimizer steps; above 1 with an old_log_prob pass")
    controller.add_argument("overrides", nargs="*", metavar="key=value")
    goodput = parser.add_argument_group("goodput")
    goodput.add_argument("--mtbf-hours", type=float, default=2.0, help="between failures of --mtbf-workers workers")
    goodput.add_argument("--mtbf-workers", type=int, default=256)
    goodput.add_argument("--restart-s", type=float, default=180.0)
    goodput.add_argument("--save-s", type=float, nargs="+", default=[0.05, 10.0], help="by which a save stops the step")
    goodput.add_argument("--write-s", type=float, default=2.0, help="behind the steps, until a save is durable")
    goodput.add_argument("--intervals", type=int, nargs="+", default=list(INTERVALS), help="steps between saves")
    goodput.add_argument("--days", type=float, default=60.0, help="of useful time, in each run")
    return parser.parse_intermixed_args(words)


def main() -> None:
    """Simulate and print."""
    args = parsed()
    report: dict[str, Any] = {}
    if args.only != "goodput":
        report["controller"] = controller_rows(args)
        print_controller(report["controller"], args.step_s)
        print()
    if args.only != "controller":
        report["goodput"] = goodput_rows(args)
        print_goodput(report["goodput"])
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
