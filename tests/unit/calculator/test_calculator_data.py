"""The data files: verl's columns, no question twice, answers right by an evaluation that shares no code with the task."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import agentlightning.calculator

HOME = Path(agentlightning.calculator.__file__).parent
KEYWORDS = {
    "*": ("boxes of", "rows of", "times", "in each of"),
    "-": ("lost", "sold"),
    "+": ("red and", "more", "found", "bought"),
}


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HOME / f"{split}.jsonl").read_text().splitlines()]


def questions(split: str) -> list[str]:
    return [row["prompt"][0]["content"] for row in read(split)]


def evaluate(question: str) -> tuple[int, int]:
    """(answer, steps) by reading the English: each clause's words say what its number does to the value so far."""
    value, steps = None, 0
    for clause in question.split(".")[0].split(","):
        (operator,) = [op for op, words in KEYWORDS.items() if any(word in clause for word in words)] or [None]
        for number in map(int, re.findall(r"\d+", clause)):
            if value is None:
                value = number
                continue
            steps += 1
            value = {"*": value * number, "-": value - number, "+": value + number}[str(operator)]
    assert value is not None
    return value, steps


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("23 boxes of 17 pens, 40 lost. How many left?", (351, 2)),
        ("12 red and 3 blue cups, and that 4 times. How many cups?", (60, 2)),
        ("9 eggs, 4 sold. How many left?", (5, 1)),
    ],
)
def test_the_evaluation_itself(question: str, expected: tuple[int, int]) -> None:
    assert evaluate(question) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_have_verls_columns_and_the_right_answer(split: str) -> None:
    for index, row in enumerate(read(split)):
        assert set(row) == {"data_source", "prompt", "reward_model", "extra_info"}
        assert row["data_source"] == "calculator"
        (message,) = row["prompt"]
        assert message["role"] == "user"
        answer, steps = evaluate(message["content"])
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(answer)}
        assert row["extra_info"] == {"split": split, "index": index, "steps": steps}


def test_no_question_comes_twice() -> None:
    train, val = questions("train"), questions("val")
    assert (len(train), len(val)) == (2048, 256)
    assert len({*train, *val}) == len(train) + len(val)


def test_both_kinds_and_all_operators_are_there_in_both_files() -> None:
    for split in ("train", "val"):
        steps = [row["extra_info"]["steps"] for row in read(split)]
        assert 0.4 < steps.count(1) / len(steps) < 0.6
        text = " ".join(questions(split))
        assert all(word in text for words in KEYWORDS.values() for word in words)


def test_the_package_data_is_small() -> None:
    files = [path for path in HOME.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 2_000_000
