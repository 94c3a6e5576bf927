"""Data files as prompts, and which prompts a step gets.

jsonl or parquet files, or a dataset that `datasets` saved, go in, with verl's columns (`prompt` as chat messages,
`data_source`, `reward_model.ground_truth`, `extra_info`); checked, tokenized `Prompt`s come out, in an order that is a pure
function of (seed, position): a resumed run needs the number of its next step and nothing else.

Up to 20,000 rows are all checked before training starts. Of more, the first rows of up to eight files are; the others are
read, checked and tokenized when a step gets them, so that the start takes seconds and memory does not grow with the files. A
wrong row then ends the run with a `DataError` that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from agentlightning.errors import ConfigError, DataError
from agentlightning.types import Prompt
from agentlightning.verl.data_files import RowFiles, open_files
from agentlightning.verl.data_order import EpochOrder, MixtureOrder, Order, RowSet, SamplerOrder
from agentlightning.verl.data_rows import PromptMaker, Row
from agentlightning.verl.data_sampler import load_sampler
from agentlightning.verl.data_store import CheckedPrompts, LazyPrompts
from agentlightning.verl.schema import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptDataset", "batches", "load_prompts", "load_rows", "number_repeats"]

Split = Literal["train", "val"]
SMALL = 20_000  # rows that are read and checked before training starts
_ATTEMPTS = 100  # rows that are looked at for one that is not too long


def load_rows(files: str | Sequence[str], key: str) -> list[Row]:
    """All rows of `files`, in their order. `key` is the override that named them, for the messages of `DataError`."""
    return open_files(files, key).all_rows()


def load_prompts(split: Split, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The checked prompts of a split, in the order of its files; none for "val" where `data.val_files` is null.

    A prompt's uid is `split:row`, its row counted from 0 over all files before anything is left out. Raises `DataError` for the
    first row that is wrong, or else for the first that is too long.
    """
    files = data.train_files if split == "train" else data.val_files
    if files is None:
        return []
    limit = data.train_max_samples if split == "train" else None
    prompts = _check_all(open_files(files, f"data.{split}_files", limit), split, PromptMaker(data, tokenizer))
    return [prompt for prompt in prompts if prompt is not None]


def _check_all(files: RowFiles, split: Split, maker: PromptMaker) -> list[Prompt | None]:
    """A prompt for each row; None where it is left out."""
    rows = files.all_rows()
    prompts = maker.fit([maker.make(f"{split}:{i}", row) for i, row in enumerate(rows)], rows)
    if not any(prompts):
        limit = maker.data.max_prompt_length
        raise DataError(
            f"data.{split}_files: each of its {len(rows)} prompts is longer than data.max_prompt_length={limit}; "
            f"mend it with data.max_prompt_length=<more> or data.filter_overlong_prompts=false data.truncation=left"
        )
    return prompts


class PromptDataset:
    """The training prompts and the order in which steps get them: an endless stream of positions, cut into steps and epochs.

    Without `mixture` and `sampler` each epoch holds every row once, in the order that (seed, epoch) gives; the rest of an epoch
    that is no whole batch is left out, as verl does. With `mixture` (weights by data source) every stretch of positions holds
    the sources in the proportion of their weights, each source goes through its own epochs, and a source without a weight is
    left out. With `sampler` (`pkg.mod:fn`, see data_sampler.py) a function of the user's names the rows. In both cases an epoch
    is as many whole batches as the rows in use would fill. Of parquet files too large to be held, rows are shuffled bucket by
    bucket (data_order.py).

    A row that is None is too long: without `sampler` it counts for nothing, with it another row stands in.
    Raises `ConfigError` if a batch takes more rows than there are, or if mixture or sampler do not fit the rows.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt | None] | LazyPrompts,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        mixture: Mapping[str, float] | None = None,
        sampler: str | None = None,
    ) -> None:
        if mixture and sampler:
            raise ConfigError(
                f"data.sampler: given {sampler} together with data.mixture, expected one of them; "
                f"mend it with data.sampler=null, or without data.mixture"
            )
        if isinstance(prompts, LazyPrompts):
            self._prompts = prompts
        else:
            self._prompts = CheckedPrompts(prompts if sampler else [prompt for prompt in prompts if prompt is not None])
        self._batch_size = batch_size
        self._order: Order
        if sampler:
            self._rows = len(self._prompts)
            self._order = SamplerOrder(load_sampler(sampler, seed, self._rows), self._rows, seed)
        elif mixture:
            self._order, self._rows = _mixture_order(self._prompts, mixture, shuffle, seed)
        else:
            rows = _all_rows(self._prompts)
            self._rows = len(rows)
            whole_batches = max(self._rows // batch_size, 1) * batch_size
            self._order = EpochOrder(rows, shuffle=shuffle, seed=seed, length=whole_batches, memory=self._prompts.hold(1))
        if self._rows < batch_size:
            raise ConfigError(
                f"data.train_batch_size: given {batch_size}, but the training files hold {self._rows} usable prompts; "
                f"mend it with data.train_batch_size={self._rows} or data.train_files=<more>"
            )

    @classmethod
    def from_config(cls, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
        """Open `data.train_files`; read, check and tokenize all rows, or of more than 20,000 the first."""
        files = open_files(data.train_files, "data.train_files", data.train_max_samples)
        maker = PromptMaker(data, tokenizer)
        prompts = _check_all(files, "train", maker) if len(files) <= SMALL else LazyPrompts(files, "train", maker)
        return cls(
            prompts,
            data.train_batch_size,
            shuffle=data.shuffle,
            seed=data.seed,
            mixture=data.mixture,
            sampler=data.sampler,
        )

    def __len__(self) -> int:
        return self._rows

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the rows in use; the rest of an epoch is left out, as verl does."""
        return self._rows // self._batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step `step` (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch

    def step_prompts(self, step: int) -> list[Prompt]:
        """The `train_batch_size` prompts of step `step` (from 1)."""
        if step < 1:
            raise ValueError(f"step {step}: steps count from 1")
        return self.prompts_at((step - 1) * self._batch_size, self._batch_size)

    def prompts_at(self, position: int, count: int) -> list[Prompt]:
        """The prompts at positions `position` to `position + count - 1` (from 0) of the endless stream.

        A row that comes again within these positions (a small source with a large weight, a sampler, the edge of an epoch) is a
        prompt of its own: see `number_repeats`. Raises `DataError` for a row that is wrong, of files that are read as they go.
        """
        if position < 0 or count < 0:
            raise ValueError(f"{count} prompts at position {position}: both count from 0")
        row_N = self._order.rows(np.arange(position, position + count))
        prompts = {i: self._fitting(int(row_N[i]), position + i) for i in np.argsort(row_N, kind="stable").tolist()}
        return number_repeats([prompts[i] for i in range(count)])

    def _fitting(self, row: int, position: int) -> Prompt:
        """The row's prompt, or where that is too long another's, which hangs on (seed, position, attempt) alone."""
        for attempt in range(1, _ATTEMPTS + 1):
            prompt = self._prompts[row]
            if prompt is not None:
                return prompt
            row = self._order.another(position, attempt)
        raise DataError(
            f"data.train_files: {_ATTEMPTS} rows drawn for position {position} are all longer than data.max_prompt_length; "
            f"mend it with data.max_prompt_length=<more> or data.filter_overlong_prompts=false data.truncation=left"
        )

    def fingerprint(self) -> str:
        """A digest of the prompts, answers and everything a reward sees: equal where a resumed run trains on the same data.

        Of data that are read as they go it is a digest of the files' bytes (of more than 8 GiB, of samples of them) and of the
        keys that say how rows become prompts. What a file is called and where it lies does not matter.
        """
        return self._prompts.fingerprint()


def _all_rows(prompts: CheckedPrompts | LazyPrompts) -> RowSet:
    edge_K1, memory_K = prompts.blocks()
    return RowSet(edge_K1, memory_K)


def _mixture_order(
    prompts: CheckedPrompts | LazyPrompts, mixture: Mapping[str, float], shuffle: bool, seed: int
) -> tuple[MixtureOrder, int]:
    """The order, and how many rows are in use."""
    names, code_R = prompts.sources()
    weights = {name: weight for name, weight in sorted(mixture.items()) if weight > 0}
    there = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if not weights:
        raise ConfigError(
            f"data.mixture: given {dict(mixture)}, expected a weight above 0; the training files hold {there}; "
            f"mend it with '+data.mixture={{{names[0]}: 1}}'"
        )
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"data.mixture: given a weight for {name!r}, of which the training files hold no usable row; they hold "
                f"{there}; mend it with '+data.mixture={{{names[0]}: 1}}', or set data.train_files=<files that hold it>"
            )
    edge_K1, memory_K = prompts.blocks()
    memory = prompts.hold(len(weights))
    sets = [RowSet(edge_K1, memory_K, code_R, names.index(name)) for name in weights]
    orders = [EpochOrder(rows, shuffle=shuffle, seed=seed, memory=memory, stream=i) for i, rows in enumerate(sets)]
    order = MixtureOrder(orders, list(weights.values()))
    for name, count in zip(weights, order.count_S.tolist(), strict=True):
        if count == 0:
            raise ConfigError(
                f"data.mixture: the weight {weights[name]:g} of {name!r} is less than 1/{order.count_S.sum()} of all, expected "
                f"more or 0; mend it with '+data.mixture={{{name}: 0, ...}}'"
            )
    return order, sum(len(rows) for rows in sets)


def number_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, where a row comes again with the uid `split:row#2`, `#3`, ...: a group of its own, with samples of its own.

    Prompts that are numbered already may be given again, with more behind them.
    """
    seen: dict[str, int] = {}
    numbered: list[Prompt] = []
    for prompt in prompts:
        row = prompt.uid.partition("#")[0]
        seen[row] = seen.get(row, 0) + 1
        uid = row if seen[row] == 1 else f"{row}#{seen[row]}"
        numbered.append(prompt if uid == prompt.uid else replace(prompt, uid=uid))
    return numbered


def batches(prompts: Sequence[Prompt], size: int | None) -> list[Sequence[Prompt]]:
    """`prompts` cut into batches of at most `size`; None: one batch."""
    size = size or len(prompts) or 1
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
