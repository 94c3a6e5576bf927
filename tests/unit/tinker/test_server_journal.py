"""Payload files and the database: what was said to be durable is there, what nobody needs is gone, damage is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentlightning.errors import CheckpointError
from agentlightning.tinker.server.journal import Journal, accept, drop_payload, finish, forget, put, remove
from agentlightning.tinker.server.records import Blob, Operation, Session
from agentlightning.tinker.server.segments import Segments
from agentlightning.tinker.server.work_queue import Sample, Train, WorkQueue


def operation(seq: int, kind: str = "optim_step", owner: str = "m") -> Operation:
    return Operation(f"op-{owner}-{seq}", owner, "me", seq, kind, Blob("requests", b"payload %d" % seq), "digest")


def test_what_was_written_is_there_after_a_restart(tmp_path: Path):
    journal = Journal(tmp_path)
    session = Session("s", "me", "2026-01-01T00:00:00+00:00", {"a": 1}, [])
    first, second, third = operation(1), operation(2), operation(3)
    for one in (first, second, third):
        journal.write(put(session), accept(one), blobs=[one.payload] if one.payload else ()).result()
    result = Blob("results", b"the result")
    journal.write(finish(first, "json", result, 7.0), drop_payload([first.request_id]), blobs=[result]).result()
    session.display_name = "new"
    journal.write(put(session), forget([third.request_id])).result()
    journal.remember("name", "value")
    journal.close()

    again = Journal(tmp_path)
    assert again.secrets == {"name": "value"}
    assert again.loaded.records == [session]
    done, waits = again.loaded.operations
    assert (done.result_type, done.finished_at, done.payload) == ("json", 7.0, None)
    assert done.result is not None
    assert again.segments.read(done.result) == b"the result"
    assert waits.result_type is None
    assert waits.payload is not None
    assert again.segments.read(waits.payload) == b"payload 2"
    again.write(remove(session)).result()
    again.close()
    last = Journal(tmp_path)
    assert last.loaded.records == []
    last.close()


def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write(accept(one := operation(1)), blobs=[one.payload] if one.payload else ()).result()
    again = operation(1)
    with pytest.raises(Exception, match="UNIQUE"):
        journal.write(put(Session("s", "me", "", {}, [])), accept(again)).result()
    journal.write(accept(operation(2))).result()
    journal.close()
    loaded = Journal(tmp_path)
    assert [op.seq for op in loaded.loaded.operations] == [1, 2]
    assert loaded.loaded.records == []
    loaded.close()


def test_another_versions_database_is_refused(tmp_path: Path):
    Journal(tmp_path).close()
    import sqlite3

    with sqlite3.connect(tmp_path / "service.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(CheckpointError, match="schema 99"):
        Journal(tmp_path)


def test_a_payload_file_goes_with_its_last_reader(tmp_path: Path):
    segments = Segments(tmp_path, [], segment_bytes=10)
    blobs = [Blob("requests", b"12345678"), Blob("requests", b"abc"), Blob("requests", b"next file")]
    for blob in blobs:
        segments.append(blob)
        segments.keep(blob)
        segments.sync()
        blob.data = None
    assert [blob.segment for blob in blobs] == [1, 1, 2]
    assert segments.read(blobs[1]) == b"abc"
    segments.release(blobs[0])
    assert len(list(tmp_path.iterdir())) == 2
    segments.release(blobs[1])
    assert [path.name for path in tmp_path.iterdir()] == ["requests-00000002.seg"]
    segments.release(blobs[2])  # it is being appended to
    assert len(list(tmp_path.iterdir())) == 1
    segments.close()
    Segments(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_samplers_and_models_take_turns():
    queue = WorkQueue()
    queue.open_line("m", 1)
    for seq in (2, 1):
        queue.add(operation(seq))
    for seq in range(300):
        queue.add(operation(seq, "sample", "greedy"))
    queue.add(operation(0, "sample", "modest"))
    first = queue.next(1)
    assert isinstance(first, Train)
    assert first.operation.seq == 1
    samples = queue.next(1)
    assert isinstance(samples, Sample)
    assert len(samples.operations) == 256
    assert [op.owner_id for op in samples.operations[:3]] == ["greedy", "modest", "greedy"]
    queue.advance("m")
    second = queue.next(1)
    assert isinstance(second, Train)
    assert second.operation.seq == 2
    queue.advance("m")
    assert queue.next_seq("m") == 3
    queue.close()
    assert queue.next(1) is None


def test_a_reproducible_service_samples_one_request_at_a_time():
    queue = WorkQueue(max_batch=1)
    for seq in range(2):
        queue.add(operation(seq, "sample", "s"))
    for _ in range(2):
        samples = queue.next(1)
        assert isinstance(samples, Sample)
        assert len(samples.operations) == 1
