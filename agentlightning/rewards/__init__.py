"""Built-in reward functions, with verl's signature, and the choice among them by `data_source`.

What a sample was asked and answered goes in; a number, or a dictionary with "score", comes out. `compute_score` is for data
that verl's own scripts prepared: `custom_reward_function.name=agentlightning.rewards:compute_score`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MATH = frozenset(
    {
        "lighteval/MATH",
        "DigitalLearningGmbH/MATH-lighteval",
        "HuggingFaceH4/MATH-500",
        "math",
        "math_dapo",
        "math_dapo_reasoning",
        "numina_aops_forum",
        "numina_synthetic_math",
        "numina_amc_aime",
        "numina_synthetic_amc",
        "numina_cn_k12",
        "numina_olympiads",
    }
)
_CODE = frozenset({"codecontests", "apps", "codeforces", "taco"})


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> float | dict[str, float]:
    """The score by the function that verl's `default_compute_score` would choose for `data_source`.

    openai/gsm8k: the number after ####. Mathematics (MATH, DAPO, AIME, Numina): equality. Code (APPS, TACO, ...): the test
    cases. searchR1_*: the normalised string. Raises ValueError for another source.
    """
    # Imported where they are needed: the sum of them takes a second.
    if data_source == "openai/gsm8k":
        from agentlightning.rewards import gsm8k

        return gsm8k.compute_score(data_source, solution_str, ground_truth, extra_info)
    if data_source in _MATH or data_source.startswith("aime"):
        from agentlightning.rewards import math_equality

        return math_equality.compute_score(data_source, solution_str, ground_truth, extra_info)
    if data_source in _CODE:
        from agentlightning.rewards import code

        return code.compute_score(data_source, solution_str, ground_truth, extra_info)
    if data_source.startswith("searchR1_"):
        from agentlightning.rewards import exact_match

        return exact_match.compute_score(data_source, solution_str, ground_truth, extra_info)
    raise ValueError(
        f"no reward for data_source {data_source!r}; expected openai/gsm8k, a mathematics or code source of verl's, aime* or "
        "searchR1_*; name one with custom_reward_function.name=agentlightning.rewards.math_equality:compute_score or another"
    )
