"""The reward of GSM8K (arXiv:2110.14168) as verl gives it: the final number of a worked answer.

`compute_score` wants the number behind `####`, which teaches the form as well; `flexible` takes the last number of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[0-9.,]+")
_TAIL = 300  # characters: the final number stands at the end, and the search stays short


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None) -> float:
    """1.0 if the last number that follows "#### " is `ground_truth`, else 0.0."""
    found = _STRICT.findall(solution_str[-_TAIL:])
    return _score(found[-1] if found else None, ground_truth)


def flexible(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None) -> float:
    """1.0 if the last number in the text is `ground_truth`, else 0.0."""
    found = [number for number in _FLEXIBLE.findall(solution_str[-_TAIL:]) if number.strip(".,-")]
    return _score(found[-1].rstrip(".,") if found else None, ground_truth)


def _score(answer: str | None, ground_truth: Any) -> float:
    if answer is None:
        return 0.0
    return 1.0 if answer.replace(",", "") == str(ground_truth).replace(",", "").strip() else 0.0
