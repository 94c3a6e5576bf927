"""Reward functions: found by file or by name, called with verl's words, and held to finite numbers."""

import numpy as np
import pytest
import torch

from agentlightning.errors import ConfigError, RewardError
from agentlightning.types import Completion, Prompt
from agentlightning.verl.config import load_config
from agentlightning.verl.rewards import load_reward, score
from agentlightning.verl.schema import RewardFunctionConfig

PROMPTS = [
    Prompt("train:0", ({"role": "user", "content": "2+2?"},), (1,), "sums", "4", {"index": 0}),
    Prompt("train:7", ({"role": "user", "content": "3*3?"},), (2,), "products", "9", {"index": 7}),
]


def _completion(uid, sample_index, *contents):
    roles = ("assistant", "tool") * 3
    turns = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    empty = np.zeros(0, dtype=np.float32)
    return Completion(uid, sample_index, empty.astype(np.int32), empty.astype(bool), empty, turns, "stop", 0)


COMPLETIONS = [
    _completion("train:0", 0, "4"),
    _completion("train:0", 1, "5"),
    _completion("train:7", 0, "<calc>3*3</calc>", "9", "9"),
    _completion("train:7", 1, "8"),
]


def _right(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str == ground_truth


def test_scores_come_in_the_order_of_the_completions():
    result = score(_right, PROMPTS, COMPLETIONS)
    assert result.score_B.dtype == np.float32
    assert result.score_B.tolist() == [1, 0, 1, 0]
    assert result.extra == {}


def test_the_function_sees_verls_arguments_and_the_conversation():
    seen = []

    def record(**arguments):
        seen.append(arguments)
        return 0.0

    score(record, PROMPTS, COMPLETIONS[2:3])
    assert seen == [
        {
            "data_source": "products",
            "solution_str": "9",
            "ground_truth": "9",
            "extra_info": {
                "index": 7,
                "num_turns": 2,
                "messages": [
                    {"role": "user", "content": "3*3?"},
                    {"role": "assistant", "content": "<calc>3*3</calc>"},
                    {"role": "tool", "content": "9"},
                    {"role": "assistant", "content": "9"},
                ],
            },
        }
    ]
    assert PROMPTS[1].extra_info == {"index": 7}


def test_a_dict_gives_a_score_and_further_numbers():
    def both(solution_str, **_):
        return {"score": 0.5, "acc": solution_str == "4", "length": len(solution_str), "note": "text"}

    result = score(both, PROMPTS, COMPLETIONS[:2])
    assert result.score_B.tolist() == [0.5, 0.5]
    assert result.extra == {"acc": [1.0, 0.0], "length": [1.0, 1.0]}


def test_a_number_that_only_some_samples_report_is_left_out():
    def sometimes(solution_str, **_):
        return {"score": 1, "bonus": 2} if solution_str == "4" else {"score": 0}

    assert score(sometimes, PROMPTS, COMPLETIONS).extra == {}


@pytest.mark.parametrize("value", [1, True, np.float64(1), np.int32(1), torch.tensor(1.0)])
def test_every_kind_of_number_is_welcome(value):
    assert score(lambda **_: value, PROMPTS, COMPLETIONS[:1]).score_B.tolist() == [1.0]


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 1e39, None, "1", [1.0, 2.0], torch.tensor(float("nan")), {"score": None}],
)
def test_anything_else_names_the_sample(value):
    def third(solution_str, **_):
        return value if solution_str == "8" else 1.0

    with pytest.raises(RewardError, match=r"for sample 1 of train:7, expected a finite number"):
        score(third, PROMPTS, COMPLETIONS)


def test_a_dict_without_a_score_names_the_sample():
    with pytest.raises(RewardError, match=r"\{'acc': 1\} for sample 0 of train:0, expected a number or a dict with \"score\""):
        score(lambda **_: {"acc": 1}, PROMPTS, COMPLETIONS)


def test_a_function_that_raises_names_the_sample_and_keeps_its_error():
    def broken(ground_truth, **_):
        return 1.0 / (int(ground_truth) - 9)

    with pytest.raises(RewardError, match=r"raised ZeroDivisionError for sample 0 of train:7") as error:
        score(broken, PROMPTS, COMPLETIONS)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_no_completions_no_scores():
    result = score(_right, PROMPTS, [])
    assert (result.score_B.shape, result.extra) == ((0,), {})


def test_the_default_reward_is_the_calculators():
    function = load_reward(load_config().custom_reward_function)
    assert function(data_source="calculator", solution_str=" 351\n", ground_truth="351", extra_info={}) == 1.0


def test_a_function_in_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Thing:\n    value: 'float'\n\n\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return Thing(0.25).value\n"
    )
    function = load_reward(RewardFunctionConfig(path=str(tmp_path / "mine.py"), name="compute_score"))
    assert score(function, PROMPTS, COMPLETIONS[:1]).score_B.tolist() == [0.25]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (
            None,
            "compute_score",
            ["custom_reward_function.path", "is not a Python file", "custom_reward_function.path=<file>.py"],
        ),
        ("def score(): ...\n", "compute_score", ["custom_reward_function.name", "no function 'compute_score'", "it has score"]),
        ("compute_score = 3\n", "compute_score", ["no function 'compute_score'", "it has none"]),
        ("def compute_score(:\n", "compute_score", ["custom_reward_function.path", "cannot be imported"]),
        ("import no_such_module\n", "compute_score", ["custom_reward_function.path", "No module named 'no_such_module'"]),
    ],
)
def test_a_file_that_does_not_hold_the_function(content, name, words, tmp_path):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_reward(RewardFunctionConfig(path=str(path), name=name))
    assert str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no.such.module:fn", ["cannot import no.such.module", "custom_reward_function.name=pkg.mod:fn"]),
        ("agentlightning.calculator.task:compute", ["no function 'compute'", "compute_score", "custom_reward_function.name="]),
    ],
)
def test_a_name_that_leads_nowhere(name, words):
    with pytest.raises(ConfigError) as error:
        load_reward(RewardFunctionConfig(path=None, name=name))
    for word in words:
        assert word in str(error.value)
