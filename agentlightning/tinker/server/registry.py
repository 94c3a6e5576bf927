"""All that the service knows, in memory: what the journal held at the start, and every change since.

The event loop and the engine's thread both read and change it; each step is one operation on a dict, and lists are taken whole
before they are walked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from agentlightning.errors import UserError
from agentlightning.tinker.server.journal import Loaded
from agentlightning.tinker.server.records import Checkpoint, Model, Operation, Record, Sampler, Session

_T = TypeVar("_T", Session, Model, Sampler, Checkpoint)


class NotFoundError(UserError):
    """No such thing, or one of another key's: who asks is told the same."""


@dataclass(slots=True)
class Registry:
    """By id; operations also by their owner and number."""

    sessions: dict[str, Session] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    numbered: dict[str, dict[int, Operation]] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: Loaded) -> Registry:
        """What an earlier process left."""
        registry = cls()
        for record in loaded.records:
            registry.add(record)
        for operation in loaded.operations:
            registry.add_operation(operation)
        return registry

    def add(self, record: Record) -> None:
        """Insert or replace."""
        if isinstance(record, Session):
            self.sessions[record.id] = record
        elif isinstance(record, Model):
            self.models[record.id] = record
        elif isinstance(record, Sampler):
            self.samplers[record.id] = record
        else:
            self.checkpoints[record.id] = record

    def add_operation(self, operation: Operation) -> None:
        """A new one."""
        self.operations[operation.request_id] = operation
        self.numbered.setdefault(operation.owner_id, {})[operation.seq] = operation

    def forget_operation(self, operation: Operation) -> None:
        """One that nobody will ask for."""
        del self.operations[operation.request_id]
        del self.numbered[operation.owner_id][operation.seq]

    def operations_of(self, owner_id: str) -> list[Operation]:
        """In the order of their numbers."""
        operations = list(self.numbered.get(owner_id, {}).values())
        return sorted(operations, key=lambda operation: operation.seq)

    def checkpoints_of(self, model_id: str) -> list[Checkpoint]:
        """Oldest first."""
        return sorted((c for c in list(self.checkpoints.values()) if c.model_id == model_id), key=lambda c: c.created_at)

    def session(self, session_id: str, owner: str) -> Session:
        """NotFoundError if there is none of this key's."""
        return _owned("session", session_id, self.sessions, owner)

    def model(self, model_id: str, owner: str) -> Model:
        """NotFoundError if there is none of this key's."""
        return _owned("model", model_id, self.models, owner)

    def sampler(self, sampler_id: str, owner: str) -> Sampler:
        """NotFoundError if there is none of this key's."""
        return _owned("sampler", sampler_id, self.samplers, owner)

    def checkpoint(self, path: str, owner: str, public: bool = True) -> Checkpoint:
        """NotFoundError if there is none of this key's, and with `public` no published one either."""
        if path in self.checkpoints and public and self.checkpoints[path].public:
            return self.checkpoints[path]
        return _owned("checkpoint", path, self.checkpoints, owner)


def _owned(what: str, name: str, found: Mapping[str, _T], owner: str) -> _T:
    if name not in found or found[name].owner != owner:
        raise NotFoundError(f"there is no {what} {name[:200]!r} of this key's{_nearest(name, found, owner)}")
    return found[name]


def _nearest(name: str, found: Mapping[str, Record], owner: str) -> str:
    folder = name.rpartition("/")[0]
    beside = [key for key, record in list(found.items()) if record.owner == owner and folder and folder in key]
    names = ", ".join(beside[-5:])
    return f"; there are {names}" if names else ""
