"""The reward function and the tool of the runs under test: the calculator's own, with a place where the run can be stopped.

The environment variable AGL_E2E_PLAN names a JSON file, read at every call; where it is not there, nothing happens. It says
{"where": "reward" | "tool" | "load", "metrics": FILE, "after": STEP, "do": "hold" | "kill" | "nan", "inside": [FUNCTION, ...]}:
at the first call of the reward function or the tool once FILE, metrics.jsonl, has the line of STEP, or when a worker that loads
its model imports the tool,
- hold: write this process's id to PLAN.reached and stay here until somebody ends the process or the call,
- kill: SIGKILL this process once it has entered the functions of `inside`, one after the other (they need not be nested),
- nan: return NaN as the reward.
"""

import glob
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from agentlightning.calculator import task

PLAN = Path(os.environ["AGL_E2E_PLAN"])
LONGEST_HOLD_S = 240.0


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]) -> float:
    if _carry_out("reward") == "nan":
        return float("nan")
    return task.compute_score(data_source, solution_str, ground_truth, extra_info)


def calculate(text: str, extra_info: Mapping[str, Any]) -> str | None:
    _carry_out("tool")
    return task.calculate(text, extra_info)


def _carry_out(where: str) -> str | None:
    if not PLAN.exists():
        return None
    plan = json.loads(PLAN.read_text())
    if plan["where"] != where or _steps_done(Path(plan["metrics"])) < plan["after"]:
        return None
    if plan["do"] == "hold":
        _hold()
    elif plan["do"] == "kill":
        _kill_inside(plan["inside"])
    return plan["do"]


def _steps_done(metrics: Path) -> int:
    return sum(Path(found).read_bytes().count(b"\n") for found in glob.glob(str(metrics)))


def _hold() -> None:
    reached = PLAN.with_suffix(".reached")
    written = PLAN.with_suffix(f".{os.getpid()}")
    written.write_text(str(os.getpid()))
    written.replace(reached)
    started = time.monotonic()
    while PLAN.exists() and time.monotonic() - started < LONGEST_HOLD_S:
        time.sleep(0.02)


def _kill_inside(functions: list[str]) -> None:
    left = list(functions)

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == left[0]:
            left.pop(0)
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


if __name__ == "e2e_user_code":  # the reward function's file is imported by its path, and under another name
    _carry_out("load")
