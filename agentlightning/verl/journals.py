"""Which step's finished samples are kept on disk, and for how long.

Enters: the run directory, what the run is, and what is durable. Leaves: a directory for each step that a kill would do again.
Samples hang on the base and on the prompts too, which a journal does not know: so a run with others has directories of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from agentlightning.types import JournalSpec

JOURNALS = "rollouts"
_KEPT_STEPS = 16  # of a run that saves seldom; older steps would be sampled again


class StepJournals:
    """The directories `rollouts/step_<n>-<digest>` of a run."""

    def __init__(self, run_dir: Path, reuse: Literal["whole", "each", "off"], run: Mapping[str, Any]) -> None:
        """`run`: JSON-plain, what makes it another run if it changes, the model and the data among it."""
        self.directory = run_dir / JOURNALS
        self._digest = hashlib.blake2b(json.dumps(run, sort_keys=True).encode(), digest_size=6).hexdigest()
        self.reuse: Literal["whole", "each", "off"] = reuse

    def of_step(self, step: int) -> JournalSpec | None:
        """Where the workers keep the samples of `step`; None if they shall not, or the disk refuses it."""
        if self.reuse == "off":
            return None
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError:  # costs the journal, not the run: a save that fails is told of elsewhere
            return None
        return JournalSpec(str(self.directory / f"step_{step}-{self._digest}"), self.reuse)

    def forget(self, durable_step: int, step: int) -> None:
        """Remove what no start can ask for after `durable_step`, and all but the newest, `step` being done."""
        if not self.directory.is_dir():
            return
        oldest = max(durable_step, step - _KEPT_STEPS) + 1
        for kept in self.directory.glob("step_*"):
            number = kept.name.removeprefix("step_").partition("-")[0]
            if number.isdecimal() and int(number) < oldest:
                shutil.rmtree(kept, ignore_errors=True)
