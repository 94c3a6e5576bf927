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
    return _places_of(_dealt_out(length_B, world_size), np.arange(len(length_B)), world_size)


def _dealt_out(length_B: np.ndarray, world_size: int) -> np.ndarray:
    """The worker of each place."""
    place = np.arange(len(length_B)) % (2 * world_size)
    worker_B = np.empty(len(length_B), dtype=np.int64)
    worker_B[np.argsort(-length_B, kind="stable")] = np.where(place < world_size, place, 2 * world_size - 1 - place)
    return worker_B


def _places_of(worker_B: np.ndarray, key_B: np.ndarray, world_size: int) -> list[np.ndarray]:
    """The places of each worker, ordered by their key."""
    order = np.lexsort((key_B, worker_B))
    return np.split(order, np.cumsum(np.bincount(worker_B, minlength=world_size))[:-1])


def prompt_shards(batch: Batch, world_size: int) -> list[np.ndarray]:
    """Rows of each worker; the samples of one prompt stay together, so that the prompt is run once.

    Prompts are dealt out by the tokens that they cost. Those that have no advantage anywhere, which an update may leave out,
    are dealt out by themselves, so that each worker gets about as much of both kinds.
    """
    group_of = {uid: group for group, uid in enumerate(dict.fromkeys(batch.uids))}
    group_B = np.array([group_of[uid] for uid in batch.uids], dtype=np.int64)
    tokens_G = np.bincount(group_B, batch.response_len_B, len(group_of)).astype(np.int64)
    tokens_G[group_B] += batch.prompt_len_B  # once a prompt, whatever its samples
    worker_G = np.empty(len(group_of), dtype=np.int64)
    load_W = np.zeros(world_size)
    for kind_G in _kinds(batch, group_B, len(group_of)):
        # Who has the least of the first kind gets the longest of the second.
        dealt_G = np.argsort(load_W, kind="stable")[_dealt_out(tokens_G[kind_G], world_size)]
        worker_G[kind_G] = dealt_G
        load_W += np.bincount(dealt_G, tokens_G[kind_G], world_size)
    return _places_of(worker_G[group_B], group_B, world_size)


def _kinds(batch: Batch, group_B: np.ndarray, groups: int) -> list[np.ndarray]:
    """The prompts with an advantage at any token, and the others; all together where no advantages are known."""
    advantages_BT = batch.columns.get("advantages")
    if advantages_BT is None:
        return [np.arange(groups)]
    moves_G = np.bincount(group_B, advantages_BT.any(axis=1), groups) > 0
    return [np.flatnonzero(moves_G), np.flatnonzero(~moves_G)]


def shards_of_workers(shards: int, world_size: int) -> list[range]:
    """The shards of each worker: neighbours, and about as many for each."""
    ends = [shards * (rank + 1) // world_size for rank in range(world_size)]
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
