"""Kill `agl serve` again and again under a live client of the real tinker SDK, and see what the client makes of it.

    python scripts/chaos_serve.py --client-python VENV/bin/python                50 kills
    python scripts/chaos_serve.py --client-python VENV/bin/python --kills 5      fewer

VENV holds the SDK: `pip install 'tinker==0.38.*' torch` (our own environment need not have it).

tests/conformance/client_loop.py samples, trains and saves in a loop. Once with a server that nobody touches; then with one that
is killed (`kill -9`) at random instants and started again in the same root: most of the times while it works for the client,
one time of five while it starts and restores. The client must see no error; every line that it writes (tokens, losses and
log-probabilities to the last bit) must be the same, and so must every byte of every checkpoint. The exit code is 1 if not.

The SDK waits up to 30 s before it asks a server again that was not there, so that a kill costs about 20 s.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOOP = ROOT / "tests" / "conformance" / "client_loop.py"
PATIENCE_S = 240.0  # for anything that should come soon, on a busy machine
POLL_S = 0.02
EARLY_SHARE = 0.2  # of the kills meet a server that is still starting


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class ServeProcess:
    """`agl serve` in a process of its own, always at the same address. `start` again after `kill` or `stop`."""

    root: Path
    base_model: str = "tiny"
    cwd: Path = ROOT
    options: tuple[str, ...] = ()
    key: str = field(default_factory=lambda: f"tml-{secrets.token_hex(16)}")
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What all its processes said, one behind the other."""
        return self.root.with_name(f"{self.root.name}.log")

    def start(self) -> None:
        """Returns at once."""
        command = [sys.executable, "-m", "agentlightning", "serve", "--base-model", self.base_model, "--root", str(self.root)]
        command += ["--port", str(self.port), "--api-key", self.key, *self.options]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Until it answers. RuntimeError if it ends instead."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._is_healthy():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the server does not come up, exit code {self.process.poll()}:\n{self.log.read_text()[-2000:]}"
                )
            time.sleep(POLL_S)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=PATIENCE_S)

    def requests(self) -> int:
        """How many lines the log has of requests that begin something."""
        return self.log.read_bytes().count(b".door: POST /api/v1/") if self.log.exists() else 0

    def client_environment(self) -> dict[str, str]:
        """For a program that uses the SDK."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        own = {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": self.key, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return {**kept, **own}


@dataclass(slots=True)
class LoopRun:
    """What a loop left: its lines, its checkpoints' bytes by name, how often its server was killed."""

    lines: list[str]
    files: Mapping[str, bytes]
    kills: int
    seconds: float


def run_loop(client_python: str, root: Path, steps: int, kills: int = 0, seed: int = 0) -> LoopRun:
    """The loop over a server that is killed `kills` times, or until the loop ends. RuntimeError if the client fails."""
    server, out = ServeProcess(root, options=("--reproducible",)), root.with_name(f"{root.name}.lines")
    began, done = time.monotonic(), 0
    server.start()
    server.wait_ready()
    said = root.with_name(f"{root.name}.client")
    with said.open("wb") as output:
        client = subprocess.Popen(
            [client_python, str(LOOP), str(steps), str(out)],
            env=server.client_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        rng = random.Random(seed)
        while done < kills and wait_for_work(server, client):
            time.sleep(rng.uniform(0, 1.0))
            server.kill()
            done += 1
            server.start()
            if done < kills and rng.random() < EARLY_SHARE:
                time.sleep(rng.uniform(0, 8.0))
                server.kill()
                done += 1
                server.start()
            server.wait_ready()
        code = client.wait(timeout=PATIENCE_S + 5 * steps)
        if code:
            raise RuntimeError(f"the client failed, exit code {code}:\n{said.read_text()[-3000:]}")
        server.stop()
        return LoopRun(out.read_text().splitlines(), checkpoint_bytes(root), done, time.monotonic() - began)
    finally:
        for process in (client, server.process):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def wait_for_work(server: ServeProcess, client: subprocess.Popen[bytes]) -> bool:
    """Until the server that was just started has something to do; False if the client has ended."""
    before, deadline = server.requests(), time.monotonic() + PATIENCE_S
    while client.poll() is None and time.monotonic() < deadline:
        if server.requests() > before:
            return True
        time.sleep(POLL_S)
    return False


def checkpoint_bytes(root: Path) -> dict[str, bytes]:
    """Every tensor file of every named checkpoint; the session's name is left out."""
    found = sorted(root.glob("models/*/weights/*/state/**/*.safetensors"))
    return {str(path.relative_to(root).relative_to(*path.relative_to(root).parts[:2])): path.read_bytes() for path in found}


def differences(one: LoopRun, other: LoopRun) -> list[str]:
    """What is not the same."""
    faults = [f"line {i} differs" for i, (a, b) in enumerate(zip(one.lines, other.lines, strict=False)) if a != b]
    if len(one.lines) != len(other.lines):
        faults.append(f"{len(one.lines)} lines and {len(other.lines)}")
    if one.files.keys() != other.files.keys():
        faults.append(f"files {sorted(one.files.keys() ^ other.files.keys())} are on one side alone")
    return faults + [
        f"{name} differs" for name in one.files.keys() & other.files.keys() if one.files[name] != other.files[name]
    ]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client-python", required=True, help="the python of an environment that has the tinker SDK")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of the loop (default: two a kill, and some)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if shutil.which(arguments.client_python) is None:
        parser.error(f"--client-python: given {arguments.client_python!r}, expected a python that can be run")
    steps = arguments.steps or 2 * arguments.kills + 20
    with tempfile.TemporaryDirectory() as folder:
        whole = run_loop(arguments.client_python, Path(folder) / "whole", steps)
        print(f"undisturbed: {len(whole.lines)} steps, {len(whole.files)} files, {whole.seconds:.0f} s", flush=True)
        killed = run_loop(arguments.client_python, Path(folder) / "killed", steps, arguments.kills, arguments.seed)
        print(f"killed {killed.kills} times: {len(killed.lines)} steps, {len(killed.files)} files, {killed.seconds:.0f} s")
        faults = differences(whole, killed)
        print("\n".join(faults) or "every line and every byte is the same")
        if killed.kills < arguments.kills:
            faults.append("too few kills")
            print(f"the loop ended before {arguments.kills} kills: give more --steps")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
