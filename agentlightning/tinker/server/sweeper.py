"""What goes by itself: checkpoints whose time is over, answers that were fetched, snapshots of sessions that are over.

Never the last resumable state of a run: its newest `weights` checkpoint outlives its TTL, and a model's own save stays.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path

from agentlightning.checkpoint.files import entries, remove
from agentlightning.tinker.server.journal import forget, put
from agentlightning.tinker.server.journal import remove as remove_record
from agentlightning.tinker.server.paths import KINDS
from agentlightning.tinker.server.records import SAMPLE, Checkpoint, Operation, Sampler, Session
from agentlightning.tinker.server.registry import Registry
from agentlightning.tinker.server.service import Service

EVERY_S = 30.0
FETCHED_S = 600.0  # an answer is kept so long behind the first time it was fetched: the reply may have been lost
UNFETCHED_S = 7 * 86400.0
ASLEEP_S = 3600.0  # without a sign of life, a session's models leave the engine; the next request brings them back
SNAPSHOTS, SNAPSHOT_S = 8, 3600.0  # a model's newest unnamed snapshots stay, older ones until they are unused for so long
OVER_S = 3600.0  # so long behind its end, a session's snapshots go
DEAD_S = 7 * 86400.0  # and so long without a sign of life
log = logging.getLogger(__name__)


class Sweeper:
    """`run` is a task of the event loop."""

    def __init__(self, service: Service) -> None:
        self._service, self._registry = service, service.registry

    async def run(self) -> None:
        """Until it is cancelled. What fails now is tried again the next time."""
        while True:
            try:
                await self.sweep()
            except (OSError, sqlite3.Error):
                log.exception("sweeping failed; it is tried again in %.0f s", EVERY_S)
            await asyncio.sleep(EVERY_S)

    async def sweep(self) -> None:
        """Once."""
        moment = datetime.now(UTC)
        for checkpoint in self.expired(moment):
            log.info("%s: its time is over", checkpoint.id)
            await self.delete(checkpoint)
        await self._forget(self.forgettable(time.time()))
        for sampler in [*self._over(moment), *self.outdated(moment)]:
            await self._drop(sampler)
        for session in list(self._registry.sessions.values()):
            if _age(session.seen_at, moment) > ASLEEP_S:
                self._put_away(session)
        live = [session for session in list(self._registry.sessions.values()) if not session.finished]
        await self._service.keep(*(put(session) for session in live if _age(session.seen_at, moment) < 2 * EVERY_S))

    def expired(self, moment: datetime) -> list[Checkpoint]:
        """Those whose time is over, but for each run's newest resumable one."""
        newest: dict[str, Checkpoint] = {}
        for checkpoint in sorted(self._registry.checkpoints.values(), key=lambda c: c.created_at):
            if checkpoint.kind == "weights":
                newest[checkpoint.model_id] = checkpoint
        kept = {checkpoint.id for checkpoint in newest.values()}
        return [
            checkpoint
            for checkpoint in list(self._registry.checkpoints.values())
            if checkpoint.expires_at is not None
            and datetime.fromisoformat(checkpoint.expires_at) <= moment
            and checkpoint.id not in kept
        ]

    async def delete(self, checkpoint: Checkpoint) -> None:
        """The record first; the files go with the last sampler that reads them."""
        del self._registry.checkpoints[checkpoint.id]
        await self._service.keep(remove_record(checkpoint))
        await self._remove_unused(checkpoint.directory)

    async def _remove_unused(self, directory: str) -> None:
        used = any(sampler.directory == directory for sampler in list(self._registry.samplers.values()))
        named = any(checkpoint.directory == directory for checkpoint in list(self._registry.checkpoints.values()))
        path = (self._service.root / directory).parent  # with the engine's record beside the state
        if not used and not named and path.exists():
            await asyncio.to_thread(remove, path)

    def forgettable(self, moment: float) -> list[Operation]:
        """Those that were fetched some time ago or never will be, and that no replay needs."""
        return [
            operation
            for operation in list(self._registry.operations.values())
            if operation.done.is_set() and self._is_old(operation, moment) and not self._is_needed(operation)
        ]

    def _is_old(self, operation: Operation, moment: float) -> bool:
        if operation.fetched_at:
            return moment - operation.fetched_at > FETCHED_S
        return moment - operation.finished_at > UNFETCHED_S

    def _is_needed(self, operation: Operation) -> bool:
        if operation.kind == SAMPLE:
            return False
        return operation.seq > self._registry.models[operation.owner_id].saved_seq

    async def _forget(self, operations: list[Operation]) -> None:
        if not operations:
            return
        for operation in operations:
            self._registry.forget_operation(operation)
        await self._service.keep(forget([operation.request_id for operation in operations]))
        for operation in operations:
            for blob in (operation.payload, operation.result):
                if blob is not None:
                    self._service.journal.segments.release(blob)

    def _over(self, moment: datetime) -> list[Sampler]:
        return [
            sampler
            for sampler in list(self._registry.samplers.values())
            if self._is_over(self._registry.sessions[sampler.session_id], moment)
        ]

    def outdated(self, moment: datetime) -> list[Sampler]:
        """Snapshots that a loop made and has left behind: one a step would fill the disk."""
        of_models: dict[str, list[Sampler]] = {}
        for sampler in list(self._registry.samplers.values()):  # in the order in which they were made
            if sampler.model_id is not None and not self._is_over(self._registry.sessions[sampler.session_id], moment):
                of_models.setdefault(sampler.model_id, []).append(sampler)
        older = [sampler for made in of_models.values() for sampler in made[:-SNAPSHOTS]]
        return [sampler for sampler in older if _age(sampler.used_at, moment) > SNAPSHOT_S]

    def _is_over(self, session: Session, moment: datetime) -> bool:
        age = _age(session.seen_at, moment)
        return age > DEAD_S or (session.finished is not None and age > OVER_S)

    async def _drop(self, sampler: Sampler) -> None:
        del self._registry.samplers[sampler.id]
        await self._service.keep(remove_record(sampler))
        self._service.queue.add_chore(lambda: self._service.runner.drop_sampler(sampler.id))
        if sampler.directory is not None:
            await self._remove_unused(sampler.directory)

    def _put_away(self, session: Session) -> None:
        for model_id in self._service.runner.keeper.held:
            if self._registry.models[model_id].session_id == session.id and self._service.queue.is_empty(model_id):
                self._service.queue.add_chore(lambda model_id=model_id: self._service.runner.put_away(model_id))


def remove_leftovers(root: Path, registry: Registry) -> None:
    """Directories that no record names: what a killed process had begun, or had not yet removed. Before anything runs."""
    records = [*registry.checkpoints.values(), *registry.samplers.values()]
    states = [record.directory for record in records] + [model.saved_state for model in registry.models.values()]
    named = {str(Path(state).parent) for state in states if state is not None}
    for folder in entries(root / "models"):
        model = root / "models" / folder
        inner = [model / kind / name for kind in (*KINDS, "snapshots") for name in entries(model / kind)]
        for path in [*inner, *(model / name for name in entries(model) if name.startswith("auto-"))]:
            if str(path.relative_to(root)) not in named:
                remove(path)


def _age(iso: str, moment: datetime) -> float:
    return (moment - datetime.fromisoformat(iso)).total_seconds()
