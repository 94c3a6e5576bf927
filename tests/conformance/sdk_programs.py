"""Server processes, and programs in the SDK's environment, for the tests of this folder."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"
CLIENT_TIMEOUT_S = 240


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


chaos_serve = load_script("chaos_serve")


@contextlib.contextmanager
def serving(root: Path, **options: Any) -> Iterator[Any]:
    process = chaos_serve.ServeProcess(root, **options)
    process.start()
    try:
        process.wait_ready()
        yield process
    finally:
        if process.process.poll() is None:
            process.kill()


def run_program(sdk: Path, server: Any, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python file, in the SDK's environment."""
    command = [str(sdk / "python"), str(program), *arguments]
    environment = server.client_environment()
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S)
