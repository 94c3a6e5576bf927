"""The calculator agent's task: word problems, the one tool, the reward.

In comes a random generator, or a turn's text; out go problems, tool results and scores. It exists so that the default run
needs no download: everything a step asks of the outside world is a few lines of arithmetic. Prompts are short on purpose
(one byte is one token).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DATA_SOURCE = "calculator"
OPEN_TAG, CLOSE_TAG = "<calc>", "</calc>"
OPERATORS = ("+", "-", "*")
SMALLEST, LARGEST = 2, 99  # the numbers a problem may name

_CALL = re.compile(r"<calc>(-?[0-9]{1,9})([-+*])(-?[0-9]{1,9})</calc>")
_INTEGER = re.compile(r"-?[0-9]{1,18}")

_NOUNS = ("pens", "cups", "hats", "nuts", "eggs", "keys", "toys", "jars")
_FIRST_CLAUSES = {
    "+": ("{a} red and {b} blue {noun}", "{a} {noun} and {b} more"),
    "-": ("{a} {noun}, {b} lost", "{a} {noun}, {b} sold"),
    "*": ("{a} boxes of {b} {noun}", "{a} rows of {b} {noun}"),
}
_SECOND_CLAUSES = {
    "+": (", {c} found", ", {c} bought"),
    "-": (", {c} lost", ", {c} sold"),
    "*": (", and that {c} times", ", in each of {c} shops"),
}
_QUESTIONS = {"+": "How many now?", "-": "How many left?", "*": "How many {noun}?"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem and the way to its answer.

    Example: `Problem("23 boxes of 17 pens, 40 lost. How many left?", numbers=(23, 17, 40), operators=("*", "-"))`; its
    operators apply from left to right, so the answer is 23 * 17 - 40.
    """

    question: str
    numbers: tuple[int, ...]
    operators: tuple[str, ...]  # one fewer than the numbers: 1 or 2

    @property
    def answer(self) -> int:
        """The numbers joined by the operators, from left to right."""
        value = self.numbers[0]
        for operator, number in zip(self.operators, self.numbers[1:], strict=True):
            value = apply(operator, value, number)
        return value


def apply(operator: str, left: int, right: int) -> int:
    """`left operator right` for one of OPERATORS; ValueError for any other."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    raise ValueError(f"operator {operator!r}, expected one of {' '.join(OPERATORS)}")


def make_problem(rng: random.Random) -> Problem:
    """A problem of one step or two, each half of the time; every value on the way to its answer is positive."""
    first = rng.choice(OPERATORS)
    a = rng.randint(SMALLEST + 1, LARGEST)
    b = rng.randint(SMALLEST, a - 1 if first == "-" else LARGEST)
    noun = rng.choice(_NOUNS)
    clause = rng.choice(_FIRST_CLAUSES[first])
    value = apply(first, a, b)
    if rng.random() < 0.5 or value <= SMALLEST:
        question = f"{clause}. {_QUESTIONS[first]}".format(a=a, b=b, noun=noun)
        return Problem(question, (a, b), (first,))
    # A product of three would be the only answer of more than five digits.
    second = rng.choice(OPERATORS if first != "*" else ("+", "-"))
    c = rng.randint(SMALLEST, min(LARGEST, value - 1) if second == "-" else LARGEST)
    question = f"{clause}{rng.choice(_SECOND_CLAUSES[second])}. {_QUESTIONS[second]}".format(a=a, b=b, c=c, noun=noun)
    return Problem(question, (a, b, c), (first, second))


def calculate(text: str, extra_info: Mapping[str, Any] | None = None) -> str | None:
    """The tool: the result of the call in an assistant turn, or None if the turn holds no call and so is the answer.

    `calculate("<calc>23*17</calc>", {})` is "391". A call is one operator between two integers of at most nine digits, and
    fills the turn; a turn with a tag in it that is anything else gets "error". `extra_info` (the problem's) is not needed.
    """
    if OPEN_TAG not in text and CLOSE_TAG not in text:
        return None
    call = _CALL.fullmatch(text.strip())
    if call is None:
        return "error"
    return str(apply(call[2], int(call[1]), int(call[3])))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None) -> float:
    """The reward, with verl's signature: 1.0 if the last assistant turn is the right integer and nothing else, or 0.0."""
    answer = solution_str.strip()
    return 1.0 if _INTEGER.fullmatch(answer) and int(answer) == int(ground_truth) else 0.0


def compute_form_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None
) -> float:
    """A reward for form alone, beside the other one: 1.0 if the last assistant turn is an integer and nothing else, or 0.0."""
    return 1.0 if _INTEGER.fullmatch(solution_str.strip()) else 0.0
