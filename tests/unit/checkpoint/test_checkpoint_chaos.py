"""The short form of scripts/chaos.py: kills, flipped bits and random sequences; and that it would notice a broken promise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import agentlightning

SCRIPT = Path(__file__).parents[3] / "scripts" / "chaos.py"
IN_MEMORY = "/dev/shm"  # a kill is no power loss: there is no need to wait for a disk


@pytest.fixture(scope="module")
def chaos() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def output() -> str:
    """What the script says of a few kills and sequences, in a process of its own: it forks, and has no threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(agentlightning.__file__).parents[1])}
    if os.access(IN_MEMORY, os.W_OK):
        environment["TMPDIR"] = IN_MEMORY
    command = [sys.executable, str(SCRIPT), "--kills", "12", "--sequences", "40", "--flips", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def every(output: str, begins: str) -> int:
    """The number of starts in a line of the output; all of them went well."""
    found = re.search(rf"^{begins}.*, (\d+) of (\d+) (?:starts|loads)", output, re.MULTILINE)
    assert found is not None, output
    assert found[1] == found[2]
    return int(found[2])


def test_killed_at_random_instants_every_start_resumes_and_no_told_step_is_lost(output: str) -> None:
    assert every(output, "kills: 12 at random instants") > 1


def test_killed_at_every_operation_of_a_save_every_start_resumes(output: str) -> None:
    assert every(output, "kills: one at each of") > 40


def test_random_sequences_are_never_without_a_verified_checkpoint(output: str) -> None:
    assert every(output, "sequences: 40") > 80


def test_others_are_killed_alike(output: str) -> None:
    assert len(re.findall(r"^for comparison: .* \d+ of 4 resumed$", output, re.MULTILINE)) == 2


def test_a_flipped_bit_anywhere_is_a_fallback(chaos: ModuleType, tmp_path: Path) -> None:
    assert chaos.flip_bits(tmp_path, 60, seed=0) == []


def test_the_watch_notices_a_lost_step_another_state_and_leftovers(chaos: ModuleType) -> None:
    expected = chaos.NeverKilled(16)
    for report, problem in (
        (["resumed", 4, expected.after(4), []], "step 5 was durable, resumed from 4"),
        (["resumed", 5, expected.after(4), []], "resumed with another state"),
        (["resumed", 5, expected.after(5), [".x.tmp"]], "at step 5: ['.x.tmp']"),
        (["ended", 6, expected.after(5)], "ended with another state"),
    ):
        run = chaos.Watched(expected)
        run.hear([["durable", 5], report])
        assert len(run.problems) == 1
        assert problem in run.problems[0]
        assert run.resumed == 0


def test_the_state_depends_on_every_step(chaos: ModuleType) -> None:
    states = [chaos.beginning(8)]
    for step in range(1, 30):
        states.append(chaos.evolve(states[-1], step))
    assert len({chaos.fingerprint(state) for state in states}) == 30
