"""Samples to be read by people: which of a validation are shown, and the files of `trainer.rollout_data_dir`.

`GenerationSample`s go in; rows of a table, or verl's `<step>.jsonl`, come out. It exists so that the loggers and the files
agree on what a sample is.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentlightning.checkpoint.files import LEFTOVER, entries, make_directory, remove, replace_file

COLUMNS = ("input", "output", "ground_truth", "score", "data_source")


@dataclass(frozen=True, slots=True)
class GenerationSample:
    """One answer and what became of it. Example: `GenerationSample("2+2?", "4", "4", 1.0, "sums", {"format": 1.0})`."""

    input: str
    output: str
    ground_truth: Any
    score: float
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # further numbers that the reward function reported

    @property
    def cells(self) -> list[str | float]:
        """The sample as a row under `COLUMNS`. Lone surrogates, which no logger can encode, become question marks."""
        texts = [self.input, self.output, str(self.ground_truth), self.data_source]
        prompt, answer, truth, source = (text.encode("utf-8", "replace").decode() for text in texts)
        return [prompt, answer, truth, float(self.score), source]


def choose_samples(count: int, total: int, seed: int) -> list[int]:
    """Which of `total` validation samples are shown, in ascending order: at most `count`, the same ones each time.

    A larger `count` shows the same ones and further ones. numpy keeps the raw words of Philox for ever.
    """
    words = np.random.Philox(key=np.array([seed, total], dtype=np.uint64)).random_raw(total)
    return sorted(np.argsort(words, kind="stable")[:count].tolist())


def write_rollouts(directory: Path, step: int, samples: Sequence[GenerationSample]) -> Path:
    """Write verl's `<directory>/<step>.jsonl` at once, over the file of the same step if it is done again; returns its path.

    One JSON object a sample: input, output, gts, score, step, data_source, and what the reward function reported beside the
    score. A relative `directory` is taken as it is given, from where the run was started. OSError if the disk refuses it: the
    file that was there stays.
    """
    path = directory / f"{step}.jsonl"
    data = b"".join(_encoded(step, sample) for sample in samples)
    try:
        make_directory(directory)
        replace_file(path, data)
    except OSError:
        _remove_leftovers(path)  # a full disk is not to be filled further with each step
        raise
    return path


def _encoded(step: int, sample: GenerationSample) -> bytes:
    own = {
        "input": sample.input,
        "output": sample.output,
        "gts": sample.ground_truth,
        "score": float(sample.score),
        "step": step,
        "data_source": sample.data_source,
    }
    line = {**own, **sample.extra, **own}  # a reward function's own "step" does not replace ours
    # A lone surrogate is no UTF-8, but its backslash form is what JSON calls it.
    return json.dumps(_plain(line), ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """A value as JSON knows it: numpy's as Python's, NaN and inf as null, anything else as its text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _remove_leftovers(path: Path) -> None:
    with contextlib.suppress(OSError):
        for name in entries(path.parent):
            match = LEFTOVER.fullmatch(name)
            if match is not None and match["name"] == path.name:
                remove(path.parent / name)
