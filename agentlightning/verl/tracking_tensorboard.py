"""TensorBoard: a run's lines and samples go in, event files come out.

Each event is written at once and by the calling thread, which the library's own writer does not do: so a full disk is seen at
the step that it costs, and that step is written again.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from agentlightning.checkpoint.files import entries, make_directory
from agentlightning.errors import ConfigError
from agentlightning.verl.tracking_samples import COLUMNS, GenerationSample
from agentlightning.verl.tracking_service import TABLE, Metrics, RunInfo, numbers

TENSORBOARD_DIR = "tensorboard"


class TensorboardLogger:
    """Event files in `<run>/tensorboard`, one a start. A step's numbers are one event: they are there whole or not at all.

    Samples lie in a directory of their own below it. A resume takes the numbers of its first step back and logs them again, for
    a kill may have come before they were there; the samples of that step, which are not made again, must not go with them.
    """

    run_id = None
    url = None

    def __init__(self, run: RunInfo, run_id: str | None) -> None:
        directory = run.run_dir / TENSORBOARD_DIR
        self._numbers, self._samples = EventFile(directory), EventFile(directory / "samples")
        try:
            # Nothing is known of what a killed run has written: `resume` says what is to be taken for granted.
            self.last_step = sys.maxsize if self._numbers.follows_another() else -1
            self._numbers.open()
        except OSError as error:
            raise ConfigError(
                f"trainer.logger: given tensorboard, but {directory} cannot be written: {error}; mend that, or set "
                "trainer.logger=[console]"
            ) from error

    def resume(self, held: int) -> None:
        """Readers forget the steps from `held` on; `held` itself is logged again."""
        self._numbers.purge_from = max(held, 0)
        self._samples.purge_from = held + 1
        self.last_step = min(self.last_step, max(held - 1, -1))

    def log(self, step: int, metrics: Metrics) -> None:
        """All numbers of a step in one event."""
        summary = self._numbers.new_summary()
        for name, value in numbers(metrics).items():
            summary.value.add(tag=name, simple_value=value)
        self._numbers.write(step=step, summary=summary)
        self.last_step = step

    def table(self, step: int, rows: Sequence[GenerationSample]) -> None:
        """A text with a Markdown table in it."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._samples.write(step=step, summary=text_pb(TABLE, markdown_table(rows)))

    def finish(self, exit_code: int) -> None:
        """Close the files."""
        self._numbers.close()
        self._samples.close()


class EventFile:
    """A directory of event files, of which this process adds one; begun at its first event, and anew after one that failed."""

    def __init__(self, directory: Path) -> None:
        # Generated modules, into which type checkers do not see.
        self._event_pb2: Any = import_module("tensorboard.compat.proto.event_pb2")
        self._summary_pb2: Any = import_module("tensorboard.compat.proto.summary_pb2")
        self._directory = directory
        self._file: BinaryIO | None = None
        self.purge_from: int | None = (
            None  # said to the readers in front of the next event: they forget what they had from here on
        )

    def follows_another(self) -> bool:
        """Whether event files are there."""
        return bool(self._stamps())

    def new_summary(self) -> Any:
        """An empty `Summary`."""
        return self._summary_pb2.Summary()

    def write(self, **event: Any) -> None:
        """Append an `Event` of these fields. OSError if the disk refuses it."""
        if self.purge_from is not None:
            session = self._event_pb2.SessionLog
            self._append(step=self.purge_from, session_log=session(status=session.START))
            self.purge_from = None
        self._append(**event)

    def close(self) -> None:
        """No further event comes."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def open(self) -> BinaryIO:
        """Begin a new file, named to be read after all others even where the clock was set back."""
        make_directory(self._directory)
        stamp = max(int(time.time()), *(1 + stamp for stamp in self._stamps()), 0)
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (self._directory / name).open("xb")
        self._append(file_version="brain.Event:2")
        return self._file

    def _append(self, **event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        data = self._event_pb2.Event(wall_time=time.time(), **event).SerializeToString()
        try:
            file = self._file or self.open()
            RecordWriter(file).write(data)
            file.flush()
        except OSError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Leave a file whose last record may be torn: readers stop there, but go on with the next file."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                path = Path(file.name)
                if not path.stat().st_size:
                    path.unlink()

    def _stamps(self) -> list[int]:
        """The seconds in the names of the event files that are there."""
        found = (re.match(r"events\.out\.tfevents\.(\d+)\.", name) for name in entries(self._directory))
        return [int(match[1]) for match in found if match is not None]


def markdown_table(rows: Sequence[GenerationSample]) -> str:
    """The samples as a Markdown table that shows each character as it is: none of them is read as Markdown or HTML."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join([*head, *("| " + " | ".join(_escaped(str(cell)) for cell in row.cells) + " |" for row in rows)])


def _escaped(text: str) -> str:
    entities = re.sub(r"[^\w\s]|_", lambda match: f"&#{ord(match[0])};", text.replace("\r\n", "\n"))
    return re.sub(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", "<br>", entities)
