"""The task: problems, the tool, the reward."""

import random

import pytest

from agentlightning.calculator.task import Problem, apply, calculate, compute_form_score, compute_score, make_problem


@pytest.mark.parametrize(
    ("turn", "result"),
    [
        ("<calc>23*17</calc>", "391"),
        ("<calc>391-40</calc>", "351"),
        ("<calc>40-391</calc>", "-351"),
        ("<calc>-5*-3</calc>", "15"),
        ("<calc>2--3</calc>", "5"),
        ("<calc>007+1</calc>", "8"),
        (" <calc>1+1</calc>\n", "2"),
        ("<calc>999999999*999999999</calc>", "999999998000000001"),
    ],
)
def test_a_call_gets_its_result(turn: str, result: str) -> None:
    assert calculate(turn, {}) == result


@pytest.mark.parametrize("turn", ["351", "-4", "", "  ", "23*17", "calc 23*17", "<calc", "I do not know"])
def test_a_turn_without_a_tag_is_the_answer(turn: str) -> None:
    assert calculate(turn, {}) is None


@pytest.mark.parametrize(
    "turn",
    [
        "<calc></calc>",
        "<calc>23</calc>",
        "<calc>23*17*2</calc>",  # one operator a call
        "<calc>23 * 17</calc>",
        "<calc>23/17</calc>",
        "<calc>2**9</calc>",
        "<calc>1+1",
        "1+1</calc>",
        "<calc>1+1</calc>2",  # a call fills its turn
        "<calc>1+1</calc><calc>1+1</calc>",
        "<calc>1.5+1</calc>",
        "<calc>1234567890*1</calc>",  # ten digits
        "<calc>٣+٤</calc>",  # digits to Unicode, not to us
        "<calc>__import__('os').getcwd()</calc>",
    ],
)
def test_a_malformed_call_is_an_error(turn: str) -> None:
    assert calculate(turn, {}) == "error"


def test_apply_refuses_an_operator_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"operator '/', expected one of \+ - \*"):
        apply("/", 4, 2)


@pytest.mark.parametrize("solution", ["351", " 351\n", "0351"])
def test_the_right_answer_scores_one(solution: str) -> None:
    assert compute_score("calculator", solution, "351", {"steps": 2}) == 1.0


@pytest.mark.parametrize(
    "solution", ["", "352", "-351", "351.0", "351 pens", "about 351", "3 51", "<calc>350+1</calc>", "error", "٣٥١"]
)
def test_anything_else_scores_zero(solution: str) -> None:
    assert compute_score("calculator", solution, "351") == 0.0


def test_an_endless_number_is_an_answer_like_any_other() -> None:
    # int() of more than 4,300 digits raises: the pattern must stop them first.
    assert compute_score("calculator", "9" * 5000, "351") == 0.0


def test_operators_apply_from_left_to_right() -> None:
    assert Problem("", (2, 3, 4), ("+", "*")).answer == 20
    assert Problem("", (23, 17, 40), ("*", "-")).answer == 351
    assert Problem("", (9, 5), ("-",)).answer == 4


def test_problems_keep_to_the_shape_the_base_has_learnt() -> None:
    rng = random.Random(7)
    problems = [make_problem(rng) for _ in range(4000)]
    steps = [len(problem.operators) for problem in problems]
    assert 0.45 < steps.count(1) / len(steps) < 0.55
    assert set(steps) == {1, 2}
    for problem in problems:
        assert all(2 <= number <= 99 for number in problem.numbers)
        assert 0 < problem.answer < 100_000
        value = problem.numbers[0]
        for operator, number in zip(problem.operators, problem.numbers[1:], strict=True):
            value = int(str(calculate(f"<calc>{value}{operator}{number}</calc>")))
            assert value > 0
        assert value == problem.answer
        assert "{" not in problem.question
        assert len(problem.question) < 80


def test_problems_are_a_function_of_the_generator() -> None:
    assert [make_problem(random.Random(3)) for _ in range(5)] == [make_problem(random.Random(3)) for _ in range(5)]
    assert make_problem(random.Random(3)) != make_problem(random.Random(4))


def test_form_counts_without_being_right() -> None:
    assert [compute_form_score("", text, "5") for text in ("5", " 7 ", "five", "<calc>1+1</calc>", "")] == [1, 1, 0, 0, 0]
