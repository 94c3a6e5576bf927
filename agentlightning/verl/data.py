"""Data files as prompts, and which prompts a step gets.

jsonl or parquet files with verl's columns go in (`prompt` as chat messages, `data_source`, `reward_model.ground_truth`,
`extra_info`); checked, tokenized `Prompt`s come out, in an order that is a pure function of (seed, epoch, position): a resumed
run needs the number of its next step and nothing else. Every row is checked before training starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agentlightning.errors import ConfigError, DataError
from agentlightning.types import Prompt
from agentlightning.verl.schema import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "val"]
EXPECTED_ROW = '{"prompt": [{"role": "user", "content": "..."}], "data_source": "...", "reward_model": {"ground_truth": "..."}}'


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file and where it stands."""

    values: Mapping[str, Any]
    where: str  # "path, line 3" or "path, row 3"; both count from 1


def load_rows(files: str | Sequence[str], key: str) -> list[Row]:
    """All rows of `files`, in their order. `key` is the override that named them, for the messages of `DataError`."""
    names = [files] if isinstance(files, str) else list(files)
    rows: list[Row] = []
    for name in names:
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"{key}: {name} is not there; expected a .jsonl or .parquet file; mend it with {key}=<file>")
        if path.suffix == ".jsonl":
            rows += _read_jsonl(path)
        elif path.suffix == ".parquet":
            rows += _read_parquet(path, key)
        else:
            raise DataError(f"{key}: {name} ends with {path.suffix!r}; expected .jsonl or .parquet; mend it with {key}=<file>")
    if not rows:
        raise DataError(f"{key}: {', '.join(names)} holds no row; expected rows like {EXPECTED_ROW}; mend it with {key}=<file>")
    return rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                raise DataError(f"{where}: not JSON ({error}); expected {EXPECTED_ROW}") from error
            if not isinstance(values, dict):
                raise DataError(f"{where}: a {type(values).__name__}, expected a JSON object like {EXPECTED_ROW}")
            yield Row(values, where)


def _read_parquet(path: Path, key: str) -> list[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{key}: {path} cannot be read as parquet ({reason}); mend it with {key}=<file>") from error
    return [Row(values, f"{path}, row {number}") for number, values in enumerate(table.to_pylist(), start=1)]


def load_prompts(split: Split, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The checked prompts of a split, in the order of its files; none for "val" where `data.val_files` is null.

    A prompt's uid is `split:row`, its row counted from 0 over all files before anything is left out. Raises `DataError` for the
    first row that is wrong, or else for the first that is too long.
    """
    files = data.train_files if split == "train" else data.val_files
    if files is None:
        return []
    key = f"data.{split}_files"
    rows = load_rows(files, key)
    if split == "train":
        rows = rows[: data.train_max_samples]
    prompts = [_make_prompt(f"{split}:{i}", row, data, tokenizer) for i, row in enumerate(rows)]
    fitting = _within_limit(prompts, rows, data)
    if not fitting:
        raise DataError(
            f"{key}: each of its {len(rows)} prompts is longer than data.max_prompt_length={data.max_prompt_length}; "
            f"mend it with data.max_prompt_length=<more> or data.filter_overlong_prompts=false data.truncation=left"
        )
    return fitting


def _make_prompt(uid: str, row: Row, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The row as a prompt, however long."""
    messages = _messages(row, data.prompt_key)
    extra_info = row.values.get("extra_info") or {}
    if not isinstance(extra_info, dict):
        raise DataError(f"{row.where}: extra_info is {_short(extra_info)}, expected an object, or no such column")
    return Prompt(
        uid=uid,
        messages=messages,
        token_ids=_tokenize(messages, row, tokenizer),
        data_source=str(_column(row, data.reward_fn_key, "data.reward_fn_key")),
        ground_truth=_ground_truth(row),
        extra_info=extra_info,
    )


def _column(row: Row, name: str, key: str) -> Any:
    if name not in row.values:
        columns = ", ".join(row.values) or "none"
        raise DataError(f"{row.where}: no column {name!r}; it has {columns}; mend it with {key}=<one of them>")
    return row.values[name]


def _messages(row: Row, prompt_key: str) -> tuple[dict[str, str], ...]:
    given = _column(row, prompt_key, "data.prompt_key")
    is_chat = isinstance(given, list) and given and all(isinstance(m, dict) for m in given)
    if not is_chat or not all(isinstance(m.get(word), str) for m in given for word in ("role", "content")):
        raise DataError(
            f"{row.where}: column {prompt_key!r} is {_short(given)}, expected chat messages such as "
            f'[{{"role": "user", "content": "..."}}]; mend the file, or set data.prompt_key=<the column that holds them>'
        )
    return tuple(given)


def _ground_truth(row: Row) -> Any:
    reward_model = row.values.get("reward_model")
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        found = "is missing" if reward_model is None else f"is {_short(reward_model)}"
        raise DataError(
            f'{row.where}: column \'reward_model\' {found}, expected an object such as {{"ground_truth": "42"}}; '
            f"mend the file, or set data.train_files / data.val_files to another"
        )
    return reward_model["ground_truth"]


def _tokenize(messages: Sequence[dict[str, str]], row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise DataError(
            f"{row.where}: the model's chat template refuses these messages ({error}); mend the file, or set "
            f"data.prompt_key=<the column that holds the messages>"
        ) from error
    return tuple(tokenizer.encode(str(text), add_special_tokens=False))


def _within_limit(prompts: Sequence[Prompt], rows: Sequence[Row], data: DataConfig) -> list[Prompt]:
    """The prompts with what is longer than `data.max_prompt_length` refused, left out or cut, as the configuration says."""
    limit = data.max_prompt_length
    overlong = [i for i, prompt in enumerate(prompts) if len(prompt.token_ids) > limit]
    if data.filter_overlong_prompts:
        return [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    if overlong and data.truncation == "error":
        first, longest = overlong[0], max(len(prompts[i].token_ids) for i in overlong)
        raise DataError(
            f"{rows[first].where}: the prompt has {len(prompts[first].token_ids)} tokens, data.max_prompt_length={limit} "
            f"({len(overlong)} of {len(prompts)} prompts are longer); mend it with data.max_prompt_length={longest}, "
            f"data.filter_overlong_prompts=true or data.truncation=left"
        )
    kept = slice(-limit, None) if data.truncation == "left" else slice(limit)
    return [replace(prompt, token_ids=prompt.token_ids[kept]) for prompt in prompts]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class PromptDataset:
    """The training prompts and the order in which steps get them."""

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, *, shuffle: bool, seed: int) -> None:
        if len(prompts) < batch_size:
            raise ConfigError(
                f"data.train_batch_size: given {batch_size}, but the training files hold {len(prompts)} usable prompts; "
                f"mend it with data.train_batch_size={len(prompts)} or data.train_files=<more>"
            )
        self._prompts = tuple(prompts)
        self._batch_size = batch_size
        self._order = lru_cache(maxsize=2)(_shuffled_order if shuffle else _file_order)
        self._seed = seed

    @classmethod
    def from_config(cls, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
        """Read, check and tokenize `data.train_files`."""
        return cls(load_prompts("train", data, tokenizer), data.train_batch_size, shuffle=data.shuffle, seed=data.seed)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data; the rest of an epoch is left out, as verl does."""
        return len(self._prompts) // self._batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step `step` (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch

    def step_prompts(self, step: int) -> list[Prompt]:
        """The `train_batch_size` prompts of step `step` (from 1)."""
        if step < 1:
            raise ValueError(f"step {step}: steps count from 1")
        order = self._order(len(self._prompts), self._seed, self.epoch_of(step))
        start = (step - 1) % self.steps_per_epoch * self._batch_size
        return [self._prompts[i] for i in order[start : start + self._batch_size]]

    def fingerprint(self) -> str:
        """A digest of the prompts, answers and everything a reward sees: equal where a resumed run trains on the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self._prompts:
            row = [prompt.uid, prompt.token_ids, prompt.data_source, prompt.ground_truth, prompt.extra_info]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _shuffled_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows. numpy keeps the raw words of Philox for ever, but not what `permutation` makes of them."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable")


def _file_order(rows: int, _seed: int, _epoch: int) -> np.ndarray:
    return np.arange(rows)


def batches(prompts: Sequence[Prompt], size: int | None) -> list[Sequence[Prompt]]:
    """`prompts` cut into batches of at most `size`; None: one batch."""
    size = size or len(prompts) or 1
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
