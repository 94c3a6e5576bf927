"""What is wrong with the data is said before anything is computed, by datum and field."""

from __future__ import annotations

import pytest
import torch

from agentlightning.errors import UserError
from agentlightning.tinker.engine_data import Limits, check_data
from agentlightning.tinker.types import Datum, ModelInput

LIMITS = Limits(vocabulary=264, context=8)
GOOD = {"target_tokens": [2, 3, 4], "logprobs": [-1.0, -1, -1], "advantages": [1.0, 1, 1]}


def datum(tokens: int = 3, **inputs: object) -> Datum:
    return Datum(ModelInput.from_ints(list(range(1, 1 + tokens))), inputs)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (datum(0, **GOOD), r"datum 1, model_input: given 0 tokens, expected 1 to 8"),
        (datum(9, **GOOD), r"datum 1, model_input: given 9 tokens"),
        (Datum(ModelInput.from_ints([1, 264, 2]), GOOD), r"datum 1, model_input: given token id 264, expected 0 to 263"),
        (datum(**{**GOOD, "target_tokens": [2, -1, 4]}), r"datum 1, target_tokens: given token id -1"),
        (datum(**{**GOOD, "target_tokens": [2, 3]}), r"datum 1, target_tokens: given shape \[2\], expected \[3\]"),
        (datum(**{**GOOD, "target_tokens": [[2], [3], [4]]}), r"target_tokens: given shape \[3, 1\], expected \[3\] for"),
        (datum(**{**GOOD, "target_tokens": torch.tensor([2.0, 3, 4])}), r"target_tokens: given float32, expected int64"),
        (datum(**{**GOOD, "advantages": [1.0, 2]}), r"datum 1, advantages: given shape \[2\], expected that of target_tokens"),
        (datum(**{**GOOD, "logprobs": [-1.0, float("nan"), 0]}), r"datum 1, logprobs: given nan at position 1"),
        (datum(**{**GOOD, "advantages": [float("inf"), 1, 0]}), r"datum 1, advantages: given inf at position 0"),
        (datum(target_tokens=[2, 3, 4], logprobs=[-1.0, -1, -1]), r"datum 1, advantages: not given, and loss_fn=ppo needs"),
        (datum(**GOOD, mask=[1.0, 1, 1]), r"datum 1, loss_fn_inputs: given 'mask', expected some of target_tokens, weights"),
        (datum(), r"datum 1, target_tokens: not given"),
    ],
)
def test_a_bad_datum_is_named(bad: Datum, words: str):
    with pytest.raises(UserError, match=words):
        check_data([datum(**GOOD), bad], "ppo", None, LIMITS)


@pytest.mark.parametrize(
    ("loss_fn", "config", "words"),
    [
        ("pppo", {}, "loss_fn: given 'pppo', expected one of cross_entropy"),
        ("custom", {"loss_id": "x"}, "forward_backward_custom"),
        ("ppo", {"epsilon": 0.2}, "loss_fn_config: given 'epsilon', expected one of clip_low_threshold"),
        ("importance_sampling", {"beta": 1.0}, "expected nothing: loss_fn=importance_sampling has no"),
        ("ppo", {"clip_low_threshold": "0.8"}, "clip_low_threshold: given '0.8', expected a finite number"),
        ("dro", {"beta": float("nan")}, "beta: given nan"),
        ("cispo", {"clip_low_threshold": 5.0}, "clip_low_threshold=5 above clip_high_threshold=4"),
    ],
)
def test_a_bad_loss_is_named(loss_fn: str, config: dict, words: str):
    with pytest.raises(UserError, match=words):
        check_data([datum(**GOOD)], loss_fn, config, LIMITS)


def test_no_data_is_an_error():
    with pytest.raises(UserError, match="given no data"):
        check_data([], "ppo", None, LIMITS)


def test_what_was_left_out_is_filled_in():
    checked = check_data([datum(**GOOD, clip_low_threshold=[0.1, 0.2, 0.3])], "gspo", {"clip_high_threshold": 1.5}, LIMITS)
    columns = {name: column[:, 0].tolist() for name, column in checked.data[0].columns.items()}
    assert columns["weights"] == [1, 1, 1]
    assert columns["clip_low_threshold"] == pytest.approx([0.1, 0.2, 0.3])
    assert columns["clip_high_threshold"] == [1.5] * 3
    assert columns["sequence_ratio_mask"] == [1, 1, 1]


def test_columns_of_another_loss_are_ignored():
    (one,) = check_data([datum(**GOOD)], "cross_entropy", None, LIMITS).data
    assert list(one.columns) == ["weights"]
