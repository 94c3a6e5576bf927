"""Which row stands at which position of the endless stream of prompts.

A seed and positions go in, row numbers come out: a pure function in constant memory, so that a resumed run needs the number of
its next position and nothing else. Rows lie in blocks (a row group of a parquet file, a stretch of another). A shuffle mixes
all rows, unless the blocks that must be held in memory to be read are too large to be held together: then it mixes them bucket
by bucket, each bucket being as many blocks, drawn from everywhere, as may be held.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

_ROUNDS = 64
_LONGEST_PERIOD = 4096  # positions after which a mixture's schedule begins again


class Order(Protocol):
    """Positions to rows."""

    def rows(self, position_N: np.ndarray) -> np.ndarray:
        """int64 [N]: the row at each position."""
        ...

    def another(self, position: int, attempt: int) -> int:
        """A row to stand in for the one at `position` where that cannot be used; `attempt` counts from 1."""
        ...


def permute(index_N: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a random permutation of 0..size-1, chosen by `key`, sends each index (int64 [N]).

    The swap-or-not shuffle (Hoang, Morris and Rogaway, arXiv:1208.1176): in each round x meets the partner K - x (mod size),
    and one random bit, the same for both, says whether they change places. It is a bijection at every size, with no table and
    no cycle to walk. Bits and round keys are words of Philox and of the finalizer of SplitMix64 (Steele, Lea and Flood, 2014),
    which stay the same for ever.
    """
    offset_R, key_R = _round_keys(key)
    place_N = index_N.astype(np.uint64)
    for offset, word in zip(offset_R % np.uint64(size), key_R, strict=True):
        partner_N = (offset + np.uint64(size) - place_N) % np.uint64(size)
        swaps_N = _mix(np.maximum(place_N, partner_N) + word) >> np.uint64(63)
        place_N = np.where(swaps_N.astype(bool), partner_N, place_N)
    return place_N.astype(np.int64)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    words = np.random.Philox(key=np.frombuffer(_digest(*key), dtype="<u8")).random_raw(2 * _ROUNDS)
    return words[:_ROUNDS], words[_ROUNDS:]


def _mix(word_N: np.ndarray) -> np.ndarray:
    word_N = (word_N ^ (word_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word_N = (word_N ^ (word_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word_N ^ (word_N >> np.uint64(31))


def _digest(*key: int) -> bytes:
    return hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()


def _draw(size: int, *key: int) -> int:
    """A number in 0..size-1, chosen by `key`."""
    return int.from_bytes(_digest(*key), "little") % size


class RowSet:
    """Some of the rows of the files, in their order and by the block they lie in.

    `edge_K1` are the first rows of the K blocks, and behind them the number of all rows; `memory_K` the bytes that reading from
    a block holds. With `code_R`, the source of each of the R rows, the set holds the rows of one source, else all.
    """

    def __init__(self, edge_K1: np.ndarray, memory_K: np.ndarray, code_R: np.ndarray | None = None, code: int = 0) -> None:
        self._edge_K1, self._code_R, self._code = edge_K1, code_R, code
        blocks = itertools.pairwise(edge_K1.tolist())
        counts = [stop - start if code_R is None else np.count_nonzero(code_R[start:stop] == code) for start, stop in blocks]
        self.count_K = np.array(counts, dtype=np.int64)
        self.memory_K = memory_K

    def __len__(self) -> int:
        return int(self.count_K.sum())

    def row(self, block: int, place: int) -> int:
        """The row at a place (from 0) among the set's rows in a block."""
        start, stop = self._edge_K1[block], self._edge_K1[block + 1]
        if self._code_R is None:
            return int(start + place)
        return int(start + np.flatnonzero(self._code_R[start:stop] == self._code)[place])


@dataclass(frozen=True, slots=True)
class _Buckets:
    """An epoch's blocks in the order they are gone through; the rows of a bucket are mixed."""

    blocks: Sequence[np.ndarray]  # of each bucket, ascending
    first_B1: np.ndarray  # the index in the epoch at which a bucket begins, and behind them the epoch's length


class EpochOrder:
    """Epoch after epoch over a set of rows, shuffled or in the files' order.

    `length` positions make an epoch (None: all rows); a shorter one leaves out the end of its order. `memory` bounds the bytes
    of a bucket's blocks; a larger block is a bucket of its own. `stream` tells the orders of one seed apart.
    """

    def __init__(
        self, rows: RowSet, *, shuffle: bool, seed: int, length: int | None = None, memory: int = 1 << 60, stream: int = 0
    ) -> None:
        self._set, self._shuffle, self._seed, self._memory, self._stream = rows, shuffle, seed, memory, stream
        self._length = len(rows) if length is None else length
        self._buckets = lru_cache(maxsize=2)(self._buckets_of)

    def rows(self, position_N: np.ndarray) -> np.ndarray:
        """int64 [N]: the row at each position."""
        row_N = np.empty(len(position_N), dtype=np.int64)
        epoch_N, index_N = np.divmod(position_N, self._length)
        for epoch in np.unique(epoch_N).tolist():
            first_B1 = self._buckets(epoch).first_B1
            bucket_N = np.where(epoch_N == epoch, np.searchsorted(first_B1, index_N, side="right") - 1, -1)
            for bucket in np.unique(bucket_N[bucket_N >= 0]).tolist():
                here_N = bucket_N == bucket
                row_N[here_N] = self._rows_of_bucket(epoch, bucket, index_N[here_N] - first_B1[bucket])
        return row_N

    def another(self, position: int, attempt: int) -> int:
        """A row of the same bucket, drawn from (seed, position, attempt)."""
        epoch, index = divmod(position, self._length)
        buckets = self._buckets(epoch)
        bucket = int(np.searchsorted(buckets.first_B1, index, side="right")) - 1
        size = int(buckets.first_B1[bucket + 1] - buckets.first_B1[bucket])
        place = _draw(size, self._seed, self._stream, position, attempt)
        return int(self._rows_in_file_order(buckets.blocks[bucket], np.array([place]))[0])

    def _rows_of_bucket(self, epoch: int, bucket: int, index_N: np.ndarray) -> np.ndarray:
        buckets = self._buckets(epoch)
        if self._shuffle:
            size = int(buckets.first_B1[bucket + 1] - buckets.first_B1[bucket])
            index_N = permute(index_N, size, self._seed, self._stream, epoch, bucket)
        return self._rows_in_file_order(buckets.blocks[bucket], index_N)

    def _rows_in_file_order(self, blocks: np.ndarray, index_N: np.ndarray) -> np.ndarray:
        behind_K = np.cumsum(self._set.count_K[blocks])
        block_N = np.searchsorted(behind_K, index_N, side="right")
        place_N = index_N - (behind_K - self._set.count_K[blocks])[block_N]
        return np.array([self._set.row(*pair) for pair in zip(blocks[block_N], place_N, strict=True)], dtype=np.int64)

    def _buckets_of(self, epoch: int) -> _Buckets:
        blocks = np.flatnonzero(self._set.count_K)
        cuts = [0]
        if self._shuffle and self._set.memory_K[blocks].sum() > self._memory:
            blocks = blocks[permute(np.arange(len(blocks)), len(blocks), self._seed, self._stream, epoch, -1)]
            held = 0
            for i, memory in enumerate(self._set.memory_K[blocks].tolist()):
                if held + memory > self._memory and i > cuts[-1]:
                    cuts.append(i)
                    held = 0
                held += memory
        buckets = [np.sort(part) for part in np.split(blocks, cuts[1:])]
        sizes = [int(self._set.count_K[part].sum()) for part in buckets]
        return _Buckets(buckets, np.concatenate([[0], np.cumsum(sizes)]))


class MixtureOrder:
    """Several orders, one for each source, in the proportion of `weights`; each source goes through its own epochs.

    The schedule of sources repeats after at most 4,096 positions, in which each source has its share, rounded by largest
    remainder where no such number of positions holds the exact shares. Any N positions in a row hold a source N times its share
    times, give or take less than two. `count_S` (int64) is how often each source stands in a period.
    """

    def __init__(self, orders: Sequence[EpochOrder], weights: Sequence[float]) -> None:
        self._orders = orders
        self.count_S = shares(weights)
        self._source_P = fair_schedule(self.count_S)
        is_source_SP = self._source_P == np.arange(len(orders))[:, None]
        self._before_P = (np.cumsum(is_source_SP, axis=1) - 1)[self._source_P, np.arange(len(self._source_P))]

    def rows(self, position_N: np.ndarray) -> np.ndarray:
        """int64 [N]: the row at each position."""
        source_N, own_N = self._own_positions(position_N)
        row_N = np.empty(len(position_N), dtype=np.int64)
        for source, order in enumerate(self._orders):
            row_N[source_N == source] = order.rows(own_N[source_N == source])
        return row_N

    def another(self, position: int, attempt: int) -> int:
        """A row of the same source."""
        source_N, own_N = self._own_positions(np.array([position]))
        return self._orders[int(source_N[0])].another(int(own_N[0]), attempt)

    def _own_positions(self, position_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each position, and the position in that source's own stream."""
        period_N, place_N = np.divmod(position_N, len(self._source_P))
        source_N = self._source_P[place_N]
        return source_N, period_N * self.count_S[source_N] + self._before_P[place_N]


def shares(weights: Sequence[float]) -> np.ndarray:
    """int64 [S]: how often each source stands in a period. The shortest period that is exact, else the longest allowed."""
    weight_S = np.asarray(weights, dtype=np.float64)
    weight_S = weight_S / weight_S.sum()
    for period in range(1, _LONGEST_PERIOD + 1):
        exact_S = weight_S * period
        if np.abs(exact_S - exact_S.round()).max() < 1e-9 * period:
            return exact_S.round().astype(np.int64)
    exact_S = weight_S * _LONGEST_PERIOD
    count_S = np.floor(exact_S).astype(np.int64)
    largest = np.argsort(count_S - exact_S, kind="stable")[: _LONGEST_PERIOD - count_S.sum()]
    count_S[largest] += 1
    return count_S


def fair_schedule(count_S: np.ndarray) -> np.ndarray:
    """int64 [P]: sources 0..S-1, each `count_S` times and never a whole turn ahead of or behind its share.

    Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): of the sources that are due, the one whose
    deadline is next. In whole numbers, scaled by P (2S - 2).
    """
    sources, period = len(count_S), int(count_S.sum())
    scale = max(2 * sources - 2, 1)
    schedule_P = np.zeros(period, dtype=np.int64)
    given_S = np.zeros(sources, dtype=np.int64)
    for place in range(period):
        owed_S = (count_S * (place + 1) - given_S * period) * scale
        deadline_S = (period * (scale - 1) - owed_S) / np.maximum(count_S, 1)
        due_S = (owed_S >= period) & (count_S > 0)
        chosen = int(np.argmin(np.where(due_S, deadline_S, np.inf)))
        schedule_P[place] = chosen
        given_S[chosen] += 1
    return schedule_P


class SamplerOrder:
    """The rows that a function of (seed, position, rows) names."""

    def __init__(self, sampler: Callable[[int, int, int], int], rows: int, seed: int) -> None:
        self._sampler, self._rows, self._seed = sampler, rows, seed

    def rows(self, position_N: np.ndarray) -> np.ndarray:
        """int64 [N]: the row at each position."""
        return np.array([self._sampler(self._seed, p, self._rows) for p in position_N.tolist()], dtype=np.int64)

    def another(self, position: int, attempt: int) -> int:
        """Any row, drawn from (seed, position, attempt)."""
        return _draw(self._rows, self._seed, 0, position, attempt)
