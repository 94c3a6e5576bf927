"""A group whose workers are processes of this machine, connected by gloo: what `ray_backend` does, without Ray's start.

Each process serves one worker count after the other, for its imports cost more than all that it computes.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from agentlightning.workers.settings import WorkerSettings

PATIENCE_S = 120.0


def _serve(pipe: Connection) -> None:
    import torch.distributed as dist

    from agentlightning.workers.worker import Worker

    worker: Any = None
    while True:
        method, arguments = pipe.recv()
        try:
            if method == "build":
                if dist.is_initialized():
                    dist.destroy_process_group()
                worker, answer = Worker(*arguments), None
            else:
                answer = getattr(worker, method)(*arguments)
            pipe.send((True, answer))
        except Exception:
            pipe.send((False, traceback.format_exc()))
            raise


class Processes:
    """Up to `count` worker processes; `backend` makes a `Backend` of the first few."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["agentlightning.workers.worker"])
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def backend(self, settings: WorkerSettings, world_size: int, rendezvous: Path) -> GlooBackend:
        """New workers; `rendezvous` is a file that is not there yet."""
        backend = GlooBackend(self.pipes[:world_size])
        backend.call("build", [(settings,)] * world_size)
        if world_size > 1:
            backend.call("connect", [(rank, world_size, f"file://{rendezvous}") for rank in range(world_size)])
        return backend

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(PATIENCE_S)


class GlooBackend:
    """See `agentlightning.workers.group.Backend`."""

    def __init__(self, pipes: Sequence[Any]) -> None:
        self.pipes, self.world_size = pipes, len(pipes)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        for pipe, of_worker in zip(self.pipes, arguments, strict=True):
            if of_worker is not None:
                pipe.send((method, of_worker))
        return [
            self._answer(pipe) if of_worker is not None else None for pipe, of_worker in zip(self.pipes, arguments, strict=True)
        ]

    def call_first(self, method: str, *arguments: Any) -> Any:
        self.pipes[0].send((method, arguments))
        return self._answer(self.pipes[0])

    def call_beside(self, method: str, ranks: Sequence[int], *arguments: Any) -> list[Any]:
        for rank in ranks:
            self.pipes[rank].send((method, arguments))
        return [self._answer(self.pipes[rank]) for rank in ranks]

    def close(self) -> None:
        """The processes go on to serve others."""

    def _answer(self, pipe: Any) -> Any:
        if not pipe.poll(PATIENCE_S):
            raise TimeoutError(f"a worker did not answer within {PATIENCE_S} s")
        good, answer = pipe.recv()
        assert good, answer
        return answer
