"""GSM8K (arXiv:2110.14168) in verl's columns: a local copy goes in, train.parquet and test.parquet come out.

A copy is a file for each split with the columns `question` and `answer`: the .jsonl of github.com/openai/grade-school-math or
the .parquet of the hub's openai/gsm8k. Nothing is downloaded. README.md beside this file has the commands that train on it.

    python examples/gsm8k/prepare.py --train train.jsonl --test test.jsonl --out data/gsm8k
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

DATA_SOURCE = "openai/gsm8k"  # verl's name for it
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


class PrepareError(Exception):
    """A file is not what is expected; says where and why."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file."""
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise PrepareError(f"{path} cannot be read: {error}") from error
    raise PrepareError(f"{path} ends with {path.suffix!r}; expected .jsonl or .parquet")


def verl_row(row: Any, split: str, index: int, path: Path) -> dict[str, Any]:
    """One problem in verl's columns; its ground truth is the number behind `####`, without commas."""
    question, answer = (row.get(name) if isinstance(row, dict) else None for name in ("question", "answer"))
    if not isinstance(question, str) or not isinstance(answer, str):
        raise PrepareError(f"{path}, row {index + 1}: expected the texts `question` and `answer`, found {str(row)[:80]}")
    final = FINAL_NUMBER.search(answer)
    if final is None:
        raise PrepareError(f"{path}, row {index + 1}: its answer does not end with `#### <number>`")
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": final[1].replace(",", "")},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer},
    }


def prepare(source: Path, split: str) -> pyarrow.Table:
    """A whole split as a table."""
    rows = [verl_row(row, split, index, source) for index, row in enumerate(read_rows(source))]
    if not rows:
        raise PrepareError(f"{source} holds no row")
    return pyarrow.Table.from_pylist(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="GSM8K in verl's columns, from a local copy.")
    parser.add_argument("--train", type=Path, required=True, help=".jsonl or .parquet with the columns question and answer")
    parser.add_argument("--test", type=Path, required=True, help="the same for validation")
    parser.add_argument("--out", type=Path, default=Path("data/gsm8k"), help="directory of train.parquet and test.parquet")
    parser.add_argument("--force", action="store_true", help="write over files that are there")
    given = parser.parse_args(arguments)
    targets = {split: given.out / f"{split}.parquet" for split in ("train", "test")}
    there = [str(path) for path in targets.values() if path.exists()]
    if there and not given.force:
        parser.error(f"{', '.join(there)} would be written over; say --force, or give another --out")
    try:
        tables = {"train": prepare(given.train, "train"), "test": prepare(given.test, "test")}
    except PrepareError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    for split, path in targets.items():
        staged = path.with_name(f".{path.name}.tmp")
        pyarrow.parquet.write_table(tables[split], staged)
        os.replace(staged, path)
        print(f"{path}: {tables[split].num_rows} problems")


if __name__ == "__main__":
    main()
