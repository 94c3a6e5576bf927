"""Cutting a batch for the model and among workers: lengths go in, row indices come out.

Rows of like length go together, because a padded token costs as much as a real one.
"""

from __future__ import annotations

import numpy as np

from agentlightning.workers.settings import MicroBatchSettings


def micro_batches(length_B: np.ndarray, settings: MicroBatchSettings) -> list[np.ndarray]:
    """Rows of each micro-batch, longest first, so that memory runs out at once or never.

    With `max_tokens` a micro-batch takes as many rows as fit into that many padded tokens, and always at least one.
    """
    order = np.argsort(-length_B, kind="stable")
    if settings.max_tokens is None:
        return [order[start : start + settings.max_rows] for start in range(0, len(order), settings.max_rows)]
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        rows = max(1, settings.max_tokens // int(length_B[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def balanced_shards(length_B: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Rows of each worker: by length, dealt out to and fro, so that all get about the same number of tokens."""
    order = np.argsort(-length_B, kind="stable")
    place = np.arange(len(order)) % (2 * world_size)
    worker = np.where(place < world_size, place, 2 * world_size - 1 - place)
    return [np.sort(order[worker == rank]) for rank in range(world_size)]
