"""Where the runs and checkpoints of one command lie. Paths and URLs enter; directories leave that the tools can work on.

A path is its own directory. A URL gets a picture (see remote.py) that is gone when the command ends, and whatever is said of
the picture meanwhile, an error too, is said of the URL.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agentlightning.checkpoint.remote import is_url
from agentlightning.errors import AgentLightningError
from agentlightning.tools.remote import RemoteRun, find_remote
from agentlightning.tools.runs import find_checkpoint, open_run


class Places:
    """All that one command was given, each URL opened once. See `open_places`."""

    def __init__(self, stack: ExitStack):
        """`stack` closes what is opened here."""
        self._stack = stack
        self._remote: dict[str, RemoteRun] = {}

    def run(self, text: str, files: Sequence[str] | None = None) -> Path:
        """The run directory that `text` names, or the picture of a URL: with checkpoints, or only with the small `files`."""
        if not is_url(text):
            return open_run(text)
        url = text.rstrip("/")
        if url not in self._remote:
            self._remote[url] = self._stack.enter_context(RemoteRun(url))
            if files is None:
                self._remote[url].look()
            else:
                self._remote[url].pull(files)
        return self._remote[url].root

    def remote(self, root: Path) -> RemoteRun | None:
        """The run that `root` is the picture of; None for a directory that is a run itself."""
        return next((run for run in self._remote.values() if run.root == root), None)

    def checkpoint(self, text: str, run: Path | None, only: Collection[str] | None = None) -> Path:
        """The directory of the checkpoint that `text` names, see `find_checkpoint`. Of one at a URL its files, or `only` some,
        were fetched."""
        name: str | None = text
        if is_url(text):
            url, name = find_remote(text)
            run = self.run(url)
        remote = None if run is None else self.remote(run)
        if remote is None:
            return find_checkpoint(text, run)
        directory = find_checkpoint(str(remote.root)) if name is None else remote.find(name)
        remote.fetch(directory, only)
        return directory

    def shown(self, text: object) -> str:
        """A path or a message as people are to see it: with the URL where it speaks of the picture."""
        said = str(text)
        for run in self._remote.values():
            said = said.replace(str(run.root), run.url)
        return said


@contextmanager
def open_places() -> Iterator[Places]:
    """Places for one command; pictures are removed at the end, and errors speak of URLs."""
    with ExitStack() as stack:
        places = Places(stack)
        try:
            yield places
        except AgentLightningError as error:
            if (said := places.shown(error)) == str(error):
                raise
            raise type(error)(said) from error
