"""Runs of the real program, in processes of their own, that tests start, watch, stop and compare.

Tests wait for events (a line in metrics.jsonl, a place that the run's own reward function or tool has come to) and never for
an amount of time; what the time-outs below say is when to give up on a busy machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import agentlightning
from agentlightning.checkpoint.store import find_valid

HERE = Path(__file__).parent
PATIENCE_S = 200.0
SMALL = (
    "trainer.total_training_steps=5",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.max_actor_ckpt_to_keep=null",
    "trainer.log_rollout_freq=0",
    f"custom_reward_function.path={HERE / 'e2e_user_code.py'}",
    "custom_reward_function.name=compute_score",
    "actor_rollout_ref.rollout.multi_turn.tool=e2e_user_code:calculate",
)
IN_PROCESS = "trainer.backend=inprocess"
# What depends on the machine and not on the run.
_MEASURED = ("timing_", "perf/", "training/attempt", "checkpoint/")


@dataclass
class Run:
    """One run directory, `cwd/run`, and the command that works on it."""

    cwd: Path
    overrides: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    family: list[tuple[psutil.Process, str]] = field(default_factory=list)  # those `look_at_family` saw, with their names

    @property
    def directory(self) -> Path:
        return self.cwd / "run"

    @property
    def plan(self) -> Path:
        return self.cwd / "plan.json"

    # -- starting and ending ------------------------------------------------------------------------------------------

    def start(self, *more: str) -> Run:
        """The command, in a process group of its own as a shell would start it. Its output goes to files."""
        paths = [str(Path(agentlightning.__file__).parents[1]), str(HERE)]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))},
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "AGL_E2E_PLAN": str(self.plan),
            **self.environment,
        }
        command = self.command(sys.executable, "run", *more)
        with (self.cwd / "stdout").open("wb") as out, (self.cwd / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                command, cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        return self

    def command(self, python: str, directory: str, *more: str) -> list[str]:
        """The words of the command, for a run in `directory`."""
        return [python, "-m", "agentlightning.verl", *SMALL, f"trainer.default_local_dir={directory}", *self.overrides, *more]

    def wait(self) -> int:
        """The exit code; minus the signal's number if one ended the process."""
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def ends(self, exit_code: int = 0) -> Run:
        assert self.wait() == exit_code, self.output
        return self

    def again(self, *more: str) -> Run:
        """The same command once more, with nothing in its way now, to its end."""
        self.plan.unlink(missing_ok=True)
        self.plan.with_suffix(".reached").unlink(missing_ok=True)
        return self.start(*more).ends()

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """What a terminal's Ctrl-C does: the signal goes to every process of the group."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def signal_everyone(self, number: int) -> None:
        """What a batch system does: the signal goes to every process of the job, Ray's own and the workers too."""
        self.look_at_family()
        for member, _ in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
        self.kill(number)

    def clean_up(self) -> None:
        """Whatever a failed test left running."""
        if self.process is not None and self.process.poll() is None:
            self.look_at_family()
            self.process.kill()
            self.process.wait()
        for member, _ in self.family:
            if member.is_running():
                member.kill()

    # -- watching -----------------------------------------------------------------------------------------------------

    def wait_until(self, event: Callable[[], Any], what: str) -> None:
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while not event():
            assert self.process.poll() is None, f"ended with {self.process.poll()} before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:.0f} s:\n{self.output}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> Run:
        self.wait_until(lambda: step in self.steps, f"step {step}")
        return self

    def hold_in(self, where: str, step: int, durable: bool = True) -> int:
        """Start the run and wait until it stands in the `where` (reward or tool) of `step`; the id of the process that does.

        With `durable` also until the step before, which is saved behind it, is.
        """
        self.stop_at(where, step, "hold")
        self.start()
        reached = self.plan.with_suffix(".reached")
        self.wait_until(reached.exists, f"{where} of step {step}")
        if durable:
            self.wait_until((self.directory / f"global_step_{step - 1}.pt").exists, f"the checkpoint of step {step - 1}")
        self.look_at_family()
        return int(reached.read_text())

    def stop_at(self, where: str, step: int, do: str, inside: tuple[str, ...] = (), metrics: str = "run/metrics.jsonl") -> Run:
        """See e2e_user_code.py."""
        self.plan.with_suffix(".reached").unlink(missing_ok=True)
        self.plan.write_text(
            json.dumps(
                {
                    "where": where,
                    "metrics": str(self.cwd / metrics),
                    "after": step - 1,
                    "do": do,
                    "inside": inside,
                }
            )
        )
        return self

    def kill_inside(self, step: int, *functions: str) -> None:
        """Start the run; it is killed when, in `step`, the controller has entered these functions one after the other."""
        self.stop_at("reward", step, "kill", functions).start().ends(-signal.SIGKILL)

    def look_at_family(self) -> None:
        """Remember all processes that descend from the run."""
        assert self.process is not None
        self.family = [(member, member.name()) for member in psutil.Process(self.process.pid).children(recursive=True)]

    def leaves_nobody_behind(self, *but: str) -> None:
        """None of the family lives half a minute later; `but` names those that may take their time."""
        assert self.family
        _, alive = psutil.wait_procs([member for member, name in self.family if name not in but], timeout=30)
        assert alive == []

    # -- what it left -------------------------------------------------------------------------------------------------

    @property
    def stdout(self) -> str:
        return (self.cwd / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.cwd / "stderr").read_text()

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it is now; a line that is just being written is not there yet."""
        path = self.directory / "metrics.jsonl"
        texts = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(text) for text in texts]

    @property
    def steps(self) -> list[int]:
        return [line["training/global_step"] for line in self.lines]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The lines without what the machine's speed and the number of starts decide."""
        return [{name: value for name, value in line.items() if not name.startswith(_MEASURED)} for line in self.lines]

    def files(self, step: int) -> dict[str, bytes]:
        """Every tensor and configuration of a checkpoint, byte for byte."""
        directory = self.directory / f"global_step_{step}"
        own = ("manifest.json", "trainer_state.json")  # they hold times
        paths = [path for path in directory.rglob("*") if path.is_file() and path.name not in own]
        return {str(path.relative_to(directory)): path.read_bytes() for path in paths}

    def trainer_state(self, step: int) -> dict[str, Any]:
        """What the controller saved, its times left out."""
        state = json.loads((self.directory / f"global_step_{step}" / "trainer_state.json").read_text())
        del state["metrics"]
        return state

    def newest_valid(self) -> int:
        loaded = find_valid(self.directory)
        assert loaded is not None
        assert loaded.skipped == ()
        return loaded.step

    def equals(self, other: Run, last: int = 5) -> None:
        """The same run: every step once, the same numbers in each, the same adapter and optimizer at the end, bit for bit."""
        assert self.steps == list(range(1, last + 1))
        assert self.numbers == other.numbers
        assert self.newest_valid() == other.newest_valid() == last
        mine, theirs = self.files(last), other.files(last)
        assert mine.keys() == theirs.keys()
        assert "actor/adapter_model.safetensors" in mine
        assert [name for name in mine if mine[name] != theirs[name]] == []
        assert self.trainer_state(last) == other.trainer_state(last)

    def snapshot(self) -> dict[str, tuple[int, bytes]]:
        """Time and content of every file of the run; the lock's text names its last holder."""
        return {
            str(path.relative_to(self.directory)): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and path.name != ".lease"
        }


NewRun = Callable[..., Run]


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[NewRun]:
    """`new_run(*overrides)`: a run in a directory of its own."""
    runs: list[Run] = []

    def make(*overrides: str, **environment: str) -> Run:
        cwd = tmp_path / f"cwd{len(runs)}"
        cwd.mkdir()
        runs.append(Run(cwd, overrides, environment))
        return runs[-1]

    yield make
    for run in runs:
        run.clean_up()


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Runs that nobody stops: GRPO in-process, and on Ray with one and two workers, these two at the same time."""
    overrides = {"inprocess": (IN_PROCESS,), "ray": (), "two": ("trainer.n_gpus_per_node=2",)}
    runs = {name: Run(tmp_path_factory.mktemp(name), given) for name, given in overrides.items()}
    runs["ray"].start()
    runs["two"].start()
    for name in ("ray", "two"):
        runs[name].wait_until(lambda run=runs[name]: run.lines, "its first step")
        runs[name].look_at_family()
    for name in ("ray", "two"):
        runs[name].ends()
    runs["inprocess"].start().ends()
    yield runs
    for run in runs.values():
        run.clean_up()
