"""The service as a process of its own: killed, told to go, started twice."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import uvicorn
from serving import forward_backward

from agentlightning.cli import main
from agentlightning.tinker.server.serve import bound
from agentlightning.tinker.server.status import fetch_state

SCRIPT = Path(__file__).with_name("serve_fake.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    for server in Server.started:
        server.process.kill()
        server.process.wait()
    Server.started.clear()


class Server:
    """`key` is what it printed, if it made one."""

    started: ClassVar[list[Server]] = []

    def __init__(self, root: Path, port: int, *keys: str) -> None:
        self.started.append(self)
        self.log = root.with_suffix(".log")
        command = [sys.executable, str(SCRIPT), str(root), str(port), *keys]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.url, _, self.key = self.process.stdout.readline().strip().partition(" ")

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)


def post(client: httpx.Client, path: str, body: dict | bytes) -> dict:
    options = {"content": body} if isinstance(body, bytes) else {"json": body}
    reply = client.post(f"/api/v1/{path}", **options)
    assert reply.status_code == 200, reply.text
    return reply.json() if "json" in reply.headers["content-type"] else {"bytes": reply.content}


def test_a_process_that_is_killed_and_one_that_is_told_to_go(tmp_path: Path, capsys: pytest.CaptureFixture):
    root, port = tmp_path / "root", free_port()
    server = Server(root, port)
    key = server.key
    assert key.startswith("tml-")
    with httpx.Client(base_url=server.url, headers={"X-API-Key": key}, timeout=20) as client:
        session = post(client, "create_session", {})["session_id"]
        made = post(client, "create_model", {"session_id": session, "model_seq_id": 0, "base_model": "tiny"})
        futures = [post(client, "forward_backward", forward_backward(f"{session}:train:0", seq, [seq])) for seq in (1, 2, 3)]
        server.end(signal.SIGKILL)
        server = Server(root, port)
        assert server.key == "None"  # the clients have the first one
        assert post(client, "retrieve_future", made)["model_id"] == f"{session}:train:0"
        for future in futures:
            assert post(client, "retrieve_future", future)["bytes"]
        assert main(["serve", "--status", "--url", server.url, "--api-key", key]) == 0
        shown = capsys.readouterr().out
        assert f"{session}:train:0" in shown
        assert "on GPUs 3.0 MB" in shown
        assert main(["serve", "--status", "--url", server.url, "--api-key", "tml-wrong"]) == 2
        optim = {"model_id": f"{session}:train:0", "seq_id": 4, "adam_params": {}}
        post(client, "retrieve_future", post(client, "optim_step", optim))
    begun = time.monotonic()
    assert server.end(signal.SIGTERM) == 0
    assert time.monotonic() - begun < 5
    assert list(root.glob("models/*/auto-4/state"))
    log = server.log.read_text()
    assert "forward_backward 200" in log
    assert key not in log


def test_two_servers_do_not_share_a_root_or_a_port(tmp_path: Path):
    port = free_port()
    server = Server(tmp_path / "root", port, "tml-a-key")
    assert fetch_state(server.url, "tml-a-key")["base_model"] == "tiny"
    for root, at in ((tmp_path / "root", free_port()), (tmp_path / "other", port)):
        done = subprocess.run([sys.executable, str(SCRIPT), str(root), str(at)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "UserError" in done.stderr
    assert server.end(signal.SIGINT) == 0


def test_a_reply_does_not_wait_for_the_clients_acknowledgement():
    """Head and body are two writes: with Nagle's algorithm the second one would leave 40 ms behind the first."""

    async def main() -> int:
        accepted: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

        async def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket"))

        address = bound(uvicorn.Config(main, host="127.0.0.1", port=free_port(), log_config=None))
        async with await asyncio.start_server(take, sock=address):
            _, writer = await asyncio.open_connection(*address.getsockname())
            no_delay = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
        return no_delay

    assert asyncio.run(main()) != 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--root", "x"], "--base-model"),
        (["--base-model", "tiny", "--root", "x", "--api-key", "secret"], "tml-"),
        (["--status"], "AGL_API_KEY"),
        (["--status", "--url", "ftp://x", "--api-key", "tml-abcd"], "--url"),
    ],
)
def test_settings_that_cannot_be_are_said(words, said, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGL_API_KEY", raising=False)
    port = ["--port", str(free_port())]
    assert main(["serve", *words, *port]) == 2
    assert said in capsys.readouterr().err
