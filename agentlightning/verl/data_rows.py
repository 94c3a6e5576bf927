"""One row of a data file as a prompt.

A row with verl's columns goes in (`prompt` as chat messages, `data_source`, `reward_model.ground_truth`, `extra_info`), a
checked and tokenized `Prompt` comes out, or a `DataError` that names the row's place, what is wrong there, and what mends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agentlightning.errors import DataError
from agentlightning.types import Prompt
from agentlightning.verl.schema import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPECTED_ROW = '{"prompt": [{"role": "user", "content": "..."}], "data_source": "...", "reward_model": {"ground_truth": "..."}}'


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file and where it stands."""

    values: Mapping[str, Any]
    where: str  # "path, line 3" or "path, row 3"; both count from 1


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes prompts of rows as the configuration's `data` says."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerBase

    def make(self, uid: str, row: Row) -> Prompt:
        """The row as a prompt, however long. Raises `DataError` if the row is wrong."""
        messages = _messages(row, self.data.prompt_key)
        extra_info = row.values.get("extra_info") or {}
        if not isinstance(extra_info, dict):
            raise DataError(f"{row.where}: extra_info is {_short(extra_info)}, expected an object, or no such column")
        return Prompt(
            uid=uid,
            messages=messages,
            token_ids=_tokenize(messages, row, self.tokenizer),
            data_source=str(column_of(row, self.data.reward_fn_key, "data.reward_fn_key")),
            ground_truth=_ground_truth(row),
            extra_info=extra_info,
        )

    def fit(self, prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[Prompt | None]:
        """The prompts, with those longer than `data.max_prompt_length` refused, left out (None) or cut, as `data` says."""
        data, limit = self.data, self.data.max_prompt_length
        if data.filter_overlong_prompts:
            return [prompt if len(prompt.token_ids) <= limit else None for prompt in prompts]
        overlong = [i for i, prompt in enumerate(prompts) if len(prompt.token_ids) > limit]
        if overlong and data.truncation == "error":
            first, longest = overlong[0], max(len(prompts[i].token_ids) for i in overlong)
            count = f" ({len(overlong)} of {len(prompts)} prompts are longer)" if len(prompts) > 1 else ""
            raise DataError(
                f"{rows[first].where}: the prompt has {len(prompts[first].token_ids)} tokens, data.max_prompt_length={limit}"
                f"{count}; mend it with data.max_prompt_length={longest}, "
                f"data.filter_overlong_prompts=true or data.truncation=left"
            )
        kept = slice(-limit, None) if data.truncation == "left" else slice(limit)
        return [replace(prompt, token_ids=prompt.token_ids[kept]) for prompt in prompts]


def column_of(row: Row, name: str, key: str) -> Any:
    """A row's value under `name`, which the override `key` gave. Raises `DataError` if there is none."""
    if name not in row.values:
        raise no_column(row.where, name, list(row.values), key)
    return row.values[name]


def no_column(where: str, name: str, columns: Sequence[str], key: str) -> DataError:
    """The error for a column that is not there."""
    return DataError(f"{where}: no column {name!r}; it has {', '.join(columns) or 'none'}; mend it with {key}=<one of them>")


def _messages(row: Row, prompt_key: str) -> tuple[dict[str, str], ...]:
    given = column_of(row, prompt_key, "data.prompt_key")
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
