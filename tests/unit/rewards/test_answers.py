"""The built-in rewards of text: exact match, GSM8K, mathematical equality, and the choice by data_source."""

import threading

import pytest

from agentlightning import rewards
from agentlightning.rewards import exact_match, gsm8k, math_equality


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0),
        ("I think <answer>no</answer> <answer> Yes! </answer>", "yes", 1.0),
        ("Paris", ["London", "paris"], 1.0),
        ("Paris", {"target": ["PARIS"]}, 1.0),
        ("Paris, France", "Paris", 0.0),
        ("<answer></answer> Paris", "Paris", 0.0),
    ],
)
def test_exact_match(answer, truth, score):
    assert exact_match.compute_score("qa", answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("6 * 7 = 42\n#### 42", 1.0, 1.0),
        ("#### 41\n#### 42", 1.0, 1.0),
        ("#### 0,042", 0.0, 0.0),
        ("The answer is 42.", 0.0, 1.0),
        ("#### 42 and then 43", 1.0, 0.0),
        ("42 eggs ... - , .", 0.0, 1.0),
        ("", 0.0, 0.0),
        ("#### 42" + " " * 300, 0.0, 0.0),
    ],
)
def test_gsm8k(answer, strict, flexible):
    assert gsm8k.compute_score("openai/gsm8k", answer, "42") == strict
    assert gsm8k.flexible("openai/gsm8k", answer, "42") == flexible


def test_gsm8k_does_not_mind_thousands():
    assert gsm8k.compute_score("openai/gsm8k", "#### 1,234", "1234") == 1.0
    assert gsm8k.compute_score("openai/gsm8k", "#### -5", "-5") == 1.0


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        (r"so it is \boxed{\frac12}", "0.5", 1.0),
        (r"First \boxed{1}. That is wrong. Hence \boxed{3/6}.", r"\frac{1}{2}", 1.0),
        (r"the answer is $x^2+2x+1$", "(x+1)^2", 1.0),
        (r"\boxed{1/2} or \boxed{\frac{7}{2}}, perhaps", "1/2", 0.0),
        (r"\boxed{3}", "4", 0.0),
        ("the answer is 42", "42", 1.0),
        (r"\boxed{\text{even}}", "even", 1.0),
        ("", "42", 0.0),
    ],
)
def test_mathematical_equality(answer, truth, score):
    assert math_equality.compute_score("math", answer, truth) == score


def test_an_answer_that_takes_for_ever_to_compute_is_none(monkeypatch):
    monkeypatch.setattr(math_equality, "_TIMEOUT_S", 1)
    assert math_equality.compute_score("math", r"\boxed{9^{9^{9^{9}}}}", "3") == 0.0


def test_mathematics_in_a_thread():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(math_equality.compute_score("math", r"\boxed{7}", "7")))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_a_ground_truth_that_is_no_expression():
    with pytest.raises(ValueError, match="ground truth ''"):
        math_equality.compute_score("math", r"\boxed{7}", "")


@pytest.mark.parametrize(
    ("source", "answer", "truth"),
    [
        ("openai/gsm8k", "#### 42", "42"),
        ("HuggingFaceH4/MATH-500", r"\boxed{1/2}", "0.5"),
        ("aime2025", r"\boxed{70}", "70"),
        ("searchR1_nq", "<answer>the moon</answer>", {"target": ["Moon"]}),
        ("codecontests", "```python\nprint(int(input()) + 1)\n```", {"inputs": ["1"], "outputs": ["2"]}),
    ],
)
def test_the_choice_by_data_source(source, answer, truth):
    result = rewards.compute_score(source, answer, truth)
    assert (result["score"] if isinstance(result, dict) else result) == 1.0


def test_an_unknown_data_source():
    with pytest.raises(
        ValueError, match=r"no reward for data_source 'eggs'; expected openai/gsm8k.*custom_reward_function.name="
    ):
        rewards.compute_score("eggs", "1", "1")
