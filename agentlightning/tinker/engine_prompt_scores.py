"""What requests want to know of their prompt, taken from the pass that fills the cache.

Enters: logits, a stretch of rows at a time; row q is the distribution of prompt token q + 1, so a prompt of T tokens has T - 1
rows. Leaves: log-probabilities of the prompt's own tokens, of the likeliest ones, of ids that the request names, and tokens
drawn at each position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from agentlightning.errors import UserError
from agentlightning.rollout.sampling import random_stream
from agentlightning.tinker.engine_api import SampleRequest
from agentlightning.tinker.types import PromptAltTokens, TensorData

# Stands where the trainer's streams have their step and a sample's has 0: draws at prompt positions have streams of their own.
_PROMPT_STREAMS = 1


def wants_scores(request: SampleRequest) -> bool:
    """Whether its prompt's logits are needed at all."""
    return _wants_all_rows(request) or request.target_prompt_logprobs is not None


def check_targets(targets: TensorData, prompt_length: int, vocabulary: int) -> None:
    """Raise `UserError` for ids that cannot be looked up."""
    what = "sample, target_prompt_logprobs:"
    if targets.dtype != "int64":
        raise UserError(f"{what} given {targets.dtype}, expected int64 token ids")
    if len(targets.shape) != 2 or targets.shape[0] != prompt_length - 1:
        raise UserError(
            f"{what} given shape {targets.shape}, expected [{prompt_length - 1}, k]: a row for each prompt token but the first"
        )
    odd = targets.array[(targets.array < -1) | (targets.array >= vocabulary)]
    if odd.size:
        raise UserError(f"{what} given token id {odd.flat[0]}, expected 0 to {vocabulary - 1}, or -1 for none")
    if not (targets.array >= 0).any():
        raise UserError(f"{what} given no token id, expected at least one; or leave the tensor out")


class PromptScores:
    """What one request wants to know, filled by `add_rows`. `seed` is that of its draws."""

    def __init__(self, request: SampleRequest, seed: int) -> None:
        self.request = request
        self.logprobs: list[float | None] = [None]
        self.top: list[list[tuple[int, float]] | None] = [None]
        named, k = request.target_prompt_logprobs, request.prompt_alt_tokens_k
        self.targets = None if named is None else _Targets(named)
        self.draws = _Draws(request, seed) if k else None
        # Rows before the first one that names an id need not be computed.
        self.first_row = 0 if self.targets is None or _wants_all_rows(request) else self.targets.first_row


def add_rows(scores: Sequence[PromptScores], start: int, target_N: torch.Tensor, logits_NV: torch.Tensor) -> None:
    """Rows `start` to `start + N` of one prompt, for all requests that it is run for. `target_N`: the prompt's own tokens."""
    logits_NV = logits_NV.float()
    log_p_NV = logits_NV.log_softmax(-1)
    own = log_p_NV.gather(-1, target_N[:, None])[:, 0].tolist()
    rows = likeliest(log_p_NV, max(one.request.topk_prompt_logprobs for one in scores))
    for one in scores:
        one.logprobs += own
        one.top += [row[: one.request.topk_prompt_logprobs] for row in rows]
        if one.targets is not None:
            one.targets.add(start, log_p_NV)
        if one.draws is not None:
            one.draws.add(start, logits_NV, log_p_NV)


def likeliest(log_p_NV: torch.Tensor, k: int, first_N: torch.Tensor | None = None) -> list[list[tuple[int, float]]]:
    """The k likeliest tokens of each row, with their log-probabilities. `first_N`, if given, are the first of each row: a
    likeliest token that was chosen stays the first where another is exactly as likely.
    """
    ranked_NV = log_p_NV if first_N is None else log_p_NV.scatter(-1, first_N[:, None], torch.inf)
    id_NK = ranked_NV.topk(k, dim=-1).indices
    values = log_p_NV.gather(-1, id_NK).tolist()
    return [list(zip(*row, strict=True)) for row in zip(id_NK.tolist(), values, strict=True)]


def _wants_all_rows(request: SampleRequest) -> bool:
    return request.prompt_logprobs or request.topk_prompt_logprobs > 0 or request.prompt_alt_tokens_k > 0


class _Targets:
    """Log-probabilities of the ids that a request names, in the layout of its tensor; where it names none, 0."""

    def __init__(self, named: TensorData) -> None:
        self.named = named
        if named.sparse_crow_indices is None:
            per_row = np.full(named.shape[0], named.shape[1])
        else:
            per_row = np.diff(named.sparse_crow_indices)
        self.place_C = np.flatnonzero(named.array >= 0)  # of each id among all values, C of them, row by row
        self.row_C = np.repeat(np.arange(named.shape[0]), per_row)[self.place_C]
        self.id_C = named.array.ravel()[self.place_C]
        self.values = np.zeros(named.array.size, np.float32)

    @property
    def first_row(self) -> int:
        return int(self.row_C[0])

    def add(self, start: int, log_p_NV: torch.Tensor) -> None:
        begin, end = np.searchsorted(self.row_C, [start, start + len(log_p_NV)])
        row = torch.tensor(self.row_C[begin:end] - start, device=log_p_NV.device)
        token = torch.tensor(self.id_C[begin:end], device=log_p_NV.device)
        self.values[self.place_C[begin:end]] = log_p_NV[row, token].cpu().numpy()

    def answer(self) -> TensorData:
        named = self.named
        return TensorData(self.values, "float32", named.shape, named.sparse_crow_indices, named.sparse_col_indices)


class _Draws:
    """Tokens drawn at each prompt position. Number q of stream j decides draw j of row q, as the samples' streams do."""

    def __init__(self, request: SampleRequest, seed: int) -> None:
        rows, k = request.prompt.length - 1, request.prompt_alt_tokens_k
        streams = [random_stream(seed, _PROMPT_STREAMS, request.stream, j, rows) for j in range(k)]
        self.uniform_QK = np.stack(streams, axis=1)
        self.temperature = request.sampling_params.temperature
        self.tokens_QK = np.zeros((rows, k), np.int64)
        self.logprobs_QK = np.zeros((rows, k), np.float32)

    def add(self, start: int, logits_NV: torch.Tensor, log_p_NV: torch.Tensor) -> None:
        rows = slice(start, start + len(logits_NV))
        uniform_NK = torch.tensor(self.uniform_QK[rows], device=logits_NV.device)
        if self.temperature == 0:
            token_NK = logits_NV.argmax(-1, keepdim=True).expand_as(uniform_NK)
        else:
            # As in rollout/sampling.py, with K numbers for a distribution: the inverse of the cumulative one, in float64.
            cumulative_NV = (logits_NV / self.temperature).softmax(-1, dtype=torch.float64).cumsum(-1)
            token_NK = torch.searchsorted(cumulative_NV, uniform_NK * cumulative_NV[:, -1:], right=True)
            token_NK = token_NK.clamp(max=logits_NV.shape[-1] - 1)
        self.tokens_QK[rows] = token_NK.cpu().numpy()
        self.logprobs_QK[rows] = log_p_NV.gather(-1, token_NK).cpu().numpy()

    def answer(self) -> PromptAltTokens:
        return PromptAltTokens(TensorData(self.tokens_QK, "int64"), TensorData(self.logprobs_QK, "float32"))
