"""Decoding on a CPU whose bits do not hang on the other samples decoded beside: so any worker may decode any of them.

Enters: what `DecodeLoop` takes. Leaves: the same completions, but each with the bits it has in whatever company. Measured with
torch's CPU kernels (the tests hold it): a row of a matrix product does not hang on the number of rows from four on; attention
does not hang on what is masked behind a context if contexts are whole blocks of columns; an elementwise function rounds
otherwise in what its vectors leave over, so rows come in fours. On a GPU kernels are chosen by shape: there each logical
shard is decoded by itself instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from agentlightning.models.base import output_head
from agentlightning.rollout.cache import RowCache
from agentlightning.rollout.engine import DecodeLoop, _Generation, _Samples
from agentlightning.rollout.journal import RolloutJournal
from agentlightning.types import Completion, Prompt, SamplingParams

_ROWS = 4
_COLUMNS = 32


@dataclass(frozen=True)
class SteadyLoop(DecodeLoop):
    """`DecodeLoop` with rows in fours and contexts in whole blocks."""

    def __post_init__(self) -> None:
        _AtLeastFourRows(output_head(self.model))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seed: int,
        step: int,
        adapter_version: int,
        journal: RolloutJournal | None = None,
    ) -> list[Completion]:
        """See `DecodeLoop.generate`."""
        samples = _Samples(prompts, params, seed, step, adapter_version)
        if journal is not None:
            samples.restore(journal)
        _SteadyGeneration(self, samples, journal).run()
        return samples.completions()


class _SteadyGeneration(_Generation):
    """Behind the rows of the samples, the cache has copies of the first one until their number is a multiple of four."""

    ghosts = 0

    def _admit(self) -> None:
        if self.waiting:
            self._set_ghosts(0)
        super()._admit()
        self._set_ghosts(-len(self.rows) % _ROWS)

    def _leave(self) -> None:
        before = len(self.rows)
        super()._leave()
        if len(self.rows) < before:  # the copies are gone too
            self.ghosts = 0
            self._set_ghosts(-len(self.rows) % _ROWS)

    def _set_ghosts(self, ghosts: int) -> None:
        if ghosts == self.ghosts or self.cache is None:
            return
        rows = [*range(len(self.rows)), *[0] * ghosts]
        self.cache.take(torch.tensor(rows, dtype=torch.long, device=self.device))
        self.ghosts = ghosts

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
        position = torch.tensor(position_BQ, device=self.device)
        width = int(position_BQ.max()) + 1
        width += -width % _COLUMNS
        cache.begin(position, width, rows)
        visible_B1QK = (torch.arange(width, device=self.device) <= position[:, :, None])[:, None]
        hidden_BQH = self.engine.model.get_decoder()(
            input_ids=torch.as_tensor(token_BQ, device=self.device),
            position_ids=position,
            attention_mask=visible_B1QK,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_BQH[:wanted_rows, :wanted_columns]


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
