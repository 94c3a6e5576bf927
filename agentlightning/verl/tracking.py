"""Where a run's numbers and samples go: metrics.jsonl and reward.png always; W&B, TensorBoard and MLflow if asked.

One flat dict of metrics a step goes in; metrics.jsonl holds one line a step, each step exactly once however often the run was
killed. It exists apart from the trainer because going on in the same file is delicate: a step whose checkpoint was not
committed is done again, and a checkpointed step may lack its line.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agentlightning.checkpoint.files import replace_file
from agentlightning.errors import DataError
from agentlightning.verl.loggers import start_loggers
from agentlightning.verl.metrics import ATTEMPT, STEP
from agentlightning.verl.plot import draw_reward_curve
from agentlightning.verl.tracking_mlflow import MLFLOW_ID_FILE
from agentlightning.verl.tracking_samples import GenerationSample, write_rollouts
from agentlightning.verl.tracking_secrets import without_secrets
from agentlightning.verl.tracking_service import RunInfo
from agentlightning.verl.tracking_tensorboard import TENSORBOARD_DIR
from agentlightning.verl.tracking_wandb import WANDB_ID_FILE

METRICS_FILE = "metrics.jsonl"
REWARD_PICTURE = "reward.png"
RUN_FILES = (METRICS_FILE, REWARD_PICTURE, WANDB_ID_FILE, MLFLOW_ID_FILE, TENSORBOARD_DIR)  # what a run that starts over leaves
_SECONDS_BETWEEN_PICTURES = 20.0  # a picture costs about 0.1 s, beside the next step


class MetricsFile:
    """metrics.jsonl: one JSON object a step, in the order of the steps. `lines` is what the file holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = _read_lines(path)
        self._size = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0  # bytes that are known to be whole lines
        self._unwritten = b""

    @property
    def last_step(self) -> int:
        """The newest step with a line; -1 where there is none (step 0 is the validation before training)."""
        return self.lines[-1][STEP] if self.lines else -1

    def truncate_after(self, step: int) -> int:
        """Keep the lines up to `step`, in one atomic exchange of the file. Returns how many later ones were dropped.

        Must be called before the first `append`: it also removes a last line that a kill tore.
        """
        kept = [line for line in self.lines if line[STEP] <= step]
        dropped = len(self.lines) - len(kept)
        self.lines = kept
        data = b"".join(_encoded(line) for line in kept)
        if self.path.exists() or kept:
            replace_file(self.path, data)
        self._size, self._unwritten = len(data), b""
        return dropped

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add the line of `step`, which must come after every step in the file; it is on the disk when this returns.

        OSError if the disk refuses it: the line is kept, and written with the next one or by `flush`.
        """
        if step <= self.last_step:
            raise ValueError(f"{self.path} already has a line of step {self.last_step}; step {step} cannot follow it")
        line = {STEP: step, **{name: _plain(value) for name, value in metrics.items()}}
        self.lines.append(line)
        self._unwritten += _encoded(line)
        self.flush()

    def flush(self) -> None:
        """Write what a full disk refused before. OSError if it still does."""
        if not self._unwritten:
            return
        with self.path.open("ab") as file:
            data = self._unwritten
            if file.tell() > self._size:
                file.truncate(self._size)  # what a write that failed half-way left
            elif file.tell() < self._size:  # somebody removed the file
                file.truncate(0)
                self._size, data = 0, b"".join(_encoded(line) for line in self.lines)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size, self._unwritten = self._size + len(data), b""


class Tracking:
    """The loggers of one run.

    Start: `tracking = Tracking(run_dir, ...)`, then `resume(step, metrics)` with the step of the checkpoint (0 for a new run).
    Each step: `log_val_generations` and `log_rollouts` if there is something, then `log(step, metrics)`. End: `finish()`.
    `attempt` counts the starts whose lines have been in metrics.jsonl. A disk or a service that fails ends nothing: `trouble`
    says it once.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        logger: Sequence[Literal["console", "wandb", "tensorboard", "mlflow"]] = (),
        project_name: str = "agentlightning",
        experiment_name: str = "",
        config: Mapping[str, Any] | None = None,
        wandb_run_id: str | None = None,
        mlflow_run_id: str | None = None,
        rollout_data_dir: Path | None = None,
    ) -> None:
        """`config` is shown by the loggers without its secrets. `ConfigError` if one of them does not start.

        `wandb_run_id`, `mlflow_run_id`: those a checkpoint holds; without them the run directory's own, or new ones.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.title = f"{project_name} / {experiment_name}"
        self.rollout_data_dir = rollout_data_dir
        self.file = MetricsFile(run_dir / METRICS_FILE)
        self.attempt = 1 + max((line.get(ATTEMPT, 0) for line in self.file.lines), default=0)
        self.trouble: str | None = None  # what went wrong since the line before the last one
        self._troubles: list[str] = []  # not yet told
        self._last_picture = time.monotonic()
        self._artist = ThreadPoolExecutor(1, "reward.png")
        self._drawing: Future[None] | None = None
        run = RunInfo(run_dir, project_name, experiment_name, without_secrets(config or {}))
        run_ids = {"wandb": wandb_run_id, "mlflow": mlflow_run_id}
        self._loggers = start_loggers(logger, run, run_ids, self._troubles.append)

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """Every line of metrics.jsonl so far."""
        return self.file.lines

    @property
    def picture(self) -> Path:
        """Where reward.png lies."""
        return self.run_dir / REWARD_PICTURE

    @property
    def wandb_run_id(self) -> str | None:
        """The run's id at W&B, for checkpoints; None without W&B."""
        return self._loggers["wandb"].logger.run_id if "wandb" in self._loggers else None

    @property
    def mlflow_run_id(self) -> str | None:
        """The run's id at MLflow, for checkpoints; None without MLflow."""
        return self._loggers["mlflow"].logger.run_id if "mlflow" in self._loggers else None

    @property
    def wandb_url(self) -> str | None:
        """The run's page; None without W&B or offline."""
        return self._loggers["wandb"].logger.url if "wandb" in self._loggers else None

    def resume(self, step: int, metrics: Mapping[str, Any] | None = None) -> int:
        """Go on after the checkpoint of `step`, whose own line was `metrics`. Returns how many lines will be done again.

        The line of `step` is written if a kill came between the commit of its checkpoint and its line. With `step=0`, where no
        checkpoint is, no line stays.
        """
        dropped = self.file.truncate_after(step if step > 0 else -1)
        for logger in self._loggers.values():
            logger.logger.resume(self.file.last_step)
        if metrics is not None and self.file.last_step < step:
            self._write(step, metrics)
        self._log_missing()
        return dropped

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One finished step. metrics.jsonl has it, with `training/attempt`, on the disk when this returns."""
        if self._write(step, metrics) and time.monotonic() - self._last_picture > _SECONDS_BETWEEN_PICTURES:
            self._hear_of_picture()
            self._last_picture = time.monotonic()
            self._drawing = self._artist.submit(draw_reward_curve, list(self.history), self.picture, self.title)
        self._log_missing()
        self._tell()

    def log_val_generations(self, step: int, rows: Sequence[GenerationSample]) -> None:
        """Validation samples of `step`, shown as a table by the loggers; to be called before `log(step, ...)`."""
        for logger in self._loggers.values():
            logger.table(step, rows)

    def log_rollouts(self, step: int, samples: Sequence[GenerationSample]) -> None:
        """All samples of a training step, as `<rollout_data_dir>/<step>.jsonl`; nothing without that directory."""
        if self.rollout_data_dir is None:
            return
        try:
            write_rollouts(self.rollout_data_dir, step, samples)
        except OSError as error:
            self._troubles.append(
                f"the samples of step {step} could not be written to {self.rollout_data_dir} ({error.strerror or error})"
            )

    def draw(self) -> None:
        """Bring reward.png up to date."""
        self._hear_of_picture()
        draw_reward_curve(self.history, self.picture, self.title)

    def _hear_of_picture(self) -> None:
        """Wait for the one that is being drawn beside the step."""
        drawing, self._drawing = self._drawing, None
        try:
            if drawing is not None:
                drawing.result()
        except OSError as error:
            self._troubles.append(f"{self.picture} could not be drawn ({error.strerror or error})")

    def finish(self, exit_code: int = 0) -> None:
        """The lines that are still to be written, the last picture, and the loggers' own ends. OSError if the disk is full."""
        try:
            self.file.flush()
            self.draw()
        finally:
            self._artist.shutdown()
            for logger in self._loggers.values():
                logger.finish(self.history, exit_code)
            self._tell()

    def _write(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether the line of `step` is on the disk."""
        try:
            self.file.append(step, {ATTEMPT: self.attempt, **metrics})
        except OSError as error:  # no reason to end a run: the line is written when there is room again
            self._troubles.append(
                f"{self.file.path} could not be written ({error.strerror or error}); the line of step {step} is kept"
            )
            return False
        return True

    def _log_missing(self) -> None:
        for logger in self._loggers.values():
            logger.log_missing(self.history)

    def _tell(self) -> None:
        self.trouble = "\n".join(self._troubles) or None
        self._troubles.clear()


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> int | float | None:
    """numpy's scalars as Python's; NaN and inf, which JSON does not know and other readers stop at, as null."""
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if value is not None and math.isfinite(value) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last one (a kill while it was written) is passed over."""
    if not path.is_file():
        return []
    texts = path.read_bytes().split(b"\n")
    whole = texts[:-1]  # a whole line ends in a newline, and behind the last one there is nothing
    lines = [_parsed(path, number, text) for number, text in enumerate(whole, start=1) if text.strip()]
    for before, after in itertools.pairwise(lines):
        if after[STEP] <= before[STEP]:
            raise _not_ours(path, f"step {after[STEP]} follows step {before[STEP]}")
    return lines


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise _not_ours(path, f"line {number} is not JSON ({error})") from error
    if not isinstance(line, dict) or not isinstance(line.get(STEP), int):
        raise _not_ours(path, f"line {number} has no {STEP}")
    return line


def _not_ours(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}; expected one JSON object a step, in order; mend the file, or start in another directory with "
        "trainer.default_local_dir=<directory>"
    )
