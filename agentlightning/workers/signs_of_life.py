"""Whether workers live, and whether they move: asked from beside while they compute.

Enters: Ray's actors. Leaves: the ranks of those that say nothing for too long, and of those that stand still.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

BESIDE = "beside"  # Ray's concurrency group for what must answer while a worker computes: saving, and signs of life
IDLE = "  (idle)\n"  # what a worker that computes nothing says of where it is
_PING_S = 10.0


def beside(method: Any) -> Any:
    """That method of an actor, in a thread beside the one that computes."""
    return method.options(concurrency_group=BESIDE)


@dataclass(slots=True)
class Place:
    """Where the computing thread of a worker was seen, and since when."""

    stack: str
    since: float
    told: bool = False


class SignsOfLife:
    """Asks workers now and then where they are: a busy one answers from a thread beside, a stopped one does not."""

    def __init__(self, actors: Sequence[Any], timeout_s: float) -> None:
        self.actors = actors
        self.timeout_s = timeout_s
        self.every_s = min(_PING_S, timeout_s / 4)
        self.patience_s = timeout_s - self.every_s
        self.asked: list[Any] = []
        self.asked_at = time.monotonic()
        self.places = [Place(IDLE, self.asked_at) for _ in actors]

    def silent(self) -> list[int]:
        """Ranks of those that have not answered for so long. The dead are found by whoever waits for their answer."""
        now = time.monotonic()
        if not self.asked:
            if now - self.asked_at >= self.every_s:
                self.asked, self.asked_at = [beside(actor.stack).remote() for actor in self.actors], now
            return []
        _, late = ray.wait(self.asked, num_returns=len(self.asked), timeout=0)
        if not late:
            self._note(now)
            self.asked = []
        elif now - self.asked_at >= self.patience_s:
            return [rank for rank, reference in enumerate(self.asked) if reference in late]
        return []

    def stuck(self) -> list[int]:
        """Ranks of those that live and were at one and the same line all that time. Each is named once."""
        now, found = time.monotonic(), []
        for rank, place in enumerate(self.places):
            if not place.told and place.stack != IDLE and now - place.since >= self.timeout_s:
                place.told = True
                found.append(rank)
        return found

    def _note(self, now: float) -> None:
        try:
            stacks: list[str] = ray.get(self.asked)  # all at once: see `RayWorkers._answers`
        except RayError:
            return  # one has died, which whoever waits for its answer is told
        for rank, stack in enumerate(stacks):
            if stack != self.places[rank].stack:
                self.places[rank] = Place(stack, now)
