"""The real tinker SDK and cookbook, in an environment of their own, against real `agl serve` processes.

The environment is made once, by pip and its usual settings, and kept in pytest's cache. Client programs (`client_*.py`) run in
it and write what they saw as JSON; what it should have been is said by the tests, which run in our environment. Floats on the
way keep every bit.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sdk_programs import HERE, run_program, serving

REQUIREMENTS = ("tinker==0.38.*", "tinker_cookbook==0.5.8", "torch==2.13.0")
UNREACHABLE = ("ConnectionError", "ConnectTimeout", "Temporary failure in name resolution", "ProxyError")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They run real programs, and the first one waits for pip."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def sdk(request: pytest.FixtureRequest) -> Path:
    """The `bin` of an environment that holds the SDK and the cookbook."""
    name = "-".join(["sdk", *REQUIREMENTS, f"py{sys.version_info[0]}{sys.version_info[1]}"])
    folder = request.config.cache.mkdir("".join(c if c.isalnum() or c in ".-" else "_" for c in name))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            make_environment(folder / "venv")
            (folder / "complete").touch()
    return folder / "venv" / "bin"


def make_environment(folder: Path) -> None:
    venv.create(folder, clear=True, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-compile"]
    done = subprocess.run([*pip, *REQUIREMENTS], capture_output=True, text=True, timeout=500)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip(f"pip cannot reach an index that has {', '.join(REQUIREMENTS)}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One that the tests share, each with models of its own."""
    with serving(tmp_path_factory.mktemp("serve") / "root") as process:
        yield process


@pytest.fixture(scope="session")
def client(sdk: Path, server: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`client("client_x.py")`: what the program saw."""

    def run(program: str, *arguments: str) -> Any:
        out = tmp_path_factory.mktemp("client") / "seen.json"
        done = run_program(sdk, server, HERE / program, str(out), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())

    return run
