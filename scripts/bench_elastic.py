"""What bits that do not hang on the number of workers cost, and what a second worker gains.

    python scripts/bench_elastic.py                        the embedded agent, 16 prompts x 8 samples, one thread a worker
    python scripts/bench_elastic.py --only gain --prompts 64      the second worker alone, with more prompts a step
    python scripts/bench_elastic.py --model-shape 24m      a random Qwen3 of 24 M parameters
    python scripts/bench_elastic.py --logical-shards 8     another number of shards (default: what a run would take)

A step is rollouts, log-probabilities and the update, driven as `verl/trainer.py` does; rewards are a coin. One worker does it
with the plain sum and with logical shards, in turns, so that a busy machine slows both alike. Then the update alone, plain and
in turns: by one worker process, by two (gloo), and by two that have nothing to do with each other. Of the last two figures one
is what two workers could reach here at most, each with its half and no gradient to add up; the other what this machine's
cores take from each other, both at work on the whole batch: two that were quite independent would give 2. Medians of
seconds; `cpu` is CPU time, whose ratio is the one to look at on a machine that others use too. `--json` keeps the figures.

Left out: rewards, checkpoints, validation, Ray's own cost of a call (bench_ray_calls.py measures it).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from bench_step import SHAPES, hash_score, save_random_base

from agentlightning.models.chat import load_tokenizer
from agentlightning.types import Batch
from agentlightning.verl.assembly import Placement, worker_settings
from agentlightning.verl.batching import MiniBatchPlan, make_batch
from agentlightning.verl.config import load_config
from agentlightning.verl.data import PromptDataset
from agentlightning.verl.rules import logical_shards
from agentlightning.verl.schema import Config
from agentlightning.workers.group import InProcess, WorkerGroup
from agentlightning.workers.messages import MiniBatch
from agentlightning.workers.settings import WorkerSettings
from agentlightning.workers.shards import prompt_shards

PHASES = ("gen", "old_log_prob", "update_actor")


class Bench:
    """The data and settings of one shape; `step` runs one step on a group."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = PromptDataset.from_config(config.data, load_tokenizer(config.actor_rollout_ref.model.path))
        actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        self.plan = MiniBatchPlan(actor.ppo_mini_batch_size, rollout.n, 1, False, float(config.data.max_response_length))

    def settings(self, shards: int | None) -> WorkerSettings:
        """Of a worker on one thread."""
        placement = Placement(world_size=1, device="cpu", num_threads=1)
        return replace(worker_settings(self.config, placement, total_steps=1), logical_shards=shards)

    def batch(self, group: WorkerGroup, step: int, version: int) -> Batch:
        """Samples of the step, with advantages as a coin gives them."""
        prompts = self.data.step_prompts(step)
        completions = group.generate(prompts, self.config.train_sampling(), seed=1, step=step, version=version)
        coin_B = np.array([hash_score("", completion.answer, "") for completion in completions], dtype=np.float32)
        batch = make_batch(prompts, completions, coin_B)
        advantages_BT = np.where(batch.mask_BT, (coin_B - coin_B.mean())[:, None], 0.0).astype(np.float32)
        return batch.with_columns(advantages=advantages_BT, old_log_probs=batch.columns["rollout_log_probs"])

    def update(self, group: WorkerGroup, batch: Batch, step: int) -> None:
        """One optimizer step."""
        group.update_actor(batch, self.plan.mini_batches(batch, 0, step), step)

    def whole(self, batch: Batch, step: int) -> tuple[Batch, list[MiniBatch], int]:
        """What a worker is told that does the optimizer step alone."""
        return batch, self.plan.mini_batches(batch, 0, step), step

    def step(self, group: WorkerGroup, step: int) -> dict[str, tuple[float, float]]:
        """Wall and CPU seconds of each phase. The weights stay those of version 0, so that each step is the same work."""
        times = {}
        clock = _Clock()
        batch = self.batch(group, step, version=0)
        times["gen"] = clock.lap()
        group.compute_log_prob(batch)
        times["old_log_prob"] = clock.lap()
        self.update(group, batch, step)
        times["update_actor"] = clock.lap()
        return times


class _Clock:
    def __init__(self) -> None:
        self.lap()

    def lap(self) -> tuple[float, float]:
        """Wall and CPU seconds since the last call."""
        now = (time.perf_counter(), time.process_time())
        before = getattr(self, "before", now)
        self.before = now
        return now[0] - before[0], now[1] - before[1]


def cost_of_exactness(bench: Bench, shards: int, steps: int) -> dict[str, Any]:
    """One worker in this process, plain and exact in turns."""
    kinds: dict[str, int | None] = {"plain": None, "exact": shards}
    groups = {kind: WorkerGroup(InProcess(bench.settings(count), lambda: None), count) for kind, count in kinds.items()}
    times: dict[str, list[dict[str, tuple[float, float]]]] = {kind: [] for kind in kinds}
    for step in range(1, steps + 2):
        for kind in kinds if step % 2 else reversed(kinds):
            measured = bench.step(groups[kind], step)
            if step > 1:  # the first warms up
                times[kind].append(measured)
    report: dict[str, Any] = {"shards": shards}
    for clock, name in enumerate(("wall_s", "cpu_s")):
        rows = {
            kind: {phase: statistics.median(one[phase][clock] for one in times[kind]) for phase in PHASES}
            | {"step": statistics.median(sum(one[phase][clock] for phase in PHASES) for one in times[kind])}
            for kind in kinds
        }
        report[name] = rows | {"ratio": {phase: rows["exact"][phase] / rows["plain"][phase] for phase in rows["plain"]}}
    return report


def _serve(pipe: Connection, settings: WorkerSettings, rank: int, world_size: int, rendezvous: str | None) -> None:
    from agentlightning.workers.worker import Worker

    worker = Worker(settings)
    if rendezvous is not None:
        worker.connect(rank, world_size, rendezvous)
    pipe.send(None)
    while True:
        method, arguments = pipe.recv()
        start = time.process_time()
        answer = getattr(worker, method)(*arguments)
        pipe.send((answer, time.process_time() - start))


class Processes:
    """Worker processes of this machine: a `Backend`. `connected`: gradients are added up over them."""

    def __init__(self, settings: WorkerSettings, world_size: int, work_dir: Path, connected: bool = True) -> None:
        self.world_size = world_size
        self.cpu_s = 0.0  # of the busiest worker in the last call
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            rendezvous = f"file://{work_dir}/rendezvous{world_size}" if connected and world_size > 1 else None
            process = context.Process(target=_serve, args=(theirs, settings, rank, world_size, rendezvous), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def call(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """See `Backend`; all are asked."""
        for pipe, of_worker in zip(self.pipes, arguments, strict=True):
            pipe.send((method, of_worker))
        answers, seconds = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        self.cpu_s = max(seconds)
        return list(answers)

    def call_first(self, method: str, *arguments: Any) -> Any:
        """See `Backend`."""
        self.pipes[0].send((method, arguments))
        return self.pipes[0].recv()[0]

    def call_beside(self, method: str, ranks: Sequence[int], *arguments: Any) -> list[Any]:
        """See `Backend`."""
        return [self.call_first(method, *arguments) for _ in ranks]

    def close(self) -> None:
        """See `Backend`."""
        for process in self.processes:
            process.kill()


def gain_of_two(bench: Bench, steps: int) -> dict[str, Any]:
    """The update by one and by two worker processes, and by two that are not connected, in turns, one thread each."""
    settings = bench.settings(None)
    with tempfile.TemporaryDirectory() as work:
        one, two = (Processes(settings, count, Path(work)) for count in (1, 2))
        apart = Processes(settings, 2, Path(work), connected=False)
        ways: dict[str, tuple[Processes, Callable[[Batch, int], object]]] = {
            "one": (one, partial(bench.update, WorkerGroup(one))),
            "two": (two, partial(bench.update, WorkerGroup(two))),
            "halves": (apart, partial(bench.update, WorkerGroup(apart))),
            "wholes": (apart, lambda batch, step: apart.call("update_actor", [bench.whole(batch, step)] * 2)),
        }
        batches = [bench.batch(WorkerGroup(one), step, version=0) for step in range(1, steps + 2)]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step, batch in enumerate(batches):
            for name in ways if step % 2 else reversed(ways):
                processes, update = ways[name]
                start = time.perf_counter()
                update(batch, step + 1)
                if step:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
                    cpu_seconds[name].append(processes.cpu_s)
        for backend in (one, two, apart):
            backend.close()
    wall, cpu = ({name: statistics.median(values) for name, values in times.items()} for times in (seconds, cpu_seconds))
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "speedup": wall["one"] / wall["two"],
        "cpu_speedup": cpu["one"] / cpu["two"],
        "speedup_of_pairs": sorted(round(a / b, 2) for a, b in zip(seconds["one"], seconds["two"], strict=True)),
        "floor": wall["one"] / wall["halves"],
        "floor_of_pairs": sorted(round(a / b, 2) for a, b in zip(seconds["one"], seconds["halves"], strict=True)),
        "machine": 2 * wall["one"] / wall["wholes"],
        "busier_share": statistics.median(_busier_share(batch) for batch in batches[1:]),
        "load": os.getloadavg()[0],
    }


def _busier_share(batch: Batch) -> float:
    """Tokens of the worker that has more of them, of two, over half of all."""
    tokens = [
        batch.response_len_B[rows].sum() + sum(dict(zip(part.uids, part.prompt_len_B.tolist(), strict=True)).values())
        for rows in prompt_shards(batch, 2)
        for part in [batch.rows(rows)]
    ]
    return float(2 * max(tokens) / sum(tokens))


def print_gain(gain: dict[str, Any]) -> None:
    """Four lines."""
    wall, cpu = gain["wall_s"], gain["cpu_s"]
    print(
        f"update_actor: one worker {wall['one']:.3f} s, two {wall['two']:.3f} s: {gain['speedup']:.2f} times as fast, "
        f"pairs {gain['speedup_of_pairs']}\n"
        f"  two with nothing to add up {wall['halves']:.3f} s: {gain['floor']:.2f} times, pairs {gain['floor_of_pairs']}\n"
        f"  two at once, each all of it {wall['wholes']:.3f} s: two processes do {gain['machine']:.2f} times as much as one\n"
        f"  by CPU time {cpu['one']:.3f} s, {cpu['two']:.3f} s for the busier one: {gain['cpu_speedup']:.2f} times; it has "
        f"{gain['busier_share']:.3f} of half the tokens; load {gain['load']:.1f} on {os.cpu_count()} cores"
    )


def main() -> None:
    """Bench and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=[name for name in sorted(SHAPES) if name != "0.6b"], default="tiny")
    parser.add_argument("--prompts", type=int, default=16, help="a step")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--steps", type=int, default=6, help="measured")
    parser.add_argument("--logical-shards", type=int, default=None)
    parser.add_argument("--only", choices=("cost", "gain"), help="one of the two parts")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    shape = SHAPES[args.model_shape]
    with tempfile.TemporaryDirectory() as work:
        overrides = [
            "trainer.backend=inprocess",
            "trainer.exact_elastic=true",
            *shape.overrides,
            f"data.train_batch_size={args.prompts}",
        ]
        overrides.append(f"actor_rollout_ref.rollout.n={args.samples}")
        if shape.random is not None:
            save_random_base(shape.random, shape.mean_response, Path(work))
            overrides.append(f"actor_rollout_ref.model.path={work}")
        bench = Bench(load_config(overrides))
        shards = args.logical_shards or logical_shards(bench.config) or 8
        report: dict[str, Any] = {"model_shape": args.model_shape, "prompts": args.prompts, "samples": args.samples}
        if args.only != "gain":
            report["cost"] = cost = cost_of_exactness(bench, shards, args.steps)
            print(
                f"{args.model_shape}: {args.prompts} x {args.samples} samples, {shards} logical shards, one worker, one thread"
            )
            for clock in ("wall_s", "cpu_s"):
                for kind, row in cost[clock].items():
                    print(f"{clock:7}{kind:6}" + "".join(f"{phase:>14} {value:6.3f}" for phase, value in row.items()))
        if args.only != "cost":
            report["gain"] = gain_of_two(bench, args.steps)
            print_gain(report["gain"])
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
