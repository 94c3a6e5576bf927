"""What several of the tests of the workers start."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()
