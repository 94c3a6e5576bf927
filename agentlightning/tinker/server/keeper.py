"""The models in the engine: restored when they are needed, saved behind the operations, put away when they are not.

A model's durable state is its last save plus the operations after it. A save is possible only where no gradient sum is open, so
it happens right behind an `optim_step`, when enough has been done since the last one or nothing waits. To restore is to load
the save and to run again what succeeded after it, in order; what was answered stays answered.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from agentlightning.checkpoint.files import remove
from agentlightning.checkpoint.manifest import digest
from agentlightning.errors import WorkerError
from agentlightning.tinker.engine_api import LoraEngine
from agentlightning.tinker.server.effects import USER_FAULTS, Effects, new_state_directory
from agentlightning.tinker.server.journal import Journal, drop_payload, put
from agentlightning.tinker.server.paths import folder_of
from agentlightning.tinker.server.records import Model, Operation
from agentlightning.tinker.server.registry import Registry
from agentlightning.tinker.types import LoraConfig

CHANGES_MODEL = ("create_model", "create_from_state", "forward_backward", "optim_step", "load_weights")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """A model is saved behind the first optimizer step after so many operations or seconds, or when it is idle."""

    operations: int = 64
    seconds: float = 10.0
    cost_share: float = 0.05  # of the time, at most, whatever a save costs


@dataclass(slots=True)
class _Held:
    """A model in the engine."""

    last_seq: int  # the last operation that it holds
    gradient: bool  # whether a gradient sum is open
    saved_at: float  # monotonic
    save_cost_s: float = 0.0
    used_at: float = 0.0


class Keeper:
    """Called by the engine's thread alone."""

    def __init__(
        self, engine: LoraEngine, registry: Registry, journal: Journal, effects: Effects, root: Path, policy: SavePolicy
    ) -> None:
        self._engine, self._registry, self._journal, self._effects = engine, registry, journal, effects
        self._root, self._policy = root, policy
        self._held: dict[str, _Held] = {}

    @property
    def held(self) -> list[str]:
        """The models in the engine."""
        return list(self._held)

    def load(self, model: Model) -> None:
        """Have the model in the engine, as its last answered operation left it. Errors of the engine pass through."""
        if model.id in self._held or not model.created:
            return
        try:
            self._restore(model)
        except USER_FAULTS as error:  # nothing that who waits for an operation could mend
            raise WorkerError(f"{model.id} cannot be restored: {error}") from error

    def _restore(self, model: Model) -> None:
        started = time.monotonic()
        if model.saved_state is not None:
            self._engine.create_model(model.id, LoraConfig(**model.lora))
            self._held[model.id] = _Held(model.saved_seq, False, time.monotonic())
            self._engine.load_state(model.id, self._root / model.saved_state, optimizer=True)
        replayed = 0
        for operation in self._registry.operations_of(model.id):
            if operation.seq > model.saved_seq and operation.result_type not in (None, "server"):
                replayed += self._replay(model, operation)
        log.info("%s: restored in %.2f s, %d operations replayed", model.id, time.monotonic() - started, replayed)

    def _replay(self, model: Model, operation: Operation) -> bool:
        """Do again what changed the model. A user's error is one again; a fault of the server had no effect and is left out."""
        if operation.kind not in CHANGES_MODEL:
            self.note(model, operation, None)
            return False
        assert operation.payload is not None
        assert operation.result is not None
        try:
            effect = self._effects.run(model, operation, self._journal.segments.read(operation.payload))
        except USER_FAULTS:
            if operation.succeeded:
                raise
            self.note(model, operation, None)
            return True
        if not operation.succeeded or digest(effect.body) != operation.result.digest:
            log.warning("%s: operation %d gives another result than before; the first one stands", model.id, operation.seq)
        self.note(model, operation, effect.gradient)
        return True

    def note(self, model: Model, operation: Operation, gradient: bool | None) -> None:
        """The model in the engine holds one operation more."""
        held = self._held.setdefault(model.id, _Held(operation.seq, False, time.monotonic()))
        held.last_seq, held.used_at = operation.seq, time.monotonic()
        held.gradient = held.gradient if gradient is None else gradient

    def is_due(self, model: Model) -> bool:
        """Whether the model should be saved now, with others waiting."""
        held = self._held[model.id]
        since = time.monotonic() - held.saved_at
        enough = held.last_seq - model.saved_seq >= self._policy.operations or since >= self._policy.seconds
        return enough and since * self._policy.cost_share >= held.save_cost_s and self.can_save(model)

    def can_save(self, model: Model) -> bool:
        """Whether there is something to save, and no open gradient sum that would be lost."""
        held = self._held.get(model.id)
        return held is not None and not held.gradient and held.last_seq > model.saved_seq

    def save(self, model: Model) -> None:
        """Write the state, commit it, and let go of the payloads that it covers."""
        held, started = self._held[model.id], time.monotonic()
        seq, old = held.last_seq, model.saved_state
        directory = new_state_directory(self._root / "models" / folder_of(model.id) / f"auto-{seq}")
        self._engine.save_state(model.id, directory)
        covered = [op for op in self._registry.operations_of(model.id) if op.seq <= seq and op.payload is not None]
        before = model.saved_seq, model.saved_state
        model.saved_seq, model.saved_state = seq, str(directory.relative_to(self._root))
        try:
            self._journal.write(put(model), drop_payload([op.request_id for op in covered])).result()
        except (OSError, sqlite3.Error):
            model.saved_seq, model.saved_state = before
            raise
        for operation in covered:
            payload, operation.payload = operation.payload, None
            if payload is not None:
                self._journal.segments.release(payload)
        if old is not None:
            remove((self._root / old).parent)
        held.saved_at = time.monotonic()
        held.save_cost_s = held.saved_at - started

    def save_idle(self) -> None:
        """Save what can be; called when nothing waits."""
        for model_id in self.held:
            model = self._registry.models[model_id]
            if self.can_save(model):
                self.save(model)

    def drop(self, model_id: str) -> None:
        """Take a model out of the engine without saving: what it holds is in doubt."""
        if model_id in self._held:
            del self._held[model_id]
            self._engine.unload_model(model_id)
