"""Whether an answer is mathematically equal to the right one: 1/2, 0.5 and \\frac{1}{2} are the same.

A solution and a LaTeX or plain expression go in; 1.0 or 0.0 comes out. Parsing and comparing are math-verify's
(https://github.com/huggingface/Math-Verify), on sympy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_TIMEOUT_S = 5  # of parsing and of comparing; sympy can take for ever over an answer such as 9^{9^{9^9}}
_MOST_CHARACTERS = 20_000  # of the end of the solution, where the answer stands
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_GOLD = (LatexExtractionConfig(), ExprExtractionConfig())
logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it tells of every answer that it cannot parse


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None) -> float:
    r"""1.0 if the answer in `solution_str` (the last \boxed{}, or else its last expression) equals `ground_truth`, else 0.0.

    What cannot be parsed or compared within 5 s is no answer. Raises ValueError if `ground_truth` is no expression. The limit
    is kept by an alarm signal and so only in a main thread, which is where a reward function runs.
    """
    timeout_s = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    gold = _parsed_gold(str(ground_truth), timeout_s)
    if not gold:
        raise ValueError(f"the ground truth {ground_truth!r} is no mathematical expression")
    solution = _from_last_box(solution_str[-_MOST_CHARACTERS:])
    answer = parse(solution, _TARGETS, parsing_timeout=timeout_s)  # pyright: ignore[reportArgumentType]
    return 1.0 if answer and verify(gold, answer, timeout_seconds=timeout_s) else 0.0


def _from_last_box(text: str) -> str:
    r"""The last \boxed{...}, since math-verify makes one set of several; the whole text without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0 and text[at] == "}":
            return text[start : at + 1]
    return text[start:]


def _parsed_gold(text: str, timeout_s: int | None) -> list[Any]:
    """`text` parsed as the content of a box, or else as it stands."""
    for candidate in (f"\\boxed{{{text}}}", text):
        parsed = parse(candidate, _GOLD, parsing_timeout=timeout_s)  # pyright: ignore[reportArgumentType]
        if parsed:
            return parsed
    return []
