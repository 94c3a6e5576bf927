"""Weights & Biases: a run's lines and samples go in, a page comes out. The run's id outlives kills: they share one curve."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from agentlightning.errors import ConfigError
from agentlightning.verl.tracking_samples import COLUMNS, GenerationSample
from agentlightning.verl.tracking_secrets import tell_secrets
from agentlightning.verl.tracking_service import TABLE, LoggerError, Metrics, RunInfo, keep_id, kept_id, numbers

if TYPE_CHECKING:
    import wandb

WANDB_ID_FILE = "wandb_run_id.txt"


class WandbLogger:
    """Weights & Biases. It knows no way back: a step that is done again gives the same numbers, which it already has."""

    def __init__(self, run: RunInfo, run_id: str | None) -> None:
        self.run_id = (
            run_id or kept_id(run.run_dir / WANDB_ID_FILE) or keep_id(run.run_dir / WANDB_ID_FILE, secrets.token_hex(4))
        )
        self._run = _start_wandb(run, self.run_id)
        self.last_step = self._run.step - 1
        self._rows: list[list[str | float]] = []  # since this start: W&B cannot add to a table, so each has all before
        self._table_step = -1

    @property
    def url(self) -> str | None:
        """The run's page; None offline."""
        return None if self._run.offline else self._run.url

    def resume(self, held: int) -> None:
        """Offline it cannot be asked what it has: everything that metrics.jsonl holds, as far as we know."""
        if self._run.offline:
            self.last_step = max(self.last_step, held)

    def log(self, step: int, metrics: Metrics) -> None:
        """One call for numbers and table: a step is never half there."""
        with _wandb_errors() as wandb:
            table = {}
            if self._table_step == step:
                table[TABLE] = wandb.Table(columns=["step", *COLUMNS], data=self._rows)
            self._run.log({**numbers(metrics), **table}, step=step)
        self.last_step = step

    def table(self, step: int, rows: Sequence[GenerationSample]) -> None:
        """Kept until `log`."""
        before = [row for row in self._rows if row[0] != step]
        self._rows, self._table_step = [*before, *([step, *row.cells] for row in rows)], step

    def finish(self, exit_code: int) -> None:
        """Waits for what is still to be sent."""
        with _wandb_errors():
            self._run.finish(exit_code=exit_code)


@contextlib.contextmanager
def _wandb_errors() -> Iterator[Any]:
    import wandb

    try:
        yield wandb
    except wandb.Error as error:
        raise LoggerError(str(error)) from error


def _start_wandb(run: RunInfo, run_id: str) -> wandb.Run:
    import wandb

    # The console shows what is to be seen; capturing its live display would garble both. The metadata has the command line.
    settings = wandb.Settings(console="off", silent=True, x_disable_meta=tell_secrets(sys.argv[1:]))
    try:
        return wandb.init(
            project=run.project,
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run.run_dir),
            config=dict(run.config),
            settings=settings,
        )
    except wandb.Error as error:
        raise ConfigError(
            f"trainer.logger: given wandb, which does not start: {error}; log in with `wandb login`, work offline with "
            "WANDB_MODE=offline in the environment, or mend it with trainer.logger=[console]"
        ) from error
