"""Rows of one file by their number: jsonl, parquet, and the arrow files of a saved dataset.

A path goes in; an object that reads any stretch of rows leaves, in memory that does not grow with the file. jsonl: one pass
finds every 16th row's place, and a row is then one small read. Arrow: the file is mapped into memory. Parquet can only be read
by whole row groups; a cache of bounded size, shared by all files, holds the groups in use.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from agentlightning.errors import DataError
from agentlightning.verl.data_rows import EXPECTED_ROW, Row, column_of, no_column

_EVERY = 16  # rows between two places of the index of a jsonl file
_CHUNK = 1 << 24  # bytes
_PARSED = 1 << 22  # bytes that pyarrow parses at a time
_BLOCK = 1 << 16  # rows of what can be read row by row
_HASHED_WHOLE = 1 << 33  # bytes of a file above which its digest takes samples
_SAMPLES, _SAMPLE = 4096, 1 << 16
_REWARD_FN_KEY = "data.reward_fn_key"


class RowFile(ABC):
    """A file of rows. `key` is the override that named it, for messages."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._stamp: tuple[int, int] | None = None
        self._digest = b""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, start: int, stop: int) -> list[Row]:
        """The rows start <= i < stop. Raises `DataError` if one cannot be read."""

    @abstractmethod
    def blocks(self) -> list[tuple[int, int]]:
        """The file as blocks: rows of each, and the bytes that reading from it holds in memory."""

    @abstractmethod
    def column(self, name: str) -> Iterator[pa.Array]:
        """One column as text, in one pass over the file."""

    def digest(self) -> bytes:
        """A digest of the content, and the promise that `check_unchanged` keeps from here on."""
        self._stamp = _stamp(self.path)
        self._digest = content_digest(self.path)
        return self._digest

    def check_unchanged(self) -> None:
        """Raise `DataError` if the content is not what `digest` saw. Costs a stat, as long as nobody touches the file."""
        if self._stamp is None or _stamp(self.path) == self._stamp:
            return
        if content_digest(self.path) != self._digest:
            raise DataError(
                f"{self.path} has changed while the run was reading it; expected files that stay as they are; "
                f"put it back and start the same command again, or set {self.key}=<another file>"
            )
        self._stamp = _stamp(self.path)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def content_digest(path: Path) -> bytes:
    """xxh3 of the file's bytes, at the speed of the disk; above 8 GiB of its size and of 4,096 samples of 64 KiB."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb", buffering=0) as file:
        if size <= _HASHED_WHOLE:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        else:
            for place in np.linspace(0, size - _SAMPLE, _SAMPLES, dtype=np.int64).tolist():
                digest.update(os.pread(file.fileno(), _SAMPLE, place))
    return digest.digest()


def _even_blocks(rows: int) -> list[tuple[int, int]]:
    return [(min(_BLOCK, rows - start), 0) for start in range(0, rows, _BLOCK)]


class JsonLines(RowFile):
    """One JSON object a line; lines of nothing but space are no rows. With `limit`, only that many rows are looked for."""

    def __init__(self, path: Path, key: str, limit: int | None = None) -> None:
        super().__init__(path, key)
        anchors: list[np.ndarray] = []
        self._rows, self._end, lines = 0, 0, 0
        for text in _whole_lines(path):
            offset_N, line_N = _rows_of_text(text)
            chosen = slice(-self._rows % _EVERY, None, _EVERY)
            anchors.append(np.stack([offset_N[chosen] + self._end, line_N[chosen] + lines], axis=1))
            self._rows += len(offset_N)
            self._end += len(text)
            lines += text.count(b"\n")
            if limit is not None and self._rows >= limit:
                break
        self._anchor_A2 = np.concatenate(anchors) if anchors else np.zeros((0, 2), dtype=np.int64)  # (offset, line from 0)

    def __len__(self) -> int:
        return self._rows

    def rows(self, start: int, stop: int) -> list[Row]:
        """The rows start <= i < stop."""
        if start >= stop:
            return []
        self.check_unchanged()
        first, behind = start // _EVERY, -(-stop // _EVERY)
        offset, line = self._anchor_A2[first].tolist()
        end = int(self._anchor_A2[behind, 0]) if behind < len(self._anchor_A2) else self._end
        with self.path.open("rb", buffering=0) as file:
            text = os.pread(file.fileno(), end - offset, offset)
        numbered = [(number, line) for number, line in enumerate(text.split(b"\n"), start=line + 1) if line.strip()]
        skipped = start - first * _EVERY
        return [_parse(self.path, number, line) for number, line in numbered[skipped : skipped + stop - start]]

    def blocks(self) -> list[tuple[int, int]]:
        """Stretches of 65,536 rows, none of which is held."""
        return _even_blocks(self._rows)

    def column(self, name: str) -> Iterator[pa.Array]:
        """pyarrow's parser as far as it gets; from a batch that is not as it should be on, Python's, which names the row."""
        done = 0
        for array in self._column_by_arrow(name):
            done += len(array)
            yield array
        if done < self._rows:
            yield from self._column_by_python(name, done)

    def _column_by_arrow(self, name: str) -> Iterator[pa.Array]:
        """The column in batches, up to the first that holds something else than text."""
        import pyarrow.json

        try:
            reader = pyarrow.json.open_json(
                self.path,
                read_options=pyarrow.json.ReadOptions(block_size=_PARSED),
                parse_options=pyarrow.json.ParseOptions(
                    explicit_schema=pa.schema([(name, pa.string())]), unexpected_field_behavior="ignore"
                ),
            )
            for batch in reader:
                if batch.column(0).null_count:
                    return
                yield batch.column(0)
        except pa.ArrowException:
            return

    def _column_by_python(self, name: str, first: int) -> Iterator[pa.Array]:
        for start in range(first, self._rows, _BLOCK):
            rows = self.rows(start, min(start + _BLOCK, self._rows))
            yield pa.array([str(column_of(row, name, _REWARD_FN_KEY)) for row in rows])


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The file in pieces that end where a line ends."""
    rest = b""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            text = rest + chunk
            end = text.rfind(b"\n") + 1
            rest = text[end:]
            if end:
                yield text[:end]
    if rest:
        yield rest


def _rows_of_text(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] each: where the rows of whole lines begin, and their lines' numbers, both from 0."""
    byte_C = np.frombuffer(text, dtype=np.uint8)
    end_L = np.flatnonzero(byte_C == ord("\n"))
    if not text.endswith(b"\n"):
        end_L = np.append(end_L, len(text))
    start_L = np.concatenate([[0], end_L[:-1] + 1])
    is_row_L = byte_C[start_L] == ord("{")
    for line in np.flatnonzero(~is_row_L).tolist():  # a blank line, or one that will be refused when it is read
        is_row_L[line] = bool(text[start_L[line] : end_L[line]].strip())
    return start_L[is_row_L], np.flatnonzero(is_row_L)


def _parse(path: Path, number: int, line: bytes) -> Row:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise DataError(f"{where}: not JSON ({error}); expected {EXPECTED_ROW}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: a {type(values).__name__}, expected a JSON object like {EXPECTED_ROW}")
    return Row(values, where)


class GroupCache:
    """Row groups of parquet files, the least recently used dropped once those held take more than `limit` bytes.

    Bytes are what parquet says of a group (uncompressed, but encoded): a group of repeated texts takes more once it is read.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[tuple[Path, int], tuple[pa.Table, int]] = OrderedDict()

    def get(self, file: ParquetRows, group: int) -> pa.Table:
        """The row group of the file."""
        name = (file.path, group)
        if name not in self._held:
            memory = file.blocks()[group][1]
            while self._held and sum(size for _, size in self._held.values()) + memory > self.limit:
                self._held.popitem(last=False)
            self._held[name] = (file.read_group(group), memory)
        self._held.move_to_end(name)
        return self._held[name][0]


class ParquetRows(RowFile):
    """A parquet file."""

    def __init__(self, path: Path, key: str, cache: GroupCache) -> None:
        import pyarrow.parquet

        super().__init__(path, key)
        self._cache = cache
        try:
            self._metadata = pyarrow.parquet.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, key, "parquet", error) from error
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self._blocks = [(group.num_rows, group.total_byte_size) for group in groups]
        self._edge_G1 = np.concatenate([[0], np.cumsum([rows for rows, _ in self._blocks], dtype=np.int64)])

    def __len__(self) -> int:
        return self._metadata.num_rows

    def blocks(self) -> list[tuple[int, int]]:
        """The row groups."""
        return self._blocks

    def read_group(self, group: int) -> pa.Table:
        """A row group, past the cache."""
        import pyarrow.parquet

        self.check_unchanged()
        try:
            with pyarrow.parquet.ParquetFile(self.path, metadata=self._metadata) as file:
                return file.read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, self.key, "parquet", error) from error

    def rows(self, start: int, stop: int) -> list[Row]:
        """The rows start <= i < stop."""
        found: list[Row] = []
        while start < stop:
            group = int(np.searchsorted(self._edge_G1, start, side="right")) - 1
            first, behind = self._edge_G1[group : group + 2].tolist()
            count = min(stop, behind) - start
            values = self._cache.get(self, group).slice(start - first, count).to_pylist()
            found += _table_rows(self.path, start, values)
            start += count
        return found

    def column(self, name: str) -> Iterator[pa.Array]:
        """Reads nothing but the column."""
        import pyarrow.parquet

        columns = self._metadata.schema.to_arrow_schema().names
        if name not in columns:
            raise no_column(str(self.path), name, columns, _REWARD_FN_KEY)
        try:
            with pyarrow.parquet.ParquetFile(self.path, metadata=self._metadata) as file:
                for batch in file.iter_batches(batch_size=_BLOCK, columns=[name]):
                    yield batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, self.key, "parquet", error) from error


class ArrowRows(RowFile):
    """A file in arrow's stream format, as `datasets` writes it."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__(path, key)
        try:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
                self._columns = reader.schema.names
                self._batches = [batch for batch in reader if batch.num_rows]
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, key, "arrow", error) from error
        self._edge_B1 = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._edge_B1[-1])

    def rows(self, start: int, stop: int) -> list[Row]:
        """The rows start <= i < stop."""
        self.check_unchanged()
        found: list[Row] = []
        while start < stop:
            batch = int(np.searchsorted(self._edge_B1, start, side="right")) - 1
            first, behind = self._edge_B1[batch : batch + 2].tolist()
            count = min(stop, behind) - start
            found += _table_rows(self.path, start, self._batches[batch].slice(start - first, count).to_pylist())
            start += count
        return found

    def blocks(self) -> list[tuple[int, int]]:
        """Stretches of 65,536 rows, none of which is held."""
        return _even_blocks(len(self))

    def column(self, name: str) -> Iterator[pa.Array]:
        """Touches nothing but the column."""
        if name not in self._columns:
            raise no_column(str(self.path), name, self._columns, _REWARD_FN_KEY)
        for batch in self._batches:
            yield batch.column(name)


def _table_rows(path: Path, start: int, values: list[dict[str, Any]]) -> list[Row]:
    return [Row(row, f"{path}, row {number}") for number, row in enumerate(values, start=start + 1)]


def _unreadable(path: Path, key: str, form: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{key}: {path} cannot be read as {form} ({reason}); mend it with {key}=<file>")
