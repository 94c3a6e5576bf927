"""What a checkpoint costs beside the floor of the machine (memcpy, raw write, raw read) and beside other libraries.

    python scripts/bench_checkpoint.py                              LoRA and Adam state of 200 MB, then of 2 GB
    python scripts/bench_checkpoint.py --size 200MB --rounds 7      more rounds of one

A size enters; a table of ratios leaves, ours beside its goals and the peers. A second says as much of a disk as of a program:
so in each round each contender has its turn, in one process, in an order that rotates, and a figure is the median over the
rounds of its ratio to the floor of the same round, with the smallest and largest in brackets.

State: `lora_A` and `lora_B` of seven modules in 36 layers of a Qwen3 with hidden size 4096, with Adam's two averages and
step, float32 on the CPU, of the rank that gives the size. All use the same number of torch threads. The page cache is kept as
it is: what is read was written just before. Before each turn dirty pages are written (`sync`), and twice the memory of a state
is touched and freed: in a virtual machine its first use would otherwise be charged to who comes first.

- Blocked: `free_buffer`, copy, `start_save`; DCP's until `async_save` returns. Floor: a copy between touched arrays. Of the
  copies, which take milliseconds, the median of five counts.
- Durable save: write, digests, fsync, manifest, record, renames, from the filled buffer to the commit; the line below also has
  the copy before and the pruning after. Floor: the same bytes in blocks of 8 MiB, fsync, rename. CPU is of all that.
- Worst step: steps of about 20 ms of small matrix products, as long as a save is written behind them.
- Overhead: `--step-seconds` of such steps with a save behind them, and without; the difference over 5 s. A save that takes
  longer than the step is waited for. The line below is of the training thread's CPU time, which others disturb less.
- Load: into the live tensors, with record, manifest and digests. Floor: our files read into a fresh buffer, as loading must.
- Verify: the speed of `agl ckpt verify` beside that floor.

Peers make no digests. torch.save and safetensors are given an fsync, DCP has one of its own.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch.distributed import checkpoint as torch_dcp

from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.manifest import FileEntry
from agentlightning.checkpoint.snapshot import HostSnapshot
from agentlightning.checkpoint.store import CheckpointFiles
from agentlightning.tools.verify import verify_checkpoint

dcp: Any = torch_dcp  # its functions are not exported in pyright's eyes
SIZES = {"200MB": 200_000_000, "2GB": 2_000_000_000}
ROUNDS = {"200MB": 7, "2GB": 3}
BLOCK = 8 << 20
TRAIN_STEP_S = 5.0  # what the overhead is told of
SMALL_STEP_S = 0.02
USUAL_STEPS = 50
ADAPTER, OPTIMIZER = "actor/adapter_model.safetensors", "actor/optimizer-00000-of-00001.safetensors"
HIDDEN, LAYERS = 4096, 36
WIDTHS = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096, "gate_proj": 12288, "up_proj": 12288}
SHAPES = {**{module: (HIDDEN, width) for module, width in WIDTHS.items()}, "down_proj": (12288, HIDDEN)}  # inputs, outputs

State = Mapping[str, Mapping[str, torch.Tensor]]  # file -> name -> live tensor
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    goal: float | None
    at_least: bool = False  # else at most
    percent: bool = False
    overall: bool = False  # the mean over the rounds instead of the median

    def value(self, rounds: list[float]) -> float:
        """One number from all rounds."""
        return statistics.mean(rounds) if self.overall else statistics.median(rounds)

    def show(self, rounds: list[float]) -> str:
        """Value and spread."""
        numbers = [self.value(rounds), min(rounds), max(rounds)]
        middle, low, high = (f"{100 * x:.2f} %" if self.percent else f"{x:.2f}" for x in numbers)
        return f"{middle} ({low} to {high})"

    def verdict(self, rounds: list[float]) -> tuple[str, str]:
        """The goal in words, and whether it is met."""
        if self.goal is None:
            return "", ""
        met = self.value(rounds) >= self.goal if self.at_least else self.value(rounds) <= self.goal
        goal = f"{100 * self.goal:g} %" if self.percent else f"{self.goal:g}"
        return f"at {'least' if self.at_least else 'most'} {goal}", "yes" if met else "NO"


FIGURES = {
    "blocked": Figure("blocked time / memcpy of the state", 1.3),
    "durable": Figure("durable save wall / raw write + fsync + rename", 1.2),
    "durable_all": Figure("  the same, with copy and pruning", None),
    "cpu": Figure("CPU of a save / CPU of the raw write", 2.2),
    "worst": Figure("worst step while a save is written / DCP's", 0.25),
    "worst_usual": Figure("  worst step while a save is written / usual step", None),
    "load": Figure("load into live parameters / raw read", 2.5),
    "overhead": Figure("overhead of save_freq=1 on a 5 s step", 0.01, percent=True, overall=True),
    "overhead_cpu": Figure("  the same, CPU time of the training thread", None, percent=True, overall=True),
    "verify": Figure("speed of verify / raw read", 0.5, at_least=True),
}
Samples = dict[str, dict[str, list[float]]]  # figure -> contender -> one value a round


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one turn."""

    wall: float
    cpu: float = 0.0  # of all threads
    total: float = 0.0  # of ours, with what comes before and after the wall
    blocked: float = 0.0
    worst_step: float = 0.0


def make_state(size: int) -> State:
    """About `size` bytes of LoRA and Adam; fewer layers below the size of rank 1."""
    per_layer = 3 * 4 * sum(inputs + outputs for inputs, outputs in SHAPES.values())
    layers = max(1, min(LAYERS, size // per_layer))
    rank = max(1, round(size / (per_layer * layers)))
    weights: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for module, (inputs, outputs) in SHAPES.items():
            block = "mlp" if 12288 in (inputs, outputs) else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            weights |= {f"{name}.lora_A.weight": torch.rand(rank, inputs), f"{name}.lora_B.weight": torch.rand(outputs, rank)}
    averages = {f"{key}.{name}": torch.rand_like(w) for name, w in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    return {ADAPTER: weights, OPTIMIZER: averages | {f"step.{name}": torch.tensor(7.0) for name in weights}}


@dataclass(frozen=True, slots=True)
class Part:
    """A filled snapshot as a `PartWriter`."""

    snapshot: HostSnapshot

    @property
    def bytes(self) -> int:
        """See `PartWriter`."""
        return self.snapshot.bytes

    def __call__(self, staging: Path, algorithm: str) -> Mapping[str, FileEntry]:
        """See `PartWriter`."""
        return self.snapshot.write(staging, algorithm)


class Work:
    """What a training thread does: small products, many a step, so that whoever holds the interpreter is felt."""

    def __init__(self) -> None:
        self._a, self._b = torch.rand(96, 96), torch.rand(96, 96)
        self._products = 100
        self.step()
        self._products = max(1, round(100 * SMALL_STEP_S / statistics.median(self.step() for _ in range(30))))

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        for _ in range(self._products):
            torch.mm(self._a, self._b)
        return time.perf_counter() - start


def seconds_of(job: Callable[[], object], prepare: Callable[[], object] = gc.collect) -> float:
    """What it returns is freed after the clock has stopped."""
    prepare()
    start = time.perf_counter()
    result = job()
    seconds = time.perf_counter() - start
    del result
    return seconds


def cpu_seconds() -> float:
    """Of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def in_turns(number: int, jobs: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
    """The answers of all jobs; in each round another one begins."""
    gc.collect()
    names, start = list(jobs), number % len(jobs)
    return {name: jobs[name]() for name in names[start:] + names[:start]}


def fsync(path: Path) -> None:
    """Make a file durable that a library has written."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Bench:
    """One size: its live state, the manager and snapshots that a trainer has, and the turns of all contenders."""

    def __init__(self, size: int, directory: Path, work: Work, step_seconds: float) -> None:
        self.state, self.directory, self.work = make_state(size), directory, work
        self.steps = max(1, round(step_seconds / SMALL_STEP_S))
        self.flat = {f"{file}:{name}": tensor for file, tensors in self.state.items() for name, tensor in tensors.items()}
        self.manager = CheckpointManager(directory / "run", save_freq=1, keep=1)
        self.snapshots = [HostSnapshot(), HostSnapshot()]
        for snapshot in self.snapshots:
            snapshot.copy_from(self.state)
        self.bytes = self.snapshots[0].bytes
        self.step = 0

    def close(self) -> None:
        """End the manager's thread and remove all files."""
        self.manager.close()
        shutil.rmtree(self.directory)

    def round(self, number: int, samples: Samples) -> None:
        """Each contender once for each figure."""

        def add(figure: str, costs: Mapping[str, float]) -> None:
            for name, cost in costs.items():
                samples[figure][name].append(cost)

        memory = self._memory_turns(number)
        behind = in_turns(number, {"no save": self.no_save, "ours": self.save_behind, "DCP async": self.dcp_behind})
        floor = memory.pop("memcpy")
        memory["ours"] += behind["ours"].blocked
        memory["DCP async"] = behind["DCP async"].blocked
        add("blocked", {name: seconds / floor for name, seconds in memory.items()})
        add("worst", {"ours": behind["ours"].worst_step / behind["DCP async"].worst_step})
        add("worst_usual", {name: cost.worst_step / behind["no save"].wall for name, cost in behind.items()})

        peers = {"safetensors": self.safetensors_save, "torch.save": self.torch_save, "DCP": self.dcp_save}
        saves = in_turns(number, {"raw": self.raw_write, "ours": self.save, **peers})
        raw = saves.pop("raw")
        add("durable", {name: cost.wall / raw.wall for name, cost in saves.items()})
        add("durable_all", {"ours": saves["ours"].total / raw.wall})
        add("cpu", {name: cost.cpu / raw.cpu for name, cost in saves.items()})

        peer_loads = {"safetensors": self.safetensors_load, "torch.load": self.torch_load, "DCP": self.dcp_load}
        reads = {"raw": self.raw_read, "ours": self.load, "verify": self.verify, **peer_loads}
        loads = in_turns(number, {name: lambda read=read: seconds_of(read, self.settle) for name, read in reads.items()})
        floor = loads.pop("raw")
        add("verify", {"ours": floor / loads.pop("verify")})
        add("load", {name: seconds / floor for name, seconds in loads.items()})

        self._remove("safetensors", "torch", "dcp")
        steps = in_turns(number, {"without": self.long_step, "with": self.long_step_saving})
        add("overhead", {"ours": (steps["with"].wall - steps["without"].wall) / TRAIN_STEP_S})
        add("overhead_cpu", {"ours": (steps["with"].cpu - steps["without"].cpu) / TRAIN_STEP_S})

    def _memory_turns(self, number: int) -> dict[str, float]:
        """Seconds of a copy between two touched arrays, of cloning each tensor and of our copy; medians of a few."""
        whole = np.concatenate(list(self.snapshots[0].files().values()))
        spare = np.full(len(whole), 1, np.uint8)
        jobs = {
            "memcpy": lambda: np.copyto(spare, whole),
            "clone": lambda: list(map(torch.clone, self.flat.values())),
            "ours": self.copy,
        }
        turns = [in_turns(number + i, {name: lambda job=job: seconds_of(job) for name, job in jobs.items()}) for i in range(5)]
        return {name: statistics.median(turn[name] for turn in turns) for name in jobs}

    def copy(self) -> int:
        """Ours; the host buffer it is in."""
        buffer = self.manager.free_buffer()
        self.snapshots[buffer].copy_from(self.state)
        return buffer

    def no_save(self) -> Cost:
        """The usual step and the worst of some, nothing behind them."""
        steps = [self.work.step() for _ in range(USUAL_STEPS)]
        return Cost(statistics.median(steps), worst_step=max(steps))

    def save_behind(self) -> Cost:
        """Copy, start the save, and work until it is durable."""
        self.settle()
        start = time.perf_counter()
        handed_over, steps = self.start_save(), [self.work.step()]
        while not (outcomes := self.manager.collect()):
            steps.append(self.work.step())
        assert outcomes[0].saved is not None, self.manager.failed
        return Cost(time.perf_counter() - start, blocked=handed_over, worst_step=max(steps))

    def dcp_behind(self) -> Cost:
        """The same with DCP's thread."""
        self.settle()
        start = time.perf_counter()
        future = dcp.async_save(self.flat, checkpoint_id=self.directory / "dcp", no_dist=True)
        blocked, steps = time.perf_counter() - start, [self.work.step()]
        while not future.done():
            steps.append(self.work.step())
        future.result()
        cost = Cost(time.perf_counter() - start, blocked=blocked, worst_step=max(steps))
        self._remove("dcp")
        return cost

    def start_save(self) -> float:
        """What blocks a training step, and what the copy was not of that."""
        self.step += 1
        buffer, start = self.copy(), time.perf_counter()
        documents = {"trainer_state.json": {"global_step": self.step}, "actor/adapter_config.json": {"peft_type": "LORA"}}
        self.manager.start_save(self.step, CheckpointFiles({}, parts=Part(self.snapshots[buffer]), json=documents), buffer)
        return time.perf_counter() - start

    def long_step(self) -> Cost:
        """A training step: its wall, and the CPU time of this thread."""
        start, cpu = time.perf_counter(), time.thread_time()
        for _ in range(self.steps):
            self.work.step()
        return Cost(time.perf_counter() - start, time.thread_time() - cpu)

    def long_step_saving(self) -> Cost:
        """A training step, with the save of the one before."""
        self.settle()
        start, cpu = time.perf_counter(), time.thread_time()
        self.start_save()
        self.long_step()
        assert self.manager.drain()[0].saved is not None, self.manager.failed
        return Cost(time.perf_counter() - start, time.thread_time() - cpu)

    def settle(self) -> None:
        """Before a turn: nothing is dirty, and the pages that it will ask for were in use before."""
        os.sync()
        np.full(2 * self.bytes, 1, np.uint8)

    def _timed(self, save: Callable[[], object]) -> Cost:
        self.settle()
        cpu, start = cpu_seconds(), time.perf_counter()
        save()
        return Cost(time.perf_counter() - start, cpu_seconds() - cpu)

    def raw_write(self) -> Cost:
        """The floor."""
        target = self.directory / "raw"

        def write() -> None:
            (target / "staging").mkdir(parents=True)
            for place, array in enumerate(self.snapshots[0].files().values()):
                with open(target / "staging" / str(place), "wb", buffering=0) as file:
                    for begin in range(0, len(array), BLOCK):
                        file.write(array.data[begin : begin + BLOCK])
                    os.fsync(file.fileno())
            (target / "staging").rename(target / "final")

        cost = self._timed(write)
        self._remove("raw")
        return cost

    def save(self) -> Cost:
        """Ours: what the background thread does is waited for."""

        def save() -> None:
            self.start_save()
            assert self.manager.drain()[0].saved is not None, self.manager.failed

        cost = self._timed(save)
        assert self.manager.last is not None
        return replace(cost, wall=self.manager.last.seconds, total=cost.wall)

    def safetensors_save(self) -> Cost:
        """Two files, as ours."""
        target = self.directory / "safetensors"

        def save() -> None:
            target.mkdir()
            for place, tensors in enumerate(self.state.values()):
                safetensors.torch.save_file(dict(tensors), target / str(place))
                fsync(target / str(place))

        return self._timed(save)

    def torch_save(self) -> Cost:
        """One file."""

        def save() -> None:
            torch.save(self.flat, self.directory / "torch")
            fsync(self.directory / "torch")

        return self._timed(save)

    def dcp_save(self) -> Cost:
        """It has an fsync of its own."""
        return self._timed(lambda: dcp.save(self.flat, checkpoint_id=self.directory / "dcp", no_dist=True))

    def _paths(self) -> list[Path]:
        return [self.directory / "run" / f"global_step_{self.step}" / relative for relative in self.state]

    def raw_read(self) -> list[np.ndarray]:
        """The floor: our files into fresh buffers."""
        buffers: list[np.ndarray] = []
        for path in self._paths():
            buffers.append(np.empty(path.stat().st_size, np.uint8))
            with open(path, "rb", buffering=0) as file:
                done = 0
                while done < len(buffers[-1]):
                    done += file.readinto(buffers[-1].data[done : done + BLOCK])
        return buffers

    def load(self) -> object:
        """Ours."""
        loaded = self.manager.load_latest()
        assert loaded is not None
        assert loaded.step == self.step
        for file, tensors in self.state.items():
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(loaded.tensors[file][name]))
        return loaded

    def verify(self) -> None:
        """`agl ckpt verify`."""
        found = verify_checkpoint(self._paths()[0].parents[1])
        assert not found.problems, found.problems

    def safetensors_load(self) -> object:
        """`load_file`, and a copy."""
        files = [safetensors.torch.load_file(self.directory / "safetensors" / str(place)) for place in range(len(self.state))]
        for tensors, loaded in zip(self.state.values(), files, strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(loaded[name])
        return files

    def torch_load(self) -> object:
        """`torch.load`, and a copy."""
        loaded = torch.load(self.directory / "torch", weights_only=True)
        for name, tensor in self.flat.items():
            tensor.copy_(loaded[name])
        return loaded

    def dcp_load(self) -> None:
        """DCP loads in place."""
        dcp.load(dict(self.flat), checkpoint_id=self.directory / "dcp", no_dist=True)

    def _remove(self, *names: str) -> None:
        for name in names:
            path = self.directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def bench(size: int, rounds: int, directory: Path, step_seconds: float = TRAIN_STEP_S) -> tuple[int, Samples]:
    """Bytes of the state, and all values by figure and contender."""
    work = Work()
    warmup = Bench(min(size, 4_000_000), directory / "warmup", work, SMALL_STEP_S)
    warmup.round(0, defaultdict(lambda: defaultdict(list)))
    warmup.close()
    samples: Samples = defaultdict(lambda: defaultdict(list))
    contenders = Bench(size, directory / "bench", work, step_seconds)
    for number in range(rounds):
        contenders.round(number, samples)
    contenders.close()
    return contenders.bytes, samples


def table(samples: Samples) -> str:
    """The report in lines."""
    rows = [("figure", "ours", "goal", "met", "peers")]
    for key, figure in FIGURES.items():
        ours = samples[key]["ours"]
        peers = ", ".join(f"{name} {figure.show(values)}" for name, values in samples[key].items() if name != "ours")
        rows.append((figure.name, figure.show(ours), *figure.verdict(ours), peers))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4])) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Bench and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both")
    parser.add_argument("--rounds", type=int, help=f"{', '.join(f'{n} for {size}' for size, n in ROUNDS.items())}")
    parser.add_argument("--dir", type=Path, help="where to write; a temporary directory in the current one if not given")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all")
    parser.add_argument("--step-seconds", type=float, default=TRAIN_STEP_S, help="of the steps for the overhead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch.distributed")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    for name in SIZES if args.size == "both" else [args.size]:
        rounds = args.rounds or ROUNDS[name]
        with tempfile.TemporaryDirectory(dir=args.dir or Path.cwd(), prefix=".bench_checkpoint_") as work_dir:
            size, samples = bench(SIZES[name], rounds, Path(work_dir), args.step_seconds)
        settings = f"{rounds} rounds, {args.threads} torch thread(s), {args.step_seconds:g} s steps"
        print(f"{name}: {size / 1e6:.0f} MB of state, {settings}")
        print(table(samples), flush=True)


if __name__ == "__main__":
    main()
