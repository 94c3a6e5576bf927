"""What tracking.py asks of a service that draws a run's curves, and the little that the services share.

It exists so that W&B, TensorBoard and MLflow stand behind the same few calls, and their libraries' errors behind one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentlightning.checkpoint.files import replace_file
from agentlightning.errors import AgentLightningError
from agentlightning.verl.tracking_samples import GenerationSample

TABLE = "val/generations"  # verl's name for the table of validation samples

Metrics = Mapping[str, int | float | None]  # None: NaN or infinite


class LoggerError(AgentLightningError):
    """A service refused what it was given, or does not answer."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a service shows of a run beside its numbers."""

    run_dir: Path
    project: str
    name: str
    config: Mapping[str, Any]  # without secrets


class Logger(Protocol):
    """One service. `log`, `table` and `finish` raise `LoggerError` or OSError where it fails; nothing is half logged then."""

    last_step: int  # the newest step that the service has, -1 for none

    @property
    def run_id(self) -> str | None:
        """Under which it knows the run, to go on in the same curve."""
        ...

    @property
    def url(self) -> str | None:
        """The run's page, if it has one."""
        ...

    def resume(self, held: int) -> None:
        """Steps after `held`, the newest that metrics.jsonl holds (-1 for none), are going to come, perhaps again."""

    def log(self, step: int, metrics: Metrics) -> None:
        """The numbers of a step after `last_step`, which is `step` when this returns."""

    def table(self, step: int, rows: Sequence[GenerationSample]) -> None:
        """Validation samples of the step that is logged next."""

    def finish(self, exit_code: int) -> None:
        """The run has ended."""


def numbers(metrics: Metrics) -> dict[str, int | float]:
    """The metrics that are numbers."""
    return {name: value for name, value in metrics.items() if value is not None}


def kept_id(path: Path) -> str | None:
    """The id under which a service knows the run of this directory."""
    return path.read_text().strip() if path.is_file() else None


def keep_id(path: Path, run_id: str) -> str:
    """Keep the id from the first start on, before any checkpoint exists."""
    replace_file(path, f"{run_id}\n".encode())
    return run_id
