"""Dealing a batch out to the workers: lengths go in, row indices come out."""

from __future__ import annotations

import numpy as np

from agentlightning.types import Batch


def balanced_shards(length_B: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Places of each worker: by length, dealt out to and fro, so that all get about the same number of tokens."""
    order = np.argsort(-length_B, kind="stable")
    place = np.arange(len(order)) % (2 * world_size)
    worker = np.where(place < world_size, place, 2 * world_size - 1 - place)
    return [np.sort(order[worker == rank]) for rank in range(world_size)]


def prompt_shards(batch: Batch, world_size: int) -> list[np.ndarray]:
    """Rows of each worker; the samples of one prompt stay together, so that the prompt is run once."""
    rows_of: dict[str, list[int]] = {}
    for row, uid in enumerate(batch.uids):
        rows_of.setdefault(uid, []).append(row)
    groups = list(rows_of.values())
    length_G = np.array([batch.total_len_B[rows].sum() for rows in groups])
    shards = balanced_shards(length_G, world_size)
    return [np.array([row for group in shard for row in groups[group]], dtype=np.int64) for shard in shards]
