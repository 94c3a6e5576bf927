"""Which step's finished samples are kept on disk, and for how long.

Enters: the run directory and what is durable. Leaves: a directory for each step that a kill would do again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from agentlightning.types import JournalSpec

JOURNALS = "rollouts"
_KEPT_STEPS = 16  # of a run that saves seldom; older steps would be sampled again


class StepJournals:
    """The directories `rollouts/step_<n>` of a run."""

    def __init__(self, run_dir: Path, reuse: Literal["whole", "each", "off"]) -> None:
        self.directory = run_dir / JOURNALS
        self.reuse: Literal["whole", "each", "off"] = reuse

    def of_step(self, step: int) -> JournalSpec | None:
        """Where the workers keep the samples of `step`; None if they shall not, or the disk refuses it."""
        if self.reuse == "off":
            return None
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError:  # costs the journal, not the run: a save that fails is told of elsewhere
            return None
        return JournalSpec(str(self.directory / f"step_{step}"), self.reuse)

    def forget(self, durable_step: int, step: int) -> None:
        """Remove what no start can ask for after `durable_step`, and all but the newest, `step` being done."""
        if not self.directory.is_dir():
            return
        oldest = max(durable_step, step - _KEPT_STEPS) + 1
        for kept in self.directory.glob("step_*"):
            number = kept.name.removeprefix("step_")
            if number.isdecimal() and int(number) < oldest:
                shutil.rmtree(kept, ignore_errors=True)
