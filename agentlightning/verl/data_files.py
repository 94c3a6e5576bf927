"""What `data.train_files` and `data.val_files` name, as one list of rows.

Names go in (files, patterns such as data/*.parquet, directories, in any mixture); `RowFiles` leaves: the rows of all files,
one after the other, any of which can be read by its number. A row's number, counted over all files, is what a prompt's uid is
made of.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from agentlightning.errors import DataError
from agentlightning.verl.data_formats import ArrowRows, GroupCache, JsonLines, ParquetRows, RowFile
from agentlightning.verl.data_rows import EXPECTED_ROW, Row

GROUP_MEMORY = 1 << 29  # bytes of parquet row groups that are held; a larger file is shuffled bucket by bucket
_KINDS = (".jsonl", ".parquet", ".arrow")
_HELD_OUT = {"test", "val", "valid", "validation", "dev", "eval"}
_HEADS = 8  # files whose first rows are looked at when the run starts
_MOST_SOURCES = 1 << 16


def open_files(files: str | Sequence[str], key: str, limit: int | None = None) -> RowFiles:
    """The rows of `files`, in their order, the first `limit` of them. `key` is the override that named them.

    Raises `DataError` if a name leads nowhere or there is no row.
    """
    names = [files] if isinstance(files, str) else list(files)
    cache = GroupCache(GROUP_MEMORY)
    opened: list[RowFile] = []
    rows = 0
    for path in (path for name in names for path in _paths(name, key)):
        if limit is not None and rows >= limit:
            break
        opened.append(_open(path, key, cache, None if limit is None else limit - rows))
        rows += len(opened[-1])
    if not rows:
        raise DataError(f"{key}: {', '.join(names)} holds no row; expected rows like {EXPECTED_ROW}; mend it with {key}=<file>")
    return RowFiles(opened, cache, rows if limit is None else min(rows, limit))


def _open(path: Path, key: str, cache: GroupCache, limit: int | None) -> RowFile:
    if path.suffix == ".jsonl":
        return JsonLines(path, key, limit)
    if path.suffix == ".parquet":
        return ParquetRows(path, key, cache)
    if path.suffix == ".arrow":
        return ArrowRows(path, key)
    raise DataError(
        f"{key}: {path} ends with {path.suffix!r}; expected .jsonl or .parquet, or a directory that `datasets` saved; "
        f"mend it with {key}=<file>"
    )


def _paths(name: str, key: str) -> list[Path]:
    """The files that a name stands for; those of a pattern or a directory by name."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _paths_in(path, key)
    if path.is_file():
        return [path]
    found = [Path(file) for file in sorted(glob.glob(str(path)))] if glob.has_magic(name) else []
    if not found:
        raise DataError(
            f"{key}: {name} is not there; expected a .jsonl or .parquet file, a pattern such as data/*.parquet, "
            f"or a directory of them; mend it with {key}=<file>"
        )
    return found


def _paths_in(directory: Path, key: str) -> list[Path]:
    if (directory / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in directory.glob("*/state.json"))
        raise DataError(
            f"{key}: {directory} holds the splits {', '.join(splits) or 'of a dataset, but none is there'}; expected one "
            f"of them; mend it with {key}={directory / (splits[0] if splits else '<split>')}"
        )
    if (directory / "state.json").is_file():
        return _saved_dataset(directory, key)
    paths = sorted(path for path in directory.iterdir() if path.suffix in _KINDS and path.is_file())
    if not paths:
        raise DataError(
            f"{key}: the directory {directory} holds no .jsonl or .parquet file and no saved dataset; mend it with {key}=<file>"
        )
    words = {re.split(r"[-_.]", path.name)[0] for path in paths}
    if "train" in words and words & _HELD_OUT:
        raise DataError(
            f"{key}: the directory {directory} holds several splits ({', '.join(sorted(words))}); expected the files of one; "
            f"mend it with '{key}={directory}/train*'"
        )
    return paths


def _saved_dataset(directory: Path, key: str) -> list[Path]:
    """The arrow files of what `Dataset.save_to_disk` wrote, in their order."""
    state_file = directory / "state.json"
    try:
        names = [str(entry["filename"]) for entry in json.loads(state_file.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{key}: {state_file} is not the state of a saved dataset ({type(error).__name__}: {error}); "
            f"mend it with {key}=<file>"
        ) from error
    for name in names:
        if name != Path(name).name or not (directory / name).is_file():
            raise DataError(f"{key}: {state_file} names {name!r}, which is no file in {directory}; mend it with {key}=<file>")
    return [directory / name for name in names]


class RowFiles:
    """The rows of several files as one list, the first `rows` of them."""

    def __init__(self, files: Sequence[RowFile], cache: GroupCache, rows: int) -> None:
        self._files, self._cache, self._rows = files, cache, rows
        self._edge_F1 = np.concatenate([[0], np.cumsum([len(file) for file in files], dtype=np.int64)])

    def __len__(self) -> int:
        return self._rows

    def row(self, number: int) -> Row:
        """The row with a number, from 0. Raises `DataError` if it cannot be read."""
        file = int(np.searchsorted(self._edge_F1, number, side="right")) - 1
        first = number - int(self._edge_F1[file])
        return self._files[file].rows(first, first + 1)[0]

    def all_rows(self) -> list[Row]:
        """Every row, held at once."""
        rows: list[Row] = []
        for file in self._files:
            rows += file.rows(0, min(len(file), self._rows - len(rows)))
        return rows

    def heads(self, count: int) -> dict[int, Row]:
        """By number, the first `count` rows of up to eight files, which lie evenly among all."""
        heads: dict[int, Row] = {}
        for file in range(0, len(self._files), -(-len(self._files) // _HEADS)):
            first = int(self._edge_F1[file])
            rows = self._files[file].rows(0, min(count, len(self._files[file]), self._rows - first))
            heads |= dict(enumerate(rows, start=first))
        return heads

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [K + 1] and [K]: the first row of each block and behind them the number of rows; bytes a block holds."""
        blocks = [block for file in self._files for block in file.blocks()]
        edge_K1 = np.concatenate([[0], np.cumsum([rows for rows, _ in blocks], dtype=np.int64)])
        used = edge_K1[:-1] < self._rows
        edges = np.append(edge_K1[:-1][used], self._rows)
        return edges, np.array([memory for _, memory in blocks], dtype=np.int64)[used]

    def hold(self, streams: int) -> int:
        """Let `streams` orders go through the files side by side. Returns the bytes that each may hold."""
        largest = int(self.blocks()[1].max(initial=0))
        self._cache.limit = max(GROUP_MEMORY, streams * largest)
        return GROUP_MEMORY // streams

    def sources(self, column: str) -> tuple[list[str], np.ndarray]:
        """The texts of a column, and uint16 [rows]: which of them each row has. One pass over the files.

        Of parquet and arrow the column alone is read; jsonl is parsed whole, 10 million short rows in about ten seconds.
        """
        names: dict[str, int] = {}
        code_R = np.zeros(self._rows, dtype=np.uint16)
        done = 0
        for array in (array for file in self._files for array in file.column(column)):
            code_N = _codes(array, names)[: self._rows - done]
            if len(names) > _MOST_SOURCES:
                raise DataError(
                    f"column {column!r} has more than {_MOST_SOURCES} different values, too many for data.mixture; "
                    f"mend it with data.reward_fn_key=<another column>"
                )
            code_R[done : done + len(code_N)] = code_N
            done += len(code_N)
        return list(names), code_R

    def digests(self) -> list[str]:
        """Of each file's content, whatever the file is called. From here on a file that changes is refused."""
        return [file.digest().hex() for file in self._files]


def _codes(array: pa.Array, names: dict[str, int]) -> np.ndarray:
    """int64 [N]: the place in `names` of each value's text; texts that are new are added."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    encoded = array.dictionary_encode(null_encoding="encode")
    own = [names.setdefault(str(value), len(names)) for value in encoded.dictionary.to_pylist()]
    return np.array(own, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
