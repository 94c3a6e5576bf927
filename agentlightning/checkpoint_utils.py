"""Checkpoints for a training loop of your own: what to resume from, and how to save, in the words of `tinker_cookbook`.

A log directory and a training client enter; a `CheckpointRecord` leaves. The client saves the weights, which may lie anywhere
(a directory, `tinker://...`); the record, `NAME.pt` in the log directory, says where they are and how far the loop was. It is
written last, so that a record is always the record of a whole checkpoint. Works with `agentlightning.tinker` and with the
`tinker` SDK alike. What is heavy (numpy, torch, asyncio) is imported when the first record is read or written.

Example:

    resume_info = checkpoint_utils.get_last_checkpoint(log_path)
    start_batch = resume_info["batch"] if resume_info else 0
    ...
    await checkpoint_utils.save_checkpoint_async(
        training_client=training_client, name=f"{batch:06d}", log_path=log_path, kind="both", loop_state={"batch": batch}
    )
"""

from __future__ import annotations

import contextvars
import logging
import os
import re
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from agentlightning.errors import CheckpointError

Kind = Literal["state", "sampler", "both", "metadata"]
KINDS: dict[str, tuple[str, ...]] = {  # which paths a record of that kind holds
    "state": ("state_path",),
    "sampler": ("sampler_path",),
    "both": ("state_path", "sampler_path"),
    "metadata": (),
}
RESERVED_KEYS = ("schema", "name", "kind", "state_path", "sampler_path", "ttl_seconds", "digest")
_KNOWN_KEYS = ("name", "kind", "batch", "epoch", "final", "state_path", "sampler_path", "ttl_seconds")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PLAIN = (bool, int, float, str, bytes, type(None))
_DEEPEST = 32  # levels of lists and dicts in a loop's state; more is a cycle

log = logging.getLogger(__name__)


class SavedWeights(Protocol):
    """What a save of a training client comes to."""

    @property
    def path(self) -> str | None:
        """A directory, or a URL such as `tinker://RUN/weights/NAME`."""
        ...


class SaveFuture(Protocol):
    """A save that is under way."""

    def result_async(self) -> Awaitable[SavedWeights]:
        """Wait until the weights are durable."""
        ...


class SavingClient(Protocol):
    """The part of a training client that is used here; `agentlightning.tinker` and the `tinker` SDK have it."""

    async def save_state_async(self, name: str, ttl_seconds: int | None = None) -> SaveFuture:
        """Save weights and optimizer."""
        ...

    async def save_weights_for_sampler_async(self, name: str, ttl_seconds: int | None = None) -> SaveFuture:
        """Save what a sampler needs."""
        ...


class CheckpointRecord(Mapping[str, Any]):
    """What a record holds, read only: `rec["batch"]`, `rec.batch`, `rec.get("lr")`, `"lr" in rec`, `dict(rec)`.

    Every key of the `loop_state` comes back as it was saved. The well-known ones are attributes too, None where the record has
    none. Paths of the record's own directory lead from the working directory, or are absolute, as the log path was.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]):
        """`values` has at least a `name`."""
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            raise KeyError(f"{key} (the record {self.name} holds {', '.join(self._values)})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return f"CheckpointRecord({self._values!r})"

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the record has none."""
        return self._values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether the record holds `key`, and not as None."""
        return self._values.get(key) is not None

    @property
    def name(self) -> str:
        """The name it was saved under."""
        return self._values["name"]

    @property
    def kind(self) -> Kind | None:
        """What was saved; None in a record that something else wrote."""
        return self.get("kind")

    @property
    def batch(self) -> int | None:
        """The next batch to train, counted from 0."""
        return self.get("batch")

    @property
    def epoch(self) -> int | None:
        """The epoch of that batch."""
        return self.get("epoch")

    @property
    def final(self) -> bool | None:
        """Whether the loop called it its last."""
        return self.get("final")

    @property
    def state_path(self) -> str | None:
        """Where weights and optimizer lie: for `load_state_async`."""
        return self.get("state_path")

    @property
    def sampler_path(self) -> str | None:
        """Where the weights for sampling lie."""
        return self.get("sampler_path")

    @property
    def extra(self) -> dict[str, Any]:
        """The keys that are the loop's own."""
        return {key: value for key, value in self._values.items() if key not in _KNOWN_KEYS}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as a plain dict."""
        return dict(self._values)


def get_last_checkpoint(log_path: str | os.PathLike[str], required_key: str = "state_path") -> CheckpointRecord | None:
    """The newest usable record in `log_path` that holds `required_key`; None if there is no such record, so a fresh start.

    Newest by the `batch` it holds (by `epoch` first, where all hold one; by `step` without a `batch`). Between equals a record
    for good goes before a rolling one or one with a TTL, and then the later file. Records are passed over, with a warning
    that names them, if they are torn or if what they name is gone or damaged; behind a URL (`tinker://`) nothing can be looked
    at. Reads the trainer's run directories too.

    Raises CheckpointError if there are records and none is usable: a loop must not start from scratch by accident then.
    """
    from agentlightning.checkpoint import loop_record

    root = _directory(log_path)
    found, skipped = loop_record.last(root, required_key)
    _warn(root, skipped)
    return None if found is None else CheckpointRecord(found.values)


def list_checkpoints(log_path: str | os.PathLike[str]) -> list[CheckpointRecord]:
    """Every usable record in `log_path`, oldest first in the order of `get_last_checkpoint`; empty if there is none.

    Sizes are looked at, not every byte. A path behind which nothing is left is missing in its record, and a record that names
    nothing else is passed over, each with a warning. CheckpointError if the directory cannot be read.
    """
    from agentlightning.checkpoint import loop_record

    root = _directory(log_path)
    directory = loop_record.read_directory(root)
    skipped = [*directory.unreadable, *directory.others]
    records: list[CheckpointRecord] = []
    for found in directory.found:
        usable, reasons = loop_record.without_gone(found)
        if usable is not None:
            records.append(CheckpointRecord(usable.values))
        skipped += [(found.file, reason if usable is not None else f"passed over: {reason}") for reason in reasons]
    _warn(root, skipped)
    return records


async def save_checkpoint_async(
    training_client: SavingClient | None,
    name: str,
    log_path: str | os.PathLike[str],
    loop_state: Mapping[str, Any],
    kind: Kind = "state",
    ttl_seconds: int | None = None,
) -> dict[str, str]:
    """Save through the client, wait until that is durable, then write the record; returns the paths that the client gave.

    `kind`: "state" (weights and optimizer: to resume), "sampler" (weights to sample with), "both", or "metadata" (the loop's
    state alone; the client is not used and may be None). `loop_state`: plain values under keys of your own, `batch` being the
    next batch to train; what it holds when this is called is what is saved. `ttl_seconds`, None for good, goes to the client
    and into the record.

    A name may be saved again, by a loop that went back: the new record takes the place of the old one, which is kept beside
    it as `NAME.pt.aside-1`. Whether the client writes over its own save of that name is the client's affair. Records of
    later batches stay the newest ones until they are moved away.

    Raises ValueError, before anything is saved, for a name that is not one plain path segment, an unknown kind, or a
    `loop_state` that would not come back or has one of the reserved keys; CheckpointError if `log_path` cannot be written or
    a path that the client gave is not there. Errors of the client pass through; no record is written then.
    """
    import asyncio

    values = _record_values(name, kind, loop_state, ttl_seconds)
    root = _directory(log_path)
    await asyncio.to_thread(_prepare, root, name, values)
    paths = await _save_weights(training_client, name, kind, ttl_seconds)
    await asyncio.to_thread(_commit, root, name, {**values, **paths})
    return paths


def save_checkpoint(
    training_client: SavingClient | None,
    name: str,
    log_path: str | os.PathLike[str],
    loop_state: Mapping[str, Any],
    kind: Kind = "state",
    ttl_seconds: int | None = None,
) -> dict[str, str]:
    """`save_checkpoint_async`, waited for. Inside a running event loop it has a thread and a loop of its own.

    The running loop stands still meanwhile: a client whose futures need just that loop wants `save_checkpoint_async`.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    def save() -> dict[str, str]:
        return asyncio.run(save_checkpoint_async(training_client, name, log_path, loop_state, kind, ttl_seconds))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return save()
    with ThreadPoolExecutor(1, thread_name_prefix="save_checkpoint") as thread:
        return thread.submit(contextvars.copy_context().run, save).result()


async def _save_weights(client: SavingClient | None, name: str, kind: Kind, ttl_seconds: int | None) -> dict[str, str]:
    """The paths that `kind` asks for. Both saves are under way together, and both are waited for if one fails."""
    import asyncio

    if not KINDS[kind]:
        return {}
    if client is None:
        raise ValueError(f"kind={kind!r} needs a training_client; only kind='metadata' does without")
    begin = {"state_path": client.save_state_async, "sampler_path": client.save_weights_for_sampler_async}
    futures = [await begin[key](name, ttl_seconds=ttl_seconds) for key in KINDS[kind]]
    results = await asyncio.gather(*(future.result_async() for future in futures), return_exceptions=True)
    paths: dict[str, str] = {}
    for key, result in zip(KINDS[kind], results, strict=True):
        if isinstance(result, BaseException):
            raise result
        paths[key] = _checked_path(key, result.path)
    return paths


def _checked_path(key: str, path: str | None) -> str:
    if not path:
        raise CheckpointError(f"the training client gave no {key} for what it saved ({path!r}); expected a directory or a URL")
    if "://" not in path and not os.path.exists(path):
        raise CheckpointError(
            f"the training client says that it saved to {path}, which is not there as seen from this process; a record that "
            "names it could not be resumed from. Use a directory that all hosts share"
        )
    return path


def _record_values(name: str, kind: str, loop_state: Mapping[str, Any], ttl_seconds: int | None) -> dict[str, Any]:
    """The record without its paths, taken now: the loop may change its state while the weights are saved."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a checkpoint cannot be named {name!r}; use letters, digits, '.', '_' and '-', at most 128, and no '.' first"
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(KINDS)}")
    if ttl_seconds is not None and (type(ttl_seconds) is not int or ttl_seconds < 1):
        raise ValueError(f"ttl_seconds={ttl_seconds!r}; expected a whole number of seconds, or None to keep it for good")
    if not isinstance(loop_state, Mapping):
        raise ValueError(f"loop_state is a {type(loop_state).__name__}; expected a dict such as {{'batch': 10}}")
    taken = [key for key in RESERVED_KEYS if key in loop_state]
    if taken:
        raise ValueError(f"loop_state has the keys {', '.join(taken)}, which the record itself uses; give them other names")
    if not all(type(key) is str for key in loop_state):
        raise ValueError(f"loop_state has the keys {list(loop_state)!r}; expected strings")
    state = {key: _plain_copy(value, f"loop_state[{key!r}]", _DEEPEST) for key, value in loop_state.items()}
    if "batch" in state and (type(state["batch"]) is not int or state["batch"] < 0):
        raise ValueError(f"loop_state['batch'] is {state['batch']!r}; expected the number of the next batch to train, from 0")
    ttl = {} if ttl_seconds is None else {"ttl_seconds": ttl_seconds}
    return {"name": name, "kind": kind, **state, **ttl}


def _plain_copy(value: Any, where: str, levels: int) -> Any:
    """A copy that nobody else holds. ValueError, naming the place, for what would not come back from a record as it was."""
    if type(value) in _PLAIN:
        return value
    if type(value) not in (list, tuple, dict):
        raise ValueError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a record cannot hold; expected bool, "
            "int, float, str, bytes, None, or lists, tuples and dicts of them (of an array or tensor: .tolist(), .item())"
        )
    if levels == 0:
        raise ValueError(f"{where} is nested more than {_DEEPEST} levels deep, or holds itself; save less of it")
    if isinstance(value, dict):
        odd = [key for key in value if type(key) not in (str, int)]
        if odd:
            raise ValueError(f"{where} has the keys {odd!r}; expected strings or whole numbers")
        return {key: _plain_copy(item, f"{where}[{key!r}]", levels - 1) for key, item in value.items()}
    items = [_plain_copy(item, f"{where}[{index}]", levels - 1) for index, item in enumerate(value)]
    return items if isinstance(value, list) else tuple(items)


def _directory(log_path: str | os.PathLike[str]) -> Path:
    given = os.fspath(log_path)
    if not given or "://" in given:
        raise CheckpointError(
            f"log_path={given!r}; expected a local directory: the records of a loop of your own are kept there, whatever URL "
            "the weights have"
        )
    return Path(given).expanduser()


def _prepare(root: Path, name: str, values: Mapping[str, Any]) -> None:
    from agentlightning.checkpoint import loop_record

    loop_record.prepare(root, name, values)


def _commit(root: Path, name: str, values: Mapping[str, Any]) -> None:
    from agentlightning.checkpoint import loop_record

    loop_record.commit(root, name, values)


def _warn(root: Path, skipped: Sequence[tuple[str, str]]) -> None:
    for file, reason in skipped:
        log.warning("%s: %s", root / file, reason)
