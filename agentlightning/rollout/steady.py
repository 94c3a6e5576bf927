"""Decoding on a CPU whose bits do not hang on the other samples decoded beside: so any worker may decode any of them.

Enters: what `DecodeLoop` takes. Leaves: the same completions, but each with the bits it has in whatever company. Measured with
torch's CPU kernels (the tests hold it): a row of a matrix product does not hang on the number of rows from four on; attention
does not hang on what is masked behind a context if contexts are whole blocks of columns; an elementwise function rounds
otherwise in what its vectors leave over, so rows come in fours. On a GPU kernels are chosen by shape: there each logical
shard is decoded by itself instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from agentlightning.models.base import output_head
from agentlightning.rollout.cache import RowCache
from agentlightning.rollout.engine import DecodeLoop, Generation, Samples
from agentlightning.rollout.journal import RolloutJournal

_ROWS = 4
_COLUMNS = 32


@dataclass(frozen=True)
class SteadyLoop(DecodeLoop):
    """`DecodeLoop` with rows in fours and contexts in whole blocks."""

    def __post_init__(self) -> None:
        _AtLeastFourRows(output_head(self.model))

    def generation(self, samples: Samples, journal: RolloutJournal | None) -> Generation:
        """See `DecodeLoop.generation`."""
        return _SteadyGeneration(self, samples, journal)


class _SteadyGeneration(Generation):
    """Behind the rows of the samples, the cache has copies of the first one until their number is a multiple of four."""

    ghosts = 0

    def _admit(self) -> None:
        before = len(self.rows)
        super()._admit()
        if len(self.rows) == before:
            return
        # Those that came are behind the copies.
        kept = [*range(before), *range(before + self.ghosts, len(self.rows) + self.ghosts)]
        self._take(np.array(kept))

    def _leave(self) -> None:
        """See `Generation._leave`; the cache is moved once, for those that stay and for the copies behind them."""
        assert self.cache is not None
        stays_R = np.array([self.samples.stop_reason[sample] is None for sample in self.rows], dtype=np.bool_)
        if stays_R.all():
            return
        if self.journal is not None:
            self.journal.add(self.samples.completion(sample) for sample in self.rows[~stays_R].tolist())
        self.rows = self.rows[stays_R]
        self._take(np.flatnonzero(stays_R))

    def _take(self, kept: np.ndarray) -> None:
        """These rows of the cache, and behind them as many copies of the first as are missing to a multiple of four."""
        assert self.cache is not None
        self.ghosts = -len(kept) % _ROWS
        self.cache.take(torch.as_tensor(np.concatenate([kept, kept[:1].repeat(self.ghosts)]), device=self.device))

    def _forward(
        self, cache: RowCache, token_BQ: np.ndarray, position_BQ: np.ndarray, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [B, Q, H], from a pass over more rows and columns."""
        wanted_rows, wanted_columns = token_BQ.shape
        more_rows = self.ghosts if cache is self.cache and rows is None else 0
        more_columns = -wanted_columns % _COLUMNS if wanted_columns > 1 else 0
        token_BQ = np.pad(token_BQ, ((0, 0), (0, more_columns)))
        behind_BQ = position_BQ[:, -1:] + np.arange(1, more_columns + 1)
        position_BQ = np.concatenate([position_BQ, behind_BQ], axis=1)
        if more_rows:
            token_BQ = np.concatenate([token_BQ, token_BQ[:1].repeat(more_rows, axis=0)])
            position_BQ = np.concatenate([position_BQ, position_BQ[:1].repeat(more_rows, axis=0)])
        width = int(position_BQ.max()) + 1
        width += -width % _COLUMNS
        return self._pass(cache, token_BQ, position_BQ, width, rows)[:wanted_rows, :wanted_columns]


class _AtLeastFourRows:
    """Around the output head, which is given the samples' rows alone."""

    def __init__(self, head: nn.Module) -> None:
        self.given = 0
        head.register_forward_pre_hook(self.add)
        head.register_forward_hook(self.take_away)

    def add(self, head: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (hidden_NH,) = arguments
        self.given = len(hidden_NH)
        return (nn.functional.pad(hidden_NH, (0, 0, 0, max(0, _ROWS - self.given))),)

    def take_away(self, head: nn.Module, arguments: tuple[torch.Tensor], logits_NV: torch.Tensor) -> torch.Tensor:
        return logits_NV[: self.given]
