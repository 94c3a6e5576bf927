"""The real controller over fake workers: a number of workers enters, its seconds and bytes a step leave.

The trainer, worker group, batching, advantages, metrics, tracking and checkpoint manager are those of a run; only the workers
are made up. They answer at once, with answers of lengths that hang on the prompt's uid. What goes to them and comes back is
serialised as Ray does (its cloudpickle, protocol 5, arrays copied out of band); the controller's share of that is counted as
controller time, the workers' is not. `simulate_scale.py` is the command.

Left out: Ray's own cost of a call (bench_ray_calls.py measures it), the network, and what the workers do.
"""

from __future__ import annotations

import gc
import io
import math
import statistics
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import cloudpickle
from safetensors.numpy import save as to_safetensors

from agentlightning.checkpoint.lease import LEASE_FILE
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.manifest import FileEntry, write_file
from agentlightning.checkpoint.preemption import Preemption
from agentlightning.checkpoint.writer import Outcome
from agentlightning.errors import WorkerError
from agentlightning.types import Batch, Completion, JournalSpec, Prompt, SamplingParams
from agentlightning.verl.config import Config, load_config
from agentlightning.verl.console import PlainConsole
from agentlightning.verl.data import PromptDataset
from agentlightning.verl.rewards import Rewards
from agentlightning.verl.tracking import Tracking
from agentlightning.verl.trainer import AgentLightningTrainer
from agentlightning.workers.group import WorkerGroup
from agentlightning.workers.messages import ActorUpdate, LogProbs, MiniBatch, WorkerState

WORDS = "of an answer " * 8192
UPDATE_METRICS = ("pg_loss", "pg_clipfrac", "ppo_kl", "pg_clipfrac_lower", "entropy_sum", "entropy_tokens", "grad_norm", "lr")


@dataclass(frozen=True, slots=True)
class Load:
    """What one worker has to do in a step, and what it holds."""

    prompts_per_worker: int = 1
    samples: int = 8  # of each prompt
    prompt_tokens: int = 256
    response_tokens: int = 1024  # the limit
    mean_response: int = 512  # before the limit cuts: lengths are exponential
    mini_batches: int = 4  # optimizer steps
    state_bytes: int = 1 << 26  # a checkpoint
    overrides: tuple[str, ...] = ()  # further key=value


@dataclass(slots=True)
class Ledger:
    """What passed between controller and workers so far, and the seconds that the workers took for themselves."""

    sent: int = 0
    received: int = 0
    worker_s: float = 0.0
    worker_cpu_s: float = 0.0

    def clock(self) -> float:
        """Seconds, of which those of the workers are none."""
        return time.perf_counter() - self.worker_s

    def cpu_clock(self) -> float:
        """CPU seconds of this thread, without the workers'."""
        return time.thread_time() - self.worker_cpu_s


class OneWorker:
    """Answers as `workers.worker.Worker` would, with numbers that mean nothing."""

    def __init__(self, rank: int, load: Load, version: int) -> None:
        self.rank, self.load, self.version = rank, load, version
        self.share, self.tokens_T, self.logps_T = (0, 0), *_made_up(load.response_tokens)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seed: int,
        step: int,
        version: int,
        journal: JournalSpec | None,
    ) -> list[Completion]:
        """Completions of exponential lengths, with a text of about four letters a token."""
        assert version == self.version
        return [self._completion(prompt.uid, sample, step) for prompt in prompts for sample in range(params.n)]

    def _completion(self, uid: str, sample: int, step: int) -> Completion:
        draw = (zlib.crc32(f"{uid}/{sample}/{step}".encode()) + 1) / 2**32
        length = min(self.load.response_tokens, 1 + int(-self.load.mean_response * np.log(draw)))
        return Completion(
            uid=uid,
            sample_index=sample,
            token_ids=self.tokens_T[:length],
            mask=np.ones(length, dtype=np.bool_),
            logprobs=self.logps_T[:length],
            turns=({"role": "assistant", "content": WORDS[: 4 * length]},),
            stop_reason="length" if length == self.load.response_tokens else "stop",
            adapter_version=self.version,
        )

    def _logp_BT(self, batch: Batch) -> np.ndarray:
        return np.tile(self.logps_T[: batch.response_BT.shape[1]], (len(batch), 1))

    def compute_log_prob(self, batch: Batch, with_squares: bool = False) -> LogProbs:
        """The rollout's own, once more."""
        return LogProbs(self._logp_BT(batch), 1.0, int(batch.mask_BT.sum()))

    compute_ref_log_prob = compute_log_prob

    def compute_values(self, batch: Batch) -> np.ndarray:
        """Zeros."""
        return np.zeros(batch.response_BT.shape, dtype=np.float32)

    def update_actor(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> ActorUpdate:
        """As many metrics as a real update gives."""
        return ActorUpdate([dict.fromkeys(UPDATE_METRICS, 1.0) for _ in mini_batches], self._logp_BT(batch))

    def update_critic(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> list[dict[str, float]]:
        """See `update_actor`."""
        return [dict.fromkeys(UPDATE_METRICS, 1.0) for _ in mini_batches]

    def each_shard(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One answer a shard."""
        return [getattr(self, method)(*given) for given in arguments]

    def update_weights(self, version: int) -> tuple[float, float]:
        """The next completions are of this version. No memory."""
        self.version = version
        return 0.0, 0.0

    def load_state(self, state: WorkerState) -> None:
        """Its version is all that counts here."""
        self.version = state.version

    def sees(self, path: str, text: str) -> bool:
        """All share one file system."""
        return True

    def adapter_configs(self) -> dict[str, dict[str, Any]]:
        """As small as it may be."""
        return {"actor": {"peft_type": "LORA", "r": 8}}

    def snapshot(self, buffer: int, writer: int, writers: int) -> int:
        """Copies nothing: the copy is the worker's time."""
        self.share = writer, writers
        return self.load.state_bytes // writers

    def state_bytes(self) -> int:
        """Of a whole checkpoint."""
        return self.load.state_bytes

    def write_snapshot(self, buffer: int, staging: str, algorithm: str) -> dict[str, FileEntry]:
        """Really written and fsynced, for the controller reads it again; the first worker writes the adapter too."""
        writer, writers = self.share
        data = {f"actor/optimizer-{writer:05}-of-{writers:05}.safetensors": f"exp_avg.{writer}"}
        if writer == 0:
            data["actor/adapter_model.safetensors"] = "lora_A"
        array = np.zeros(self.load.state_bytes // writers // 4, dtype=np.float32)
        (Path(staging) / "actor").mkdir(exist_ok=True)
        return {
            relative: write_file(Path(staging) / relative, [to_safetensors({name: array})], algorithm)
            for relative, name in data.items()
        }


class FakeWorkers:
    """A `Backend` of workers that cost nothing; one of them may die in a call."""

    def __init__(
        self, world_size: int, load: Load, ledger: Ledger, may_write: threading.Event, meanwhile: Callable[[], None]
    ) -> None:
        """`meanwhile` is run while the workers sample."""
        self.world_size, self.ledger, self.may_write, self.meanwhile = world_size, ledger, may_write, meanwhile
        self.workers = [OneWorker(rank, load, 0) for rank in range(world_size)]
        self.dies_at: tuple[str, int] | None = None  # method, and the version that the workers have

    def call(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """See `Backend`. What all are given alike is one object of the store."""
        alike = all(given is arguments[0] for given in arguments)
        asked = [worker for worker, given in zip(self.workers, arguments, strict=True) if given is not None]
        sent = [_pack(given) for given in (arguments[:1] if alike else arguments) if given is not None]
        self.ledger.sent += sum(map(_size, sent))
        began, cpu_began = time.perf_counter(), time.thread_time()
        if method == "generate":
            self.meanwhile()
        if (method, self.workers[0].version) == self.dies_at:
            raise WorkerError("a worker died: it was preempted")
        given = [_unpack(packed) for packed in sent] * (len(asked) if alike else 1)
        answers = {worker.rank: _pack(getattr(worker, method)(*given)) for worker, given in zip(asked, given, strict=True)}
        self.ledger.worker_s += time.perf_counter() - began
        self.ledger.worker_cpu_s += time.thread_time() - cpu_began
        self.ledger.received += sum(map(_size, answers.values()))
        return [_unpack(answers[rank]) if rank in answers else None for rank in range(self.world_size)]

    def call_first(self, method: str, *arguments: Any) -> Any:
        """See `Backend`."""
        return getattr(self.workers[0], method)(*arguments)

    def call_beside(self, method: str, ranks: Sequence[int], *arguments: Any) -> list[Any]:
        """See `Backend`."""
        self.may_write.wait()
        return [getattr(self.workers[rank], method)(*arguments) for rank in ranks]

    def close(self) -> None:
        """Nothing to end."""


Packed = tuple[bytes, list[bytes]]


def _pack(value: Any) -> Packed:
    """As Ray puts it into its object store: arrays are copied, once."""
    buffers: list[Any] = []
    data = cloudpickle.dumps(  # pyright: ignore[reportPrivateImportUsage]
        value, protocol=5, buffer_callback=buffers.append
    )
    return data, [bytes(buffer.raw()) for buffer in buffers]


def _unpack(packed: Packed) -> Any:
    """As Ray takes it out: arrays are views of the store."""
    data, buffers = packed
    return cloudpickle.loads(data, buffers=buffers)


def _size(packed: Packed) -> int:
    return len(packed[0]) + sum(map(len, packed[1]))


def _made_up(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and log-probabilities, [T]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 32000, length, dtype=np.int32), -rng.random(length, dtype=np.float32)


class Stopwatch(PlainConsole):
    """The plain console, which hears when a phase begins and a step ends: so it can say what each took."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(io.StringIO())
        self.ledger = ledger
        self.phases_s: list[dict[str, float]] = []  # of CPU, one dict a step
        self.wall_s: list[float] = []
        self.sent: list[int] = []
        self.received: list[int] = []
        self.warnings: list[str] = []
        self._phases: dict[str, float] = defaultdict(float)
        self._name = "between"
        self._begin_step()

    def phase(self, name: str) -> None:
        """What came before belongs to the phase before."""
        now = self.ledger.cpu_clock()
        self._phases[self._name] += now - self._since
        self._name, self._since = name, now

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """The last event of a step."""
        super().step_done(step, metrics)
        self.phase("between")
        self.phases_s.append(dict(self._phases))
        self.wall_s.append(self.ledger.clock() - self._wall_since)
        self.sent.append(self.ledger.sent - self._sent)
        self.received.append(self.ledger.received - self._received)
        self._phases.clear()
        self._begin_step()

    def warning(self, text: str) -> None:
        """Nothing here should ask for one."""
        self.warnings.append(text)

    def _begin_step(self) -> None:
        self._since, self._wall_since = self.ledger.cpu_clock(), self.ledger.clock()
        self._sent, self._received = self.ledger.sent, self.ledger.received


class EveryPicture(Tracking):
    """The real one, which draws reward.png after each step, as it does where a step takes a minute: beside the next one."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """See `Tracking`."""
        self._last_picture = -math.inf
        super().log(step, metrics)


class PatientManager(CheckpointManager):
    """The real one; but what the workers write, they write while the controller waits for them.

    They would otherwise write it with this process's time, beside the step that is measured.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, save_freq=1, keep=2)
        self.may_write = threading.Event()

    def settle(self) -> None:
        """Wait for what is being written, and hear nothing of it."""
        self.may_write.set()
        self._writer.wait()
        self.may_write.clear()

    def drain(self) -> list[Outcome]:
        """See `CheckpointManager`."""
        self.may_write.set()
        return super().drain()


@dataclass(frozen=True, slots=True)
class ControllerReport:
    """Of one number of workers; medians over the steps."""

    workers: int
    samples: int
    tokens: int  # prompts and responses, of a step
    controller_s: float  # of CPU, a step, on one thread
    wall_s: float  # more than that where the machine does other things too
    phases_s: Mapping[str, float]  # of CPU
    sent_bytes: int  # a step
    received_bytes: int
    checkpoint_bytes: int  # a checkpoint
    checkpoint_files: int
    commit_s: float  # behind the steps
    restart_s: float  # from the death of a worker to the first call of the new ones
    warnings: Sequence[str]


def coin(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None) -> float:
    """A reward: nearly every group has both."""
    return float(zlib.crc32(f"{ground_truth}{len(solution_str)}".encode()) % 2)


def measure_controller(workers: int, load: Load, steps: int) -> ControllerReport:
    """`steps` steps after a first one that does not count; then one in which a worker dies, and which is done again."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        config, ledger = _config(workers, load, run_dir), Ledger()
        manager = PatientManager(run_dir)
        with manager, Stopwatch(ledger) as console, Rewards.from_config(config) as rewards:
            manager.history.begin(1, None)
            backend = FakeWorkers(workers, load, ledger, manager.may_write, manager.settle)
            backend.dies_at = "update_actor", steps + 1
            trainer = _trainer(config, _group(backend, run_dir), manager, console, rewards, steps + 2)
            gc.freeze()  # the fake workers are nothing that the controller's collector would have to look through
            restart_s = _fit_through_one_death(trainer, manager, workers, load, ledger)
            saved, measured = manager.last, slice(1, steps + 1)
            assert saved is not None
            assert trainer.state.global_step == steps + 2
            phases_s = console.phases_s[measured]
            return ControllerReport(
                workers=workers,
                samples=workers * load.prompts_per_worker * load.samples,
                tokens=trainer.state.tokens_seen // (steps + 2),
                controller_s=statistics.median(sum(phases.values()) for phases in phases_s),
                wall_s=statistics.median(console.wall_s[measured]),
                phases_s={name: statistics.median(phases[name] for phases in phases_s) for name in phases_s[0]},
                sent_bytes=int(statistics.mean(console.sent[measured])),
                received_bytes=int(statistics.mean(console.received[measured])),
                checkpoint_bytes=saved.bytes,
                checkpoint_files=sum(path.is_file() for path in saved.path.rglob("*")),
                commit_s=saved.seconds,
                restart_s=restart_s,
                warnings=console.warnings,
            )


def _fit_through_one_death(
    trainer: AgentLightningTrainer, manager: PatientManager, workers: int, load: Load, ledger: Ledger
) -> float:
    """Train to the end, and once start the workers again as `verl/launch.py` does.

    Returns the controller's seconds from the death to the first call of the new workers.
    """
    try:
        trainer.fit()
    except WorkerError:
        died_at = ledger.clock()
    else:
        raise AssertionError("no worker died")
    went_on_at: list[float] = []
    trainer.settle()
    manager.history.worker_died()
    loaded = manager.load_again()
    backend = FakeWorkers(workers, load, ledger, manager.may_write, lambda: went_on_at.append(ledger.clock()))
    group = _group(backend, manager.root)
    manager.go_on()
    trainer.restart(group, loaded)
    trainer.fit()
    return went_on_at[0] - died_at


def _config(workers: int, load: Load, run_dir: Path) -> Config:
    prompts = workers * load.prompts_per_worker
    return load_config(
        [
            f"data.train_batch_size={prompts}",
            f"data.max_prompt_length={load.prompt_tokens}",
            f"data.max_response_length={load.response_tokens}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={-(-prompts // load.mini_batches)}",
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={4 * (load.prompt_tokens + load.response_tokens)}",
            f"actor_rollout_ref.rollout.n={load.samples}",
            "actor_rollout_ref.rollout.multi_turn.enable=false",
            f"custom_reward_function.path={Path(__file__).resolve()}",
            "custom_reward_function.name=coin",
            f"trainer.n_gpus_per_node={workers}",
            f"trainer.default_local_dir={run_dir}",
            *load.overrides,
        ]
    )


def _group(backend: FakeWorkers, run_dir: Path) -> WorkerGroup:
    group = WorkerGroup(backend)
    group.choose_writers(run_dir / LEASE_FILE)
    return group


def _trainer(
    config: Config, group: WorkerGroup, manager: CheckpointManager, console: Stopwatch, rewards: Rewards, total_steps: int
) -> AgentLightningTrainer:
    batch = config.data.train_batch_size
    token_ids = tuple(range(config.data.max_prompt_length))
    message = {"role": "user", "content": WORDS[: 4 * len(token_ids)]}
    prompts = [Prompt(f"train:{row}", (message,), token_ids, "made up", str(row)) for row in range(2 * batch)]
    return AgentLightningTrainer(
        config,
        group=group,
        train_data=PromptDataset(prompts, batch, shuffle=True, seed=0),
        val_prompts=[],
        rewards=rewards,
        checkpoints=manager,
        loaded=None,
        tracking=EveryPicture(manager.root),
        console=console,
        total_steps=total_steps,
        fingerprint={"breaking": {}, "harmless": {}},
        facts=[],
        stop=Preemption(),
    )
