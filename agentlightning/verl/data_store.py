"""The rows of a split as prompts by their number: all in memory, or each made when it is asked for.

Checked prompts, or files and what makes prompts of their rows, go in; prompts by number leave, with what an order of them needs
to know: the blocks they lie in and their data sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from agentlightning.types import Prompt
from agentlightning.verl.data_files import RowFiles
from agentlightning.verl.data_rows import PromptMaker

_ORDER = "swap-or-not"  # a run whose rows come in another order is another run
_CHECKED_FIRST = 256  # rows of a file


class CheckedPrompts:
    """Prompts in memory; None where a row is left out."""

    def __init__(self, prompts: Sequence[Prompt | None]) -> None:
        self._prompts = tuple(prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, row: int) -> Prompt | None:
        return self._prompts[row]

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """As of `RowFiles`: one block, which costs nothing."""
        return np.array([0, len(self)], dtype=np.int64), np.zeros(1, dtype=np.int64)

    def hold(self, streams: int) -> int:
        """As of `RowFiles`: there is nothing to hold back."""
        return streams

    def sources(self) -> tuple[list[str], np.ndarray]:
        """The data sources, and int64 [rows]: which of them each row has, -1 where it is left out."""
        names: dict[str, int] = {}
        codes = [-1 if prompt is None else names.setdefault(prompt.data_source, len(names)) for prompt in self._prompts]
        return list(names), np.array(codes, dtype=np.int64)

    def fingerprint(self) -> str:
        """A digest of all prompts."""
        digest = hashlib.blake2b(_ORDER.encode(), digest_size=16)
        for prompt in self._prompts:
            if prompt is not None:
                row = [prompt.uid, prompt.token_ids, prompt.data_source, prompt.ground_truth, prompt.extra_info]
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


class LazyPrompts:
    """Prompts made of their rows when they are asked for. Raises `DataError` if one of the first rows is wrong."""

    def __init__(self, files: RowFiles, split: str, maker: PromptMaker) -> None:
        self._files, self._split, self._maker = files, split, maker
        self._digests = files.digests()
        first = files.heads(_CHECKED_FIRST)
        maker.fit([maker.make(f"{split}:{number}", row) for number, row in first.items()], list(first.values()))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> Prompt | None:
        found = self._files.row(row)
        return self._maker.fit([self._maker.make(f"{self._split}:{row}", found)], [found])[0]

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """See `RowFiles.blocks`."""
        return self._files.blocks()

    def hold(self, streams: int) -> int:
        """See `RowFiles.hold`."""
        return self._files.hold(streams)

    def sources(self) -> tuple[list[str], np.ndarray]:
        """See `RowFiles.sources`."""
        return self._files.sources(self._maker.data.reward_fn_key)

    def fingerprint(self) -> str:
        """A digest of the files' content and of the keys that say how their rows become prompts."""
        data = self._maker.data
        fits = "filter" if data.filter_overlong_prompts else data.truncation
        cut = None if fits == "error" else [fits, data.max_prompt_length]
        facts = [_ORDER, self._digests, len(self), data.prompt_key, data.reward_fn_key, cut]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
