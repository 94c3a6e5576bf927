"""Which services draw a run's curves, and what keeps them from ending it.

The names of `trainer.logger` go in, running loggers come out. What a service refuses is told once, and its curve is completed
from the lines of metrics.jsonl when it works again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Any

from agentlightning.errors import ConfigError
from agentlightning.verl.metrics import STEP
from agentlightning.verl.tracking_mlflow import MlflowLogger
from agentlightning.verl.tracking_samples import GenerationSample
from agentlightning.verl.tracking_secrets import without_secrets
from agentlightning.verl.tracking_service import Logger, LoggerError, RunInfo
from agentlightning.verl.tracking_tensorboard import TensorboardLogger
from agentlightning.verl.tracking_wandb import WandbLogger

_SECONDS_BETWEEN_TRIES = 30.0  # of a logger that fails: each try may take as long as its timeouts
_LONGEST_REASON = 200  # characters

LOGGERS: Mapping[str, Callable[[RunInfo, str | None], Logger]] = {
    "tensorboard": TensorboardLogger,
    "mlflow": MlflowLogger,
    "wandb": WandbLogger,
}


def check_installed(names: Sequence[str]) -> None:
    """Raise `ConfigError` if a logger of `trainer.logger` is asked for whose library is not there. Imports none of them."""
    for name in names:
        spec = importlib.util.find_spec(name) if name in LOGGERS else None
        if name in LOGGERS and (spec is None or spec.origin is None):  # without an origin: a directory that has the same name
            raise ConfigError(
                f"trainer.logger: given {name}, which is not installed; pip install -e '.[{name}]', or mend it with "
                "trainer.logger=[console]"
            )


class SteadyLogger:
    """A logger whose failures do not reach the run: told once, and what it missed is logged when it works again."""

    def __init__(self, name: str, logger: Logger, tell: Callable[[str], None]) -> None:
        self.name, self.logger, self._tell = name, logger, tell
        self._failing_until: float | None = None  # monotonic; None while all is well

    def log_missing(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log those of `lines` (of metrics.jsonl, in order) that come after what the service has."""
        if self._failing_until is not None and time.monotonic() < self._failing_until:
            return
        first = len(lines)
        while first and lines[first - 1][STEP] > self.logger.last_step:
            first -= 1
        with self._harmless("its curve is completed when it works again"):
            for line in lines[first:]:
                self.logger.log(line[STEP], line)

    def table(self, step: int, rows: Sequence[GenerationSample]) -> None:
        """Show validation samples of a step that the service does not have yet."""
        if step > self.logger.last_step and self._failing_until is None:
            with self._harmless(f"the samples of step {step} are not shown"):
                self.logger.table(step, rows)

    def finish(self, lines: Sequence[Mapping[str, Any]], exit_code: int) -> None:
        """A last try to log what is missing, and the logger's own end."""
        if self._failing_until is not None:
            self._failing_until = 0.0
        self.log_missing(lines)
        with self._harmless("its last numbers may be missing"):
            self.logger.finish(exit_code)

    @contextlib.contextmanager
    def _harmless(self, loss: str) -> Iterator[None]:
        try:
            yield
        except (LoggerError, OSError) as error:
            if self._failing_until is None:
                said = str(without_secrets(str(error))).strip() or type(error).__name__
                self._tell(f"{self.name} could not be written ({shorten(said.splitlines()[0], _LONGEST_REASON)}); {loss}")
            self._failing_until = time.monotonic() + _SECONDS_BETWEEN_TRIES
        else:
            self._failing_until = None


def start_loggers(
    names: Sequence[str], run: RunInfo, run_ids: Mapping[str, str | None], tell: Callable[[str], None]
) -> dict[str, SteadyLogger]:
    """The loggers of `trainer.logger` that are services. `ConfigError` if one does not start; none is left running then."""
    check_installed(names)
    started: dict[str, SteadyLogger] = {}
    try:
        for name, make in LOGGERS.items():
            if name in names:
                started[name] = SteadyLogger(name, make(run, run_ids.get(name)), tell)
    except ConfigError:
        for logger in started.values():
            logger.finish([], exit_code=1)
        raise
    return started
