"""What must outlive a kill: one SQLite database, and the payload files beside it. Changes enter; a future says when they are
durable.

One thread writes. It takes all changes that wait, appends their payloads, fsyncs these once and commits one transaction (WAL,
synchronous=FULL): sixteen clients that submit at the same time pay for one fsync, not for sixteen.
"""

from __future__ import annotations

import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentlightning.checkpoint.files import make_directory
from agentlightning.errors import CheckpointError
from agentlightning.tinker.server.records import Blob, Checkpoint, Model, Operation, Record, Sampler, Session, document
from agentlightning.tinker.server.segments import Segments

SCHEMA = 1
_TABLES = {record.table: record for record in (Session, Model, Sampler, Checkpoint)}
Change = Callable[[sqlite3.Connection], object]


@dataclass(slots=True)
class Loaded:
    """All that an earlier process left."""

    records: list[Record] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass(slots=True)
class _Write:
    changes: Sequence[Change]
    blobs: Sequence[Blob]
    durable: Future[None]


def put(record: Record) -> Change:
    """Insert or replace; the record as it is now."""
    text = json.dumps(document(record))
    sql = f"INSERT INTO {record.table} (id, document) VALUES (?, ?) ON CONFLICT(id) DO UPDATE SET document = excluded.document"
    return lambda connection: connection.execute(sql, (record.id, text))


def remove(record: Record) -> Change:
    """Delete."""
    return lambda connection: connection.execute(f"DELETE FROM {record.table} WHERE id = ?", (record.id,))


def accept(operation: Operation) -> Change:
    """An operation that is acknowledged once this is durable."""
    columns = ("request_id", "owner_id", "owner", "seq", "kind", "payload", "payload_digest")

    def change(connection: sqlite3.Connection) -> None:
        values = (
            operation.request_id,
            operation.owner_id,
            operation.owner,
            operation.seq,
            operation.kind,
            _place(operation.payload),
            operation.payload_digest,
        )
        connection.execute(f"INSERT INTO operations ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", values)

    return change


def finish(operation: Operation, result_type: str, result: Blob, finished_at: float) -> Change:
    """Its result."""
    sql = "UPDATE operations SET result_type = ?, result = ?, finished_at = ? WHERE request_id = ?"
    return lambda connection: connection.execute(sql, (result_type, _place(result), finished_at, operation.request_id))


def drop_payload(request_ids: Sequence[str]) -> Change:
    """What nobody will run again."""
    sql = "UPDATE operations SET payload = NULL WHERE request_id = ?"
    return lambda connection: connection.executemany(sql, [(request_id,) for request_id in request_ids])


def forget(request_ids: Sequence[str]) -> Change:
    """Operations that nobody will ask for again."""
    sql = "DELETE FROM operations WHERE request_id = ?"
    return lambda connection: connection.executemany(sql, [(request_id,) for request_id in request_ids])


def _place(blob: Blob | None) -> str | None:
    return None if blob is None else json.dumps([blob.segment, blob.offset, blob.size, blob.digest])


def _blob(chain: Any, place: str | None) -> Blob | None:
    return None if place is None else Blob(chain, None, *json.loads(place))


class Journal:
    """Below `root`: `service.db` and `journal/`. CheckpointError if another version wrote them."""

    def __init__(self, root: Path) -> None:
        make_directory(root)
        self._path = root / "service.db"
        os.close(
            os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )  # the keys' hashes are nobody else's business
        connection = self._connect()
        try:
            _create_tables(connection)
            self.loaded = _load(connection)
            self.secrets = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        finally:
            connection.close()
        blobs = [blob for op in self.loaded.operations for blob in (op.payload, op.result) if blob is not None]
        self.segments = Segments(root / "journal", blobs)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def write(self, *changes: Change, blobs: Sequence[Blob] = ()) -> Future[None]:
        """All of the changes or none, behind those before. The future raises OSError or sqlite3.Error if it cannot."""
        work = _Write(changes, blobs, Future())
        self._queue.put(work)
        return work.durable

    def remember(self, name: str, value: str) -> None:
        """A value of the service itself; returns when it is durable."""
        sql = "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value"
        self.write(lambda connection: connection.execute(sql, (name, value))).result()
        self.secrets[name] = value

    def _run(self) -> None:
        connection = self._connect()
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while not self._queue.empty():
                work = self._queue.get()
                if work is None:
                    last = True
                    break
                batch.append(work)
            self._commit(connection, batch)
            if last:
                break
        connection.close()

    def _commit(self, connection: sqlite3.Connection, batch: Sequence[_Write]) -> None:
        try:
            for work in batch:
                for blob in work.blobs:
                    self.segments.append(blob)
            self.segments.sync()
            connection.execute("BEGIN IMMEDIATE")
            for work in batch:
                for change in work.changes:
                    change(connection)
            connection.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for work in batch:
                work.durable.set_exception(error)
            return
        for work in batch:
            for blob in work.blobs:
                self.segments.keep(blob)
                blob.data = None  # read back from the page cache
            work.durable.set_result(None)

    def close(self) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join()
        self.segments.close()


def _create_tables(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA):
        raise CheckpointError(
            f"the database has schema {version}, expected {SCHEMA}: give another --root, or the version that made it"
        )
    for table in _TABLES:
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} (id TEXT PRIMARY KEY, document TEXT NOT NULL)")
    connection.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS operations (request_id TEXT PRIMARY KEY, owner_id TEXT NOT NULL, owner TEXT NOT NULL, "
        "seq INTEGER NOT NULL, kind TEXT NOT NULL, payload TEXT, payload_digest TEXT NOT NULL, result_type TEXT, result TEXT, "
        "finished_at REAL NOT NULL DEFAULT 0, UNIQUE (owner_id, seq))"
    )
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


def _load(connection: sqlite3.Connection) -> Loaded:
    loaded = Loaded()
    for table, kind in _TABLES.items():
        for (text,) in connection.execute(f"SELECT document FROM {table} ORDER BY rowid"):
            loaded.records.append(kind(**json.loads(text)))
    columns = "request_id, owner_id, owner, seq, kind, payload, payload_digest, result_type, result, finished_at"
    for row in connection.execute(f"SELECT {columns} FROM operations ORDER BY rowid"):
        request_id, owner_id, owner, seq, kind, payload, payload_digest, result_type, result, finished_at = row
        operation = Operation(request_id, owner_id, owner, seq, kind, _blob("requests", payload), payload_digest)
        operation.result_type, operation.result, operation.finished_at = result_type, _blob("results", result), finished_at
        operation.durable.set()
        if result_type is not None:
            operation.done.set()
        loaded.operations.append(operation)
    return loaded
