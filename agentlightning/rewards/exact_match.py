"""Whether an answer is one of the right strings, once case, punctuation, articles and spaces are out of the way.

The normalisation is that of SQuAD (arXiv:1606.05250), which question answering with search uses as well.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None) -> float:
    """1.0 if the text in the last <answer> tag, or the whole text without one, is a right string, else 0.0.

    `ground_truth` is one string, several, or {"target": one or several}.
    """
    given = ground_truth["target"] if isinstance(ground_truth, Mapping) else ground_truth
    targets = given if isinstance(given, list | tuple) else [given]
    tags = _TAG.findall(solution_str)
    answer = normalized(tags[-1] if tags else solution_str)
    return 1.0 if any(answer == normalized(str(target)) for target in targets) else 0.0


def normalized(text: str) -> str:
    """Lower case, without punctuation and English articles, one space between words."""
    words = text.lower().translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
