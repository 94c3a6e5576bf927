"""What Ray itself costs a controller that calls many workers: real actors, empty calls.

    python scripts/bench_ray_calls.py                    1,024 calls at a time, to four actors that do nothing
    python scripts/bench_ray_calls.py --bytes 44000      each given an array of that size

A call here is what `workers/ray_backend.py` does for one worker: `remote()` with the method's name and its arguments, then the
answers of all by one `ray.get`. Leaves, a call: seconds of the wall clock, CPU seconds of the thread that asks and of the whole
controller process with the threads that Ray runs in it. simulate_scale.py counts the pickling of arguments and answers and
nothing else of this; a step of one optimizer step makes three calls to each worker (generate, update_actor,
update_weights) and one to each that writes a part of the checkpoint (snapshot).

Left out: that a thousand workers are a thousand connections; the network. On a machine with few cores the actors take the
time of the controller: then look at the CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import ray

from agentlightning.workers.ray_backend import leave_ray, start_ray

CALLS_A_STEP = 5


class Idle:
    """In the place of a worker."""

    def call(self, method: str, *arguments: object) -> None:
        """Nothing."""


def measure(calls: int, actors: int, size: int, rounds: int) -> list[tuple[float, float, float]]:
    """Of each round: seconds of the wall clock, of the asking thread's CPU and of the process's, a call."""
    remote: Any = ray.remote(num_cpus=0)(Idle)
    workers: list[Any] = [remote.remote() for _ in range(actors)]
    payload = np.zeros(size, dtype=np.uint8)
    arguments = (payload,) if size else ()
    ray.get([worker.call.remote("warm", *arguments) for worker in workers])
    measured = []
    for _ in range(rounds):
        before = (time.perf_counter(), time.thread_time(), time.process_time())
        ray.get([workers[number % actors].call.remote("update_weights", *arguments) for number in range(calls)])
        after = (time.perf_counter(), time.thread_time(), time.process_time())
        measured.append(tuple((b - a) / calls for a, b in zip(before, after, strict=True)))
    return measured[1:]  # the first warms up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1024)
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--bytes", type=int, default=0, help="of the argument of each call")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    start_ray({}, args.actors)
    try:
        rounds = measure(args.calls, args.actors, args.bytes, args.rounds)
    finally:
        leave_ray(30.0)
    wall, thread, process = (statistics.median(column) for column in zip(*rounds, strict=True))
    a_step = CALLS_A_STEP * args.calls
    print(
        f"a call: {wall * 1e3:.3f} ms, CPU {thread * 1e3:.3f} ms of the asking thread, {process * 1e3:.3f} ms of the process\n"
        f"a step of {a_step:,} calls: {wall * a_step:.2f} s, CPU {thread * a_step:.2f} s and {process * a_step:.2f} s"
    )


if __name__ == "__main__":
    main()
