"""The reward of programs: the Python code in an answer is run against test cases, each in a process of its own.

An answer, and inputs with expected outputs or assert statements, go in; 1.0 if all tests pass, else 0.0, comes out. jail.py
says what such a process may do. The code sees no environment variables, a scratch directory that is gone afterwards, Python's
standard library, and its test's input; time, memory, output, file sizes and processes are limited.

What is sure everywhere: the limits of time, memory, output and file size, the empty environment, the end of the process group.
What a Linux kernel adds where it allows it (user namespaces; Landlock since 5.13): no network, no files beyond Python's and the
system's libraries, a scratch directory in memory, no process that outlives the test. Where it does not, the code may read and
write what the user of the trainer may, and reach the network. It is a fence around a model that learns, not a virtual machine
against an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_JAIL = Path(__file__).with_name("jail.py")
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
# Read from standard input after the program has run, so that a program that ends early passes nothing.
_ASSERTS = "\nimport sys as _sys\nexec(compile(_sys.stdin.read(), '<test>', 'exec'))\n"
_TOO_LONG = (None, 128 + signal.SIGKILL, 128 + signal.SIGXCPU)  # of wall time, or of CPU time


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of a program may take."""

    wall_s: float = 6.0
    cpu_s: int = 5
    memory_bytes: int = 1 << 30  # of address space, each process
    file_bytes: int = 4 << 20  # of each file, standard output included
    scratch_bytes: int = 64 << 20  # of all files, where the kernel lets us mount
    processes: int = 16  # where there are user namespaces; otherwise one


@dataclass(frozen=True, slots=True)
class Run:
    """How a program ended."""

    status: int | None  # exit status, 128 + n for signal n; None if the wall time was over
    output: str


@dataclass(frozen=True, slots=True)
class _Test:
    program: str
    stdin: str
    output: str
    last_line: bool  # only the last line of the output counts

    def passes(self, done: Run) -> bool:
        given = _lines(done.output)
        return done.status == 0 and (given[-1:] if self.last_line else given) == _lines(self.output)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """{"score": 1.0 if all tests pass, else 0.0, "passed": the share of tests that do}.

    The program is the last fenced block of `solution_str`, or all of it. `ground_truth`, or the JSON text of it, is
    {"inputs": [...], "outputs": [...]} (standard input and output, compared without trailing space) or {"asserts": [...]}
    (Python statements that see the program's names). After a test that takes too long the rest count as failed. Raises
    ValueError for another ground truth.
    """
    tests = list(_tests(program_in(solution_str), ground_truth))
    passed = 0
    for test in tests:
        done = run(test.program, test.stdin)
        if done.status in _TOO_LONG:
            break
        passed += test.passes(done)
    return {"score": float(passed == len(tests)), "passed": passed / len(tests)}


def program_in(text: str) -> str:
    """The last fenced block of Python, or the whole text if there is none."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


def run(program: str, stdin: str, limits: Limits | None = None) -> Run:
    """Run `program` behind the fence. Nothing of it is left when this returns, or raises."""
    limits = limits or Limits()
    with (
        tempfile.TemporaryDirectory(prefix="agl-code-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as said,
    ):
        Path(scratch, "program.py").write_bytes(program.encode(errors="replace"))
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        # The interpreter itself, not that of a virtual environment: nothing beside the standard library is there.
        python = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B"]
        numbers = (limits.cpu_s, limits.memory_bytes, limits.file_bytes, limits.scratch_bytes, limits.processes)
        process = subprocess.Popen(
            [*python, str(_JAIL), *map(str, numbers)],
            cwd=scratch,
            stdin=given,
            stdout=said,  # a file, so that its size is limited and no process that is left can keep us waiting
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        )
        try:
            ended = _wait(process, limits.wall_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        said.seek(0)
        return Run(status if ended else None, said.read(limits.file_bytes).decode(errors="replace"))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended in time. It is not reaped: its process group must stay its own until it has been killed."""
    if sys.platform == "linux":  # `Popen.wait` looks every 50 ms, which is longer than most programs take
        pidfd = os.pidfd_open(process.pid)
        try:
            return bool(select.select([pidfd], [], [], seconds)[0])
        finally:
            os.close(pidfd)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _tests(program: str, ground_truth: Any) -> Iterator[_Test]:
    given = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if isinstance(given, Mapping) and given.get("asserts"):
        for statement in given["asserts"]:
            token = secrets.token_hex(8)
            yield _Test(program + _ASSERTS, f"{statement}\nprint()\nprint({token!r})\n", token, last_line=True)
    elif isinstance(given, Mapping) and given.get("inputs") and len(given["inputs"]) == len(given.get("outputs", ())):
        for stdin, output in zip(given["inputs"], given["outputs"], strict=True):
            yield _Test(program, str(stdin), str(output), last_line=False)
    else:
        raise ValueError(
            'the ground truth of a program is {"inputs": [...], "outputs": [...]} of the same length, or {"asserts": [...]}, '
            f"given {str(given)[:200]!r}"
        )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
