"""How often `save_freq=auto` saves. Measured steps and saves and the run's failures enter; a number of steps and why leave.

Saving often costs time in every interval, saving seldom costs the work since the last save at every failure. Between them
lies one interval that loses least, and it can be computed. No clock and no file here: the caller measures.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

from agentlightning.checkpoint.history import FailureSummary

PRIOR_S = 6 * 3600.0  # see expected_mtbf
WINDOW = 20  # steps of a kind, and saves: recent enough to follow answers that grow, enough for a steady median
MIN_SAMPLES = 3  # of either kind of step, before their difference counts: a median of fewer is moved by a single cold step
TOLERANCE = 1.5  # see AutoInterval.choose
_TICK_S = 1e-6  # no step is shorter; it keeps the number of steps finite where a clock saw no time pass


def young_daly(cost_s: float, mtbf_s: float) -> float:
    """The seconds of work between two saves that lose least, if a save costs `cost_s` and failures come `mtbf_s` apart.

    Young's sqrt(2 C M) (J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974) with
    the next terms by Daly (J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS
    22(3), 2006). The time of a restart is lost at every failure whatever the interval, so it is not in it; neither is the time
    that a save needs in the background until it is durable.
    """
    if not (math.isfinite(cost_s) and cost_s >= 0 and math.isfinite(mtbf_s) and mtbf_s > 0):
        raise ValueError(f"cost_s={cost_s}, mtbf_s={mtbf_s}; expected finite numbers, at least 0 and above 0")
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    # Rounding may leave less than nothing where the two terms all but cancel.
    return max(0.0, math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s)


def expected_mtbf(failures: int, seconds: float) -> float:
    """The seconds between failures to expect after `failures` in `seconds` of running.

    A run that has not failed yet has no mean, and one that failed in its first minute will not fail every minute. So it begins
    as if it had already been seen for `PRIOR_S`, 6 hours, and failed once in it (a Gamma prior of shape 1 on the rate; this is
    one over the posterior's mean). That is the order in which spot machines are taken back and the time limits of clusters
    strike. It is a start only: after a few failures, or a day without any, what was seen has taken over.
    """
    return (seconds + PRIOR_S) / (failures + 1)


@dataclass(frozen=True, slots=True)
class Choice:
    """How often to save, and the numbers it follows from.

    Example: `Choice(4, "save_freq=auto: every 4 steps (32 s): a save costs ...", 32.0, 0.025, 8.0, 8760.0)`.
    """

    steps: int  # at least 1
    why: str  # one line for the console
    seconds: float | None  # of work between two saves; None, like the next two, before a step and a save were measured
    cost_s: float | None  # by which one save makes the run longer
    step_s: float | None  # a step beside which no save is written
    mtbf_s: float  # expected between failures

    def due(self, step: int, last_saved_step: int) -> bool:
        """Whether the state after `step` is to be saved."""
        return step - last_saved_step >= self.steps


class AutoInterval:
    """Measures steps and saves, and chooses.

    Example: `auto = AutoInterval()`, after each step `auto.observe_step(8.1, saving=False)`, after each save
    `auto.observe_save(0.2)`, then `auto.choose(history.summary()).due(step, last_saved_step)`.
    """

    def __init__(self) -> None:
        self._free: deque[float] = deque(maxlen=WINDOW)
        self._beside: deque[float] = deque(maxlen=WINDOW)
        self._blocked: deque[float] = deque(maxlen=WINDOW)
        self._written: deque[float] = deque(maxlen=WINDOW)
        self._steps = 1

    def observe_step(self, seconds: float, saving: bool) -> None:
        """A step took this long, its own save not in it. `saving`: an earlier save was being written during some of it."""
        (self._beside if saving else self._free).append(_duration("a step", seconds))

    def observe_save(self, blocked_s: float, written_s: float = 0.0) -> None:
        """A save stopped the run for `blocked_s` and was then written beside the steps for `written_s`, until durable.

        The wait for the save before is not in `blocked_s`: it is not a cost of saving but of saving faster than the disk, which
        `choose` avoids by `written_s`. Counted here, the interval would swing between too long and too short.
        """
        self._blocked.append(_duration("a save", blocked_s))
        self._written.append(_duration("writing a save", written_s))

    def choose(self, failures: FailureSummary) -> Choice:
        """The steps between saves that lose least, by what is known now. Every step as long as no step or no save was seen.

        The loss is so flat around its minimum that half as much more or less costs next to nothing. So the number given last
        stays while it is within `TOLERANCE` of the best: a console that reports changes stays quiet.
        """
        mtbf_s = expected_mtbf(failures.failures, failures.seconds)
        steps_seen = [*self._free, *self._beside]
        if not steps_seen or not self._blocked:
            return Choice(1, "save_freq=auto: every step, until a save is measured", None, None, None, mtbf_s)
        step_s = max(_TICK_S, median(self._free if len(self._free) >= MIN_SAMPLES else steps_seen))
        written_s = median_low(self._written)
        # A save that is not durable yet makes the next one wait: the run cannot save more often, only stand still more often.
        touched = max(1, math.ceil(written_s / step_s))
        # The low one of two: what is unusual is the first save, which prepares its buffers, and it is the slower one.
        cost_s = median_low(self._blocked) + touched * self._slowdown()
        probing = bool(self._beside) and len(self._free) < MIN_SAMPLES
        best = max(1.0, young_daly(cost_s, mtbf_s) / step_s)
        least = touched + 1 if probing else touched
        if self._steps < least or not best / TOLERANCE <= self._steps <= max(best, least) * TOLERANCE:
            self._steps = max(least, round(best))
        seconds = self._steps * step_s
        every = "every step" if self._steps == 1 else f"every {self._steps} steps"
        reasons = [f"a save costs {_in_words(cost_s)}", f"a step takes {_in_words(step_s)}", _seen(failures, mtbf_s)]
        if probing and best < least:
            reasons.insert(0, "for now, to see steps beside which no save is written")
        elif best < least and touched > 1:
            reasons.insert(0, f"writing a save takes {_in_words(written_s)}")
        why = f"save_freq=auto: {every} ({_in_words(seconds)}): {', '.join(reasons)}"
        return Choice(self._steps, why, seconds, cost_s, step_s, mtbf_s)

    def _slowdown(self) -> float:
        """By how much a save that is being written makes a step longer."""
        if len(self._free) < MIN_SAMPLES or len(self._beside) < MIN_SAMPLES:
            return 0.0
        return max(0.0, median(self._beside) - median(self._free))


def _duration(what: str, seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{what} took {seconds} seconds; expected a finite number, at least 0: measure with a monotonic clock")
    return seconds


def _seen(failures: FailureSummary, mtbf_s: float) -> str:
    count = {0: "no failure", 1: "1 failure"}.get(failures.failures, f"{failures.failures} failures")
    return f"{count} in {_in_words(failures.seconds)} (one in {_in_words(mtbf_s)} expected)"


_UNITS: Sequence[tuple[float, float, str]] = ((0.1, 1e-3, "ms"), (120.0, 1.0, "s"), (3600.0, 60.0, "min"))


def _in_words(seconds: float) -> str:
    """Two digits and a unit: 40 ms, 0.21 s, 8.0 s, 32 s, 5.3 min, 1.3 h."""
    if not seconds:
        return "0 s"
    size, unit = next(((size, unit) for below, size, unit in _UNITS if seconds < below), (3600.0, "h"))
    value = seconds / size
    return f"{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f} {unit}"
