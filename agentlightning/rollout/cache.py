"""A key-value cache whose rows have lengths of their own.

Enters: the keys and values of the tokens just run. Leaves: each row's whole context. Why not transformers' static cache: there
all rows share one length, so rows that start, stop or read a tool's result at different times need padding in the middle.
Here token i of a row lies in column i, rows can leave and join, and what lies beyond a row's length is masked by the caller.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _RowLayer(CacheLayerMixin):
    """Keys and values [rows, kv heads, columns, head dim] of one layer, grown as needed."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, 0, width)
        self.values = value_states.new_zeros(rows, heads, 0, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states at the cache's `positions_BQ` of its `selected` rows; return those rows' contexts."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(self.cache.width)
        assert self.keys is not None
        assert self.values is not None
        rows, positions = self.cache.selected, self.cache.positions_BQ
        row_index = torch.arange(len(positions), device=positions.device) if rows is None else rows
        # Indexing dimensions 0 and 2 puts them first: the value has shape [rows, Q, heads, head dim].
        self.keys[row_index[:, None], :, positions] = key_states.transpose(1, 2)
        self.values[row_index[:, None], :, positions] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : self.cache.width], self.values[:, :, : self.cache.width]
        return (keys, values) if rows is None else (keys[rows], values[rows])

    def reserve(self, columns: int) -> None:
        """Make room for `columns` tokens a row; half as many again, so that growing is rare."""
        assert self.keys is not None
        assert self.values is not None
        missing = columns - self.keys.shape[2]
        if missing > 0:
            grow = max(missing, columns // 2)
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, grow))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, grow))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """`transformers` cache over rows of different lengths.

    Before each forward pass `begin` says which rows run and where their tokens go. `width` is the longest context.
    """

    def __init__(self, num_layers: int) -> None:
        self.width = 0
        self.positions_BQ = torch.empty(0, 0, dtype=torch.long)
        self.selected: torch.Tensor | None = None
        self.rows_layers = [_RowLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.rows_layers))

    def begin(self, positions_BQ: torch.Tensor, width: int, rows: torch.Tensor | None = None) -> None:
        """The next pass runs tokens at `positions_BQ` (int64 [B, Q]) of `rows` (all if None), contexts up to `width`."""
        self.positions_BQ, self.width, self.selected = positions_BQ, width, rows

    def take(self, rows: torch.Tensor) -> None:
        """Keep the rows at `rows`, in that order; a row may be taken several times (the samples of one prompt)."""
        for layer in self.rows_layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def join(self, other: RowCache) -> None:
        """Append the rows of `other`."""
        columns = max(layer.keys.shape[2] for layer in (self.rows_layers[0], other.rows_layers[0]) if layer.keys is not None)
        for mine, theirs in zip(self.rows_layers, other.rows_layers, strict=True):
            mine.reserve(columns)
            theirs.reserve(columns)
            assert mine.keys is not None
            assert mine.values is not None
            assert theirs.keys is not None
            assert theirs.values is not None
            width = min(mine.keys.shape[2], theirs.keys.shape[2])
            mine.keys = torch.cat([mine.keys[:, :, :width], theirs.keys[:, :, :width]])
            mine.values = torch.cat([mine.values[:, :, :width], theirs.values[:, :, :width]])
        self.width = max(self.width, other.width)
