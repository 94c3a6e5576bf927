"""Run by test_checkpoint_kill.py in a process of its own: `python kill_driver.py SCENARIO=BASE...`.

For k = 1, 2, ... it copies BASE/template to BASE/<k>, and a forked child runs the scenario there with an `os` whose k-th call
that changes the file system sends SIGKILL instead. A scenario ends when a child comes through alive. Children are forked, so
that torch is imported once.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from itertools import count
from pathlib import Path

import numpy as np

from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.store import CheckpointFiles

CHANGING = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "link")


def state_of(step: int) -> CheckpointFiles:
    rng = np.random.default_rng(step)
    weights = {"lora_A": rng.standard_normal((8, 4), dtype=np.float32), "lora_B": rng.standard_normal((4, 8), dtype=np.float32)}
    moments = {f"exp_avg.{name}": array * 0.1 for name, array in weights.items()}
    return CheckpointFiles(
        tensors={"actor/adapter_model.safetensors": weights, "actor/optimizer-00001-of-00001.safetensors": moments},
        json={"actor/adapter_config.json": {"r": 4}, "trainer_state.json": {"step": step}},
    )


def save_next(root: Path) -> None:
    """The template holds steps 1 and 2: saving 3 with keep=2 also prunes 1."""
    with CheckpointManager(root, save_freq=1, keep=2) as manager:
        manager.load_latest()
        manager.save(3, state_of(3))


def go_back(root: Path) -> None:
    with CheckpointManager(root, save_freq=1) as manager:
        manager.load(1)
        manager.go_on()
        manager.save(2, state_of(20))
        manager.go_on()


def start_over(root: Path) -> None:
    with CheckpointManager(root, save_freq=1) as manager:
        manager.start_over(also=["metrics.jsonl"])


def start(root: Path) -> None:
    """The template is what a killed save left: only the clearing at the start is at stake."""
    CheckpointManager(root, save_freq=1).close()


SCENARIOS = {
    "save_next": save_next,
    "save_torn": save_next,
    "save_first": save_next,
    "go_back": go_back,
    "start_over": start_over,
    "start": start,
}


def die_at(k: int, torn: bool) -> None:
    """The k-th call of a changing function of `os` dies before it does anything; `torn`: the k-th write dies half-way."""
    calls = count(1)

    def deadly(name: str):
        real = getattr(os, name)

        def call(*args, **kwargs):
            reading = name == "open" and not args[1] & os.O_CREAT  # nothing has changed since the operation before it
            if not reading and next(calls) == k:
                if torn:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("write",) if torn else CHANGING:
        setattr(os, name, deadly(name))


def kill_everywhere(scenario: str, base: Path) -> None:
    for k in count(1):
        root = base / str(k)
        shutil.copytree(base / "template", root)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                die_at(k, torn=scenario == "save_torn")
                SCENARIOS[scenario](root)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WIFSIGNALED(status), f"{scenario}, operation {k}: the child failed by itself"
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{scenario}, operation {k}: status {status}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        save_next(Path(directory))  # what the first save imports, no child has to
    for argument in sys.argv[1:]:
        name, _, base = argument.partition("=")
        kill_everywhere(name, Path(base))
