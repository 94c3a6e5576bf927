"""Finished samples on disk, so that a run that was killed does not sample them again.

Enters: completions as they finish. Leaves, at the next start: those of the same step, adapter, seed and sampling parameters.
One directory a step, one file a call on a worker: a line with what the samples hang on, then a line a sample, each sealed by
a digest. Nothing is fsynced: it is for processes that die; after a power cut the torn rest is passed over and sampled again.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from agentlightning.types import Completion, JournalSpec

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
SampleId = tuple[str, int]
"""(uid of the prompt, index of the sample)."""


class RolloutJournal:
    """The journal of one call: `reusable` first, then `add` for what finishes."""

    def __init__(self, spec: JournalSpec, identity: Mapping[str, Any]) -> None:
        """`identity`: JSON-plain, everything that the samples hang on beside their prompts."""
        self.spec, self.directory = spec, Path(spec.directory)
        self._header = _sealed(dict(identity))
        self._descriptor: int | None = None
        self._broken = False

    def reusable(self, wanted: Sequence[SampleId]) -> dict[SampleId, Completion]:
        """Those of `wanted` that were finished before."""
        found: dict[SampleId, Completion] = {}
        try:
            files = sorted(self.directory.glob("*.jsonl"))
        except OSError:
            return {}
        for file in files:
            found |= {(c.uid, c.sample_index): c for c in self._read(file)}
        found = {sample: found[sample] for sample in wanted if sample in found}
        return found if self.spec.reuse == "each" or len(found) == len(set(wanted)) else {}

    def add(self, completions: Iterable[Completion]) -> None:
        """Keep what has finished. A disk that refuses it costs the journal, not the run."""
        if self._broken:
            return
        lines = b"".join(_sealed(_plain(completion)) for completion in completions)
        try:
            if self._descriptor is None:
                self._descriptor, lines = self._create(), self._header + lines
            view = memoryview(lines)
            while len(view):
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self._broken = True
            log.warning("finished rollouts are not journaled in %s: %s", self.directory, error)

    def close(self) -> None:
        """No more will come."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _create(self) -> int:
        # Not its parents: where the run directory cannot be seen there is nobody who would read the journal.
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"{uuid.uuid4().hex}.jsonl"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def _read(self, file: Path) -> list[Completion]:
        """The whole lines of a file of the same identity."""
        try:
            header, *lines = file.read_bytes().splitlines(keepends=True) or [b""]
        except OSError:
            return []
        if header != self._header:
            return []
        completions: list[Completion] = []
        for line in lines:
            value = _opened(line)
            if value is None:  # torn: nothing was written behind it
                break
            completions.append(_completion(value))
        return completions


def adapter_digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """A digest of an adapter's weights, names and shapes included."""
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def tool_digest(spec: str | None) -> str | None:
    """A digest of the file that the tool `pkg.mod:fn` stands in: samples made by a tool that was mended since are not used."""
    if spec is None:
        return None
    found = importlib.util.find_spec(spec.partition(":")[0])
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return spec
    return f"{spec} {hashlib.blake2b(Path(found.origin).read_bytes(), digest_size=16).hexdigest()}"


def _plain(completion: Completion) -> dict[str, Any]:
    return {
        "uid": completion.uid,
        "sample_index": completion.sample_index,
        "token_ids": _text(completion.token_ids, np.int32),
        "mask": _text(completion.mask, np.bool_),
        "logprobs": _text(completion.logprobs, np.float32),
        "turns": [dict(turn) for turn in completion.turns],
        "stop_reason": completion.stop_reason,
        "adapter_version": completion.adapter_version,
    }


def _completion(value: Mapping[str, Any]) -> Completion:
    return Completion(
        uid=value["uid"],
        sample_index=value["sample_index"],
        token_ids=_array(value["token_ids"], np.int32),
        mask=_array(value["mask"], np.bool_),
        logprobs=_array(value["logprobs"], np.float32),
        turns=tuple(value["turns"]),
        stop_reason=value["stop_reason"],
        adapter_version=value["adapter_version"],
        from_journal=True,
    )


def _text(array: np.ndarray, dtype: type[np.generic]) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).data).decode()


def _array(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def _sealed(value: Mapping[str, Any]) -> bytes:
    body = json.dumps(value, sort_keys=True).encode()
    return xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"


def _opened(line: bytes) -> dict[str, Any] | None:
    digest, _, body = line.partition(b" ")
    whole = body.endswith(b"\n") and xxhash.xxh3_64_hexdigest(body[:-1]).encode() == digest
    return json.loads(body) if whole else None
