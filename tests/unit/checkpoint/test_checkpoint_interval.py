"""save_freq=auto: the interval against the exact expected time of a run, and what is chosen from what was measured."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from agentlightning.checkpoint.history import FailureSummary
from agentlightning.checkpoint.interval import PRIOR_S, AutoInterval, Choice, expected_mtbf, young_daly

HOUR = 3600.0
NONE_YET = FailureSummary(0, 0.0)


def time_factor(tau: np.ndarray | float, cost: float, mtbf: float) -> np.ndarray:
    """Expected time of a run over its work, by Daly's complete model with failures that are exponential, without restarts."""
    tau = np.asarray(tau, np.float64)
    return mtbf * np.expm1((tau + cost) / mtbf) / tau


def measured(*, step: float, save: float, beside: float | None = None, written: float = 0.0) -> AutoInterval:
    """An interval that has seen ten steps and saves of each kind."""
    auto = AutoInterval()
    for _ in range(10):
        auto.observe_step(step, saving=False)
        if beside is not None:
            auto.observe_step(beside, saving=True)
        auto.observe_save(save, written)
    return auto


@pytest.mark.parametrize("mtbf", [600.0, 6 * HOUR, 1000 * HOUR])
@pytest.mark.parametrize("ratio", [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5, 1.0, 1.5, 1.99, 2.0, 3.0])
def test_no_other_interval_finishes_a_run_noticeably_sooner(ratio: float, mtbf: float) -> None:
    cost = ratio * mtbf
    ours = young_daly(cost, mtbf)
    grid = np.geomspace(1e-6, 10, 40_000) * mtbf  # neighbours differ by 0.04 %
    times = time_factor(grid, cost, mtbf)
    ours_time = float(time_factor(ours, cost, mtbf))
    assert ours_time <= times.min() * (1.001 if ratio <= 1 else 1.002)
    if ratio <= 1e-2:  # where a run can be sensibly made, the overhead itself is the least one, and the interval the best
        assert ours_time - 1 <= (times.min() - 1) * 1.0001
        assert ours == pytest.approx(grid[times.argmin()], rel=1e-2)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5])
def test_the_higher_terms_are_what_they_are_for(ratio: float) -> None:
    young = math.sqrt(2 * ratio)  # the first order alone, with a mean time between failures of 1
    assert time_factor(young_daly(ratio, 1.0), ratio, 1.0) < time_factor(young, ratio, 1.0)


def test_the_ends_of_the_interval() -> None:
    assert young_daly(0.0, HOUR) == 0.0
    assert young_daly(2 * HOUR, HOUR) == HOUR
    assert young_daly(1e9, HOUR) == HOUR
    for cost, mtbf in [(-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.inf)]:
        with pytest.raises(ValueError, match="cost_s="):
            young_daly(cost, mtbf)


def test_what_was_seen_takes_over_from_the_prior() -> None:
    assert expected_mtbf(0, 0.0) == PRIOR_S
    assert expected_mtbf(2, 1.3 * HOUR) == pytest.approx(7.3 / 3 * HOUR)
    assert expected_mtbf(1000, 1000 * HOUR) == pytest.approx(HOUR, rel=0.01)  # one an hour
    assert expected_mtbf(0, 1000 * HOUR) > 1000 * HOUR


def test_every_step_until_something_was_measured() -> None:
    auto = AutoInterval()
    nothing = Choice(1, "save_freq=auto: every step, until a save is measured", None, None, None, PRIOR_S)
    assert auto.choose(NONE_YET) == nothing
    auto.observe_step(8.0, saving=False)
    assert auto.choose(NONE_YET) == nothing
    auto.observe_save(0.5)
    choice = auto.choose(NONE_YET)
    assert (choice.cost_s, choice.step_s) == (0.5, 8.0)
    assert choice.steps == round(young_daly(0.5, PRIOR_S) / 8.0) == 18
    assert choice.seconds == 18 * 8.0


def test_the_line_on_the_console() -> None:
    failures = FailureSummary(2, 1.3 * HOUR)
    assert measured(step=8.0, save=0.065).choose(failures).why == (
        "save_freq=auto: every 4 steps (32 s): a save costs 65 ms, a step takes 8.0 s, "
        "2 failures in 1.3 h (one in 2.4 h expected)"
    )
    assert measured(step=90.0, save=0.21).choose(FailureSummary(1, 600.0)).why == (
        "save_freq=auto: every step (90 s): a save costs 0.21 s, a step takes 90 s, 1 failure in 10 min (one in 3.1 h expected)"
    )
    assert "no failure in 0 s (one in 6.0 h expected)" in measured(step=8.0, save=0.2).choose(NONE_YET).why


def test_a_save_that_costs_nothing_is_made_at_every_step() -> None:
    assert measured(step=8.0, save=0.0).choose(NONE_YET).steps == 1
    assert measured(step=0.0, save=0.0).choose(NONE_YET).steps == 1


def test_a_costlier_save_is_made_more_seldom_and_a_run_that_fails_more_saves_more_often() -> None:
    by_cost = [measured(step=1.0, save=save).choose(NONE_YET).steps for save in (0.01, 0.1, 1.0, 10.0)]
    assert by_cost == sorted(set(by_cost))
    by_failures = [measured(step=1.0, save=1.0).choose(FailureSummary(count, HOUR)).steps for count in (0, 3, 20, 100)]
    assert by_failures == sorted(set(by_failures), reverse=True)


def test_how_much_a_save_slows_the_steps_beside_it_is_part_of_its_cost() -> None:
    assert measured(step=8.0, save=0.2, beside=9.0).choose(NONE_YET).cost_s == pytest.approx(1.2)
    assert measured(step=8.0, save=0.2, beside=7.0).choose(NONE_YET).cost_s == pytest.approx(0.2)  # noise is no gain
    three_steps_long = measured(step=8.0, save=0.2, beside=9.0, written=20.0).choose(NONE_YET)
    assert three_steps_long.cost_s == pytest.approx(3.2)
    auto = AutoInterval()
    auto.observe_save(0.2)
    for seconds in (8.0, 8.0, 8.0):
        auto.observe_step(seconds, saving=False)
    for seconds in (30.0, 30.0):
        auto.observe_step(seconds, saving=True)
    assert auto.choose(NONE_YET).cost_s == pytest.approx(0.2)  # two samples are none
    assert auto.choose(NONE_YET).step_s == 8.0


def test_steps_without_a_save_beside_them_are_sought_until_there_are_enough() -> None:
    # Every step is saved and every save slows the next step by 4 s: saving at every step would never find that out.
    auto, last_saved, saved_at = AutoInterval(), 0, []
    for step in range(1, 40):
        auto.observe_step(12.0 if last_saved == step - 1 > 0 else 8.0, saving=last_saved == step - 1 > 0)
        if auto.choose(FailureSummary(3000, PRIOR_S)).due(step, last_saved):
            last_saved = step
            saved_at.append(step)
            auto.observe_save(0.001, written_s=5.0)
    assert saved_at[:3] == [1, 3, 5]
    choice = auto.choose(FailureSummary(3000, PRIOR_S))
    assert choice.cost_s == pytest.approx(4.001)
    assert choice.steps == round(young_daly(4.001, choice.mtbf_s) / 8.0) == 1
    assert saved_at[-10:] == list(range(30, 40))  # it went back to every step, which is best with a failure every 14 seconds

    auto = AutoInterval()
    auto.observe_step(8.0, saving=False)
    auto.observe_save(0.0, written_s=5.0)
    auto.observe_step(12.0, saving=True)
    probing = auto.choose(NONE_YET)
    assert probing.steps == 2
    assert "for now, to see steps beside which no save is written" in probing.why


def test_no_save_is_asked_for_while_the_one_before_is_being_written() -> None:
    choice = measured(step=8.0, save=0.0, beside=8.0, written=20.0).choose(NONE_YET)
    assert choice.steps == 3
    assert choice.why.startswith("save_freq=auto: every 3 steps (24 s): writing a save takes 20 s, a save costs 0 s")


def test_the_number_does_not_flicker() -> None:
    auto, shown = measured(step=8.0, save=0.2), []
    random = np.random.default_rng(0)
    for _ in range(300):
        auto.observe_step(8.0 * random.uniform(0.7, 1.3), saving=False)
        auto.observe_save(0.2 * random.uniform(0.5, 1.5))
        shown.append(auto.choose(FailureSummary(2, 1.3 * HOUR)).steps)
    assert len(set(shown)) == 1


def test_it_follows_what_changes_and_forgets_a_slow_first_save() -> None:
    auto = measured(step=1.0, save=1.0)
    before = auto.choose(NONE_YET).steps
    for _ in range(20):
        auto.observe_step(10.0, saving=False)
        auto.observe_save(1.0)
    assert auto.choose(NONE_YET).steps == round(before / 10)

    auto = AutoInterval()
    auto.observe_step(1.0, saving=False)
    auto.observe_save(100.0)
    auto.observe_save(0.1)
    assert auto.choose(NONE_YET).cost_s == 0.1


def test_when_a_save_is_due() -> None:
    choice = Choice(4, "", None, None, None, HOUR)
    assert [step for step in range(10, 20) if choice.due(step, last_saved_step=10)] == [14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_duration_that_is_none_is_refused(seconds: float) -> None:
    auto = AutoInterval()
    with pytest.raises(ValueError, match="a step took"):
        auto.observe_step(seconds, saving=False)
    with pytest.raises(ValueError, match="a save took"):
        auto.observe_save(seconds)
    with pytest.raises(ValueError, match="writing a save took"):
        auto.observe_save(0.0, seconds)


durations = st.floats(0, 1e7)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    observed=st.lists(st.tuples(st.sampled_from(["free", "beside", "save"]), durations, durations), max_size=30),
    failures=st.integers(0, 10**6),
    seconds=st.floats(0, 1e10),
)
def test_whatever_was_measured_the_choice_is_a_number_of_steps(
    observed: list[tuple[str, float, float]], failures: int, seconds: float
) -> None:
    auto = AutoInterval()
    for kind, first, second in observed:
        if kind == "save":
            auto.observe_save(first, second)
        else:
            auto.observe_step(first, saving=kind == "beside")
        choice = auto.choose(FailureSummary(failures, seconds))
        assert isinstance(choice.steps, int)
        assert choice.steps >= 1
        assert 0 < choice.mtbf_s < math.inf
        assert choice.due(choice.steps, 0)
        assert not choice.due(choice.steps - 1, 0)
        assert "\n" not in choice.why
        for value in (choice.seconds, choice.cost_s, choice.step_s):
            assert value is None or (math.isfinite(value) and value >= 0)
        # Asked again it says the same.
        assert auto.choose(FailureSummary(failures, seconds)) == choice


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(cost=st.floats(0, 1e9), mtbf=st.floats(1e-3, 1e12))
def test_the_interval_lies_between_nothing_and_the_time_between_failures(cost: float, mtbf: float) -> None:
    assert 0 <= young_daly(cost, mtbf) <= mtbf
