"""Dealing out to the workers: the rows of a batch by their lengths, and the tensors of a checkpoint by their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agentlightning.types import Batch

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class StateTensors:
    """The tensors of a checkpoint, the same on every worker."""

    whole: Mapping[str, Tensors]  # files that stay in one piece, by relative path
    optimizers: Mapping[str, Tensors]  # actor, critic -> "exp_avg.<name>", "exp_avg_sq.<name>", "step.<name>"


def share_of_state(state: StateTensors, writer: int, writers: int) -> dict[str, Tensors]:
    """The files that writer number `writer` of `writers` writes: path -> name -> tensor; about the same bytes for each.

    A pure function of names and shapes, so that nobody has to be asked. The optimizer's state is split by parameter; reading
    puts the files together again, whatever their number.
    """
    size_of: dict[tuple[str, str], int] = {(path, ""): _bytes(tensors.values()) for path, tensors in state.whole.items()}
    for model, tensors in state.optimizers.items():
        for name, tensor in tensors.items():
            key = (model, name.split(".", 1)[1])
            size_of[key] = size_of.get(key, 0) + _bytes([tensor])
    load = [0] * writers
    mine: set[tuple[str, str]] = set()
    for key in sorted(size_of, key=lambda key: (-size_of[key], key)):
        lightest = load.index(min(load))
        load[lightest] += size_of[key]
        if lightest == writer:
            mine.add(key)
    files: dict[str, Tensors] = {path: tensors for path, tensors in state.whole.items() if (path, "") in mine}
    for model, tensors in state.optimizers.items():
        part = {name: tensor for name, tensor in tensors.items() if (model, name.split(".", 1)[1]) in mine}
        if part or (not tensors and writer == 0):  # an optimizer that has not stepped yet has an empty file
            files[f"{model}/optimizer-{writer:05}-of-{writers:05}.safetensors"] = part
    return files


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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


def shards_of_workers(shards: int, world_size: int) -> list[range]:
    """The shards of each worker: neighbours, and about as many for each."""
    ends = [shards * (rank + 1) // world_size for rank in range(world_size)]
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
