"""A server process on the fake engine: python serve_fake.py ROOT PORT [KEY]."""

from __future__ import annotations

import sys
from pathlib import Path

from fake_engine import FakeEngine

from agentlightning.tinker.server.serve import Settings, serve


def announce(url: str, key: str | None) -> None:
    sys.stdout.write(f"{url} {key}\n")
    sys.stdout.flush()


sys.exit(serve(Settings(Path(sys.argv[1]), port=int(sys.argv[2]), api_keys=sys.argv[3:]), lambda: FakeEngine(0.005), announce))
