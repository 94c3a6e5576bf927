"""Kill a run, damage its checkpoints, and see what the next start makes of it.

    python scripts/chaos.py                       all of it: 200 kills, 1,000 flipped bits, 10,000 random sequences
    python scripts/chaos.py --only kills          one part: kills, flips or sequences
    python scripts/chaos.py --kills 20 --seed 7   less of it, other instants

It works below $TMPDIR; with TMPDIR=/dev/shm it is several times as fast, since nothing waits for a disk.

kills: a toy trains in a process of its own, saves after every step behind the training, and tells each step that is durable.
It is killed (SIGKILL) at random instants and started again in the same directory, then at every file-system operation of a
save. A start must resume from the last step that was told, or a later one, with exactly the state of the never-killed run, and
leave no leftovers. Two common ways to save are killed alike, for comparison: one `torch.save` file a step, the newest by
file time is resumed from; and one directory a step (config, weights, optimizer, trainer state, written in place), the highest
is resumed from.

flips: one bit is flipped anywhere in the newest checkpoint; it must be passed over, by name, for the one before.

sequences: saves and prunes in random order with random numbers to keep, killed at a random file-system operation, started
again, and so on. There must be a checkpoint of which every byte is right at each start.

The exit code is 1 if anything of this does not hold.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.numpy import load_file, save_file

from agentlightning.checkpoint import (
    CheckpointFiles,
    CheckpointManager,
    LoadedCheckpoint,
    RetentionPolicy,
    find_valid,
    save,
)
from agentlightning.checkpoint.retention import prune

NUMBERS = 1 << 16  # in the toy's state
WEIGHTS, STATE = "actor/adapter_model.safetensors", "trainer_state.json"
LONGEST_LIFE_S = 0.12  # of a child that is killed at a random instant: starting, resuming and some steps
CHANGING = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir")

Report = Callable[..., object]


# ---- the toy


def beginning(numbers: int) -> np.ndarray:
    """The state before the first step."""
    return np.arange(numbers, dtype=np.int32)


def evolve(weights: np.ndarray, step: int) -> np.ndarray:
    """The state after `step` from the one before it; every number depends on each step so far, and overflows by intent.

    It takes a fraction of the time of a save, so that most kills meet a save.
    """
    return weights * np.int32(1664525) + np.int32(1013904223 + step % 10**9)


def fingerprint(weights: np.ndarray) -> str:
    """Tells two states apart by a single bit."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(weights).view(np.uint8).data)


@dataclass
class NeverKilled:
    """The run that nobody kills: what the state after each step must be."""

    numbers: int
    _weights: np.ndarray = field(init=False)
    _known: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._weights = beginning(self.numbers)
        self._known = [fingerprint(self._weights)]

    def after(self, step: int) -> str:
        """The fingerprint of the state after `step`."""
        while len(self._known) <= step:
            self._weights = evolve(self._weights, len(self._known))
            self._known.append(fingerprint(self._weights))
        return self._known[step]


def files_of(weights: np.ndarray, step: int) -> CheckpointFiles:
    """What the toy saves."""
    return CheckpointFiles({WEIGHTS: {"weights": weights}}, {STATE: {"step": step}})


def resume(manager: CheckpointManager, numbers: int, report: Report) -> tuple[np.ndarray, int]:
    """Go on from what is there, and tell from where, with what state, and what lies around that should not."""
    loaded = manager.load_latest()
    weights = beginning(numbers) if loaded is None else np.array(loaded.tensors[WEIGHTS]["weights"])
    step = 0 if loaded is None else loaded.step
    wrong = leftovers(manager.root)
    if loaded is not None and (loaded.skipped or loaded.json[STATE] != {"step": step}):
        wrong.append(f"passed over {loaded.skipped}, trainer state {loaded.json[STATE]}")
    report("resumed", step, fingerprint(weights), wrong)
    manager.go_on()
    return weights, step


def leftovers(root: Path) -> list[str]:
    """Hidden names of dead processes, records without a directory and directories without a record."""
    names = {name for name in os.listdir(root) if name.startswith("global_step_")}
    records = {name.removesuffix(".pt") for name in names if name.endswith(".pt")}
    directories = {name for name in names if not name.endswith(".pt")}
    return sorted(name for name in os.listdir(root) if name.endswith(".tmp")) + sorted(records ^ directories)


def acknowledge(manager: CheckpointManager, report: Report, wait: bool = False) -> None:
    """Tell each step that has become durable."""
    for outcome in manager.drain() if wait else manager.collect():
        if outcome.error is not None:
            raise outcome.error
        report("durable", outcome.step)


def train(root: Path, last: int, report: Report) -> None:
    """Steps up to `last`, each one saved behind the next; tells each that is durable, and at the end the state."""
    with CheckpointManager(root, save_freq=1, keep=2) as manager:
        weights, done = resume(manager, NUMBERS, report)
        for step in range(done + 1, last + 1):
            weights = evolve(weights, step)
            manager.start_save(step, files_of(weights, step), manager.free_buffer())
            acknowledge(manager, report)
        acknowledge(manager, report, wait=True)
        report("ended", last, fingerprint(weights))


# ---- children that are killed


def in_child(
    work: Callable[[Report], None], kill_after_s: float | None = None, counted_from: str | None = None
) -> tuple[list[list[Any]], bool]:
    """Run `work` in a forked process, killed after a time, which may be counted from its first report of a kind.

    Returns what it reported until then, and whether it was killed. RuntimeError if it failed by itself.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        write = os.write  # as it is now: a report is no operation of a save
        try:
            os.close(reading)
            work(lambda *what: write(writing, json.dumps(what).encode() + b"\n"))
            code = 0
        except BaseException:  # noqa: BLE001 - the parent has a run of its own to go on with
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    received = b""
    deadline = time.monotonic() + kill_after_s if kill_after_s is not None and counted_from is None else None
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not selector.select(left):
                os.kill(pid, signal.SIGKILL)
                deadline = None
                continue
            data = os.read(reading, 1 << 16)
            if not data:
                break
            received += data
            if counted_from is not None and kill_after_s is not None and f'["{counted_from}"'.encode() in received:
                deadline, counted_from = time.monotonic() + kill_after_s, None
    os.close(reading)
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if status and not killed:
        raise RuntimeError(f"a child failed by itself, status {status}")
    return [json.loads(line) for line in received.split(b"\n")[:-1]], killed


def die_at(k: int) -> None:
    """From now on, the k-th call of this process that changes the file system is SIGKILL instead."""
    calls = count(1)

    def deadly(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            reading = name == "open" and not args[1] & os.O_CREAT
            if not reading and next(calls) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CHANGING:
        setattr(os, name, deadly(name))


@dataclass
class Watched:
    """A run directory and what was told of it: whether each start keeps the promise."""

    expected: NeverKilled
    durable: int = 0  # the last step that was told to be
    starts: int = 0
    resumed: int = 0
    problems: list[str] = field(default_factory=list)

    def hear(self, reports: list[list[Any]]) -> None:
        """Compare what a child said with what it should have said, and remember what it promised."""
        for kind, step, *rest in reports:
            if kind == "durable":
                self.durable = max(self.durable, step)
                continue
            before = len(self.problems)
            if kind == "resumed":
                self.starts += 1
                if step < self.durable:
                    self.problems.append(f"step {self.durable} was durable, resumed from {step}")
                if rest[1]:
                    self.problems.append(f"at step {step}: {rest[1]}")
            if rest[0] != self.expected.after(step):
                self.problems.append(f"{kind} with another state than that of step {step}")
            self.resumed += kind == "resumed" and len(self.problems) == before


# ---- the three parts


def kill_at_random(root: Path, kills: int, seed: int) -> Watched:
    """One run, killed `kills` times, then left to end."""
    rng = random.Random(seed)
    run = Watched(NeverKilled(NUMBERS))
    for _ in range(kills):
        run.hear(in_child(lambda report: train(root, 1 << 40, report), rng.uniform(0, LONGEST_LIFE_S))[0])
    last = run.durable + 5
    reports, _ = in_child(lambda report: train(root, last, report))
    run.hear(reports)
    if reports[-1][:2] != ["ended", last]:
        run.problems.append(f"the last start did not come to step {last}")
    return run


def kill_at_every_operation(base: Path) -> Watched:
    """Step 3 is saved, and step 1 pruned, in a copy of the same directory for each operation to die at."""
    total = Watched(NeverKilled(NUMBERS))
    in_child(lambda report: train(base / "template", 2, report))
    for k in count(1):
        root = base / "copy"
        shutil.copytree(base / "template", root)
        one = Watched(total.expected, durable=2)

        def dying(report: Report, root: Path = root, k: int = k) -> None:
            die_at(k)
            train(root, 3, report)

        reports, killed = in_child(dying)
        for kind, step, *_ in reports:
            one.durable = max(one.durable, step if kind == "durable" else 0)
        one.hear(in_child(lambda report, root=root: train(root, 4, report))[0])
        total.starts, total.resumed = total.starts + one.starts, total.resumed + one.resumed
        total.problems += [f"operation {k}: {problem}" for problem in one.problems]
        shutil.rmtree(root)
        if not killed:
            return total
    raise AssertionError("unreachable")


def flip_bits(root: Path, flips: int, seed: int) -> list[str]:
    """Flip one bit, `flips` times, anywhere in the newer of two checkpoints; returns what was not noticed."""
    rng = random.Random(seed)
    with CheckpointManager(root, save_freq=1) as manager:
        for step in (1, 2):
            manager.save(step, files_of(evolve(beginning(64), step), step))
    files = [root / "global_step_2.pt", *sorted(path for path in (root / "global_step_2").rglob("*") if path.is_file())]
    sizes = [path.stat().st_size for path in files]
    problems = []
    for _ in range(flips):
        (path,) = rng.choices(files, sizes)
        good = path.read_bytes()
        bit = rng.randrange(len(good) * 8)
        data = bytearray(good)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        loaded: LoadedCheckpoint | None = find_valid(root)
        if loaded is None or loaded.step != 1 or [name for name, _ in loaded.skipped] != ["global_step_2.pt"]:
            problems.append(f"bit {bit} of {path.name}: {loaded}")
        path.write_bytes(good)
    return problems


def one_life(root: Path, seed: int, dies: bool, report: Report) -> None:
    """Start, then save and prune in random order; dies at a random operation, or not at all."""
    rng = random.Random(seed)
    if dies:
        die_at(rng.randint(1, 160))
    with CheckpointManager(root, save_freq=1, keep=rng.choice((1, 2, 3))) as manager:
        weights, step = resume(manager, 16, report)
        for _ in range(rng.randint(1, 6)):
            if rng.random() < 0.7:
                step += 1
                weights = evolve(weights, step)
                manager.start_save(step, files_of(weights, step), manager.free_buffer())
                acknowledge(manager, report, wait=rng.random() < 0.5)
            else:
                acknowledge(manager, report, wait=True)  # the writer prunes too
                prune(root, RetentionPolicy(rng.choice((1, 2))), None)
        acknowledge(manager, report, wait=True)
        if step:
            resume(manager, 16, report)


def run_sequences(base: Path, sequences: int, seed: int, progress: Callable[[int], None] = lambda _: None) -> Watched:
    """Each in a directory of its own: one to three lives that end by a kill, and a last one that does not."""
    rng = random.Random(seed)
    total = Watched(NeverKilled(16))
    for number in range(sequences):
        root = base / str(number)
        one = Watched(total.expected)
        lives = rng.randint(1, 3)
        for life in range(lives + 1):
            life_seed = rng.getrandbits(32)
            dies = life < lives
            one.hear(in_child(lambda report, s=life_seed, d=dies, r=root: one_life(r, s, d, report))[0])
        total.starts, total.resumed = total.starts + one.starts, total.resumed + one.resumed
        total.problems += [f"sequence {number}: {problem}" for problem in one.problems]
        shutil.rmtree(root)
        progress(number + 1)
    return total


# ---- how others save


def one_file_a_step(root: Path, weights: np.ndarray, step: int) -> None:
    """`torch.save` under the final name."""
    torch.save({"step": step, "weights": torch.from_numpy(weights), "moments": torch.from_numpy(weights)}, root / f"{step}.pt")


def newest_file(root: Path) -> tuple[np.ndarray, int]:
    """By file time."""
    path = max(root.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    value = torch.load(path, weights_only=True)
    return value["weights"].numpy(), value["step"]


def one_directory_a_step(root: Path, weights: np.ndarray, step: int) -> None:
    """Config, weights, optimizer and trainer state, each under its final name."""
    directory = root / f"checkpoint-{step}"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"numbers": len(weights)}))
    save_file({"weights": weights}, directory / "model.safetensors")
    torch.save({"moments": torch.from_numpy(weights)}, directory / "optimizer.pt")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def highest_directory(root: Path) -> tuple[np.ndarray, int]:
    """By the number in its name."""
    directory = max(root.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    json.loads((directory / "config.json").read_text())
    torch.load(directory / "optimizer.pt", weights_only=True)
    weights = load_file(directory / "model.safetensors")["weights"]
    return weights, json.loads((directory / "trainer_state.json").read_text())["global_step"]


def kill_another(
    base: Path,
    save_as: Callable[[Path, np.ndarray, int], None],
    load: Callable[[Path], tuple[np.ndarray, int]],
    kills: int,
    seed: int,
) -> int:
    """In how many of `kills` fresh directories the start after a kill resumes from a right state."""
    rng = random.Random(seed)
    expected = NeverKilled(NUMBERS)
    resumed = 0

    def run(root: Path, report: Report) -> None:
        weights = beginning(NUMBERS)
        for step in count(1):
            weights = evolve(weights, step)
            save_as(root, weights, step)
            report("durable", step)

    def start_again(root: Path, report: Report) -> None:
        try:
            weights, step = load(root)
            report("resumed", step, fingerprint(weights))
        except Exception as error:  # noqa: BLE001 - whatever a loader raises on torn files
            report("failed", 0, str(error))

    for number in range(kills):
        root = base / str(number)
        root.mkdir(parents=True)
        in_child(lambda report, root=root: run(root, report), rng.uniform(0, LONGEST_LIFE_S), counted_from="durable")
        ((kind, step, text),) = in_child(lambda report, root=root: start_again(root, report))[0]
        resumed += kind == "resumed" and text == expected.after(step)
        shutil.rmtree(root)
    return resumed


# ---- the command


def kills(base: Path, number: int, seed: int) -> Iterator[str]:
    """The part `kills`, line by line; problems begin with FAILED."""
    run = kill_at_random(base / "random", number, seed)
    yield f"kills: {number} at random instants, {run.resumed} of {run.starts} starts resumed right, to step {run.durable}"
    yield from (f"FAILED kills: {problem}" for problem in run.problems)
    run = kill_at_every_operation(base / "operations")
    yield f"kills: one at each of {run.starts - 1} operations of a save, {run.resumed} of {run.starts} starts resumed right"
    yield from (f"FAILED kills: {problem}" for problem in run.problems)
    scaled = max(4, number * 2 // 5)
    resumed = kill_another(base / "files", one_file_a_step, newest_file, scaled, seed)
    yield f"for comparison: newest file by time, {resumed} of {scaled} resumed"
    resumed = kill_another(base / "directories", one_directory_a_step, highest_directory, scaled, seed)
    yield f"for comparison: a directory written in place, {resumed} of {scaled} resumed"


def flips(base: Path, number: int, seed: int) -> Iterator[str]:
    """The part `flips`, line by line."""
    problems = flip_bits(base / "flips", number, seed)
    yield f"flips: {number}, {number - len(problems)} passed over by name for the checkpoint before"
    yield from (f"FAILED flips: {problem}" for problem in problems)


def sequences(base: Path, number: int, seed: int) -> Iterator[str]:
    """The part `sequences`, line by line."""

    def progress(done: int) -> None:
        if done % 1000 == 0:
            print(f"sequences: {done} done", file=sys.stderr, flush=True)

    run = run_sequences(base / "sequences", number, seed, progress)
    yield f"sequences: {number} of saves, kills and prunes, {run.resumed} of {run.starts} loads right"
    yield from (f"FAILED sequences: {problem}" for problem in run.problems)


def main() -> int:
    """Run what was asked for; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--flips", type=int, default=1000, metavar="N")
    parser.add_argument("--sequences", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "flips", "sequences"))
    options = parser.parse_args()
    failed = False
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        # What the first save and load import, no child has to. Flips come last: what forks should have no threads.
        save(Path(directory) / "warm", "global_step_1", 1, files_of(beginning(4), 1))
        find_valid(Path(directory) / "warm")
        gc.freeze()  # children leave those pages alone
        for name, part in (("kills", kills), ("sequences", sequences), ("flips", flips)):
            if options.only in (None, name) and getattr(options, name):
                started = time.monotonic()
                for line in part(Path(directory), getattr(options, name), options.seed):
                    print(line, flush=True)
                    failed |= line.startswith("FAILED")
                print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
