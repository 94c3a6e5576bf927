"""A process that calls a reward function, so that a call that hangs can be killed with it.

Enters, on standard input: a line of JSON with the function's file or name, then one for each call with its samples. Leaves, on
what was standard output: a line when the function is loaded, then one for each call. Neither side unpickles anything. What the
function prints goes to standard error. reward_pool.py is the other end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any

from agentlightning.errors import RewardError
from agentlightning.verl.reward_functions import Answer, LoadedFunction, Sample, load_function

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until standard input ends."""
    if sys.platform == "linux":  # a trainer that is killed cannot kill us, and a call that hangs sees no end of input
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    what = json.loads(requests.readline())
    function = load_function(what["path"], what["name"], what["key"])
    _say(answers, {"ready": True})
    for line in requests:
        samples = [Sample(name, arguments) for name, arguments in json.loads(line)]
        _say(answers, _reply(function, samples))


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _reply(function: LoadedFunction, samples: list[Sample]) -> dict[str, Any]:
    try:
        outcomes = function(samples)
    except RewardError as error:
        return {"failed": str(error)}
    return {"outcomes": list(_plain(outcomes))}


def _plain(outcomes: list[Answer | RewardError]) -> Iterator[Any]:
    for outcome in outcomes:
        yield [outcome.score, dict(outcome.extra)] if isinstance(outcome, Answer) else str(outcome)
