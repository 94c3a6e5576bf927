"""`agl serve`: settings enter, and a service runs until it is told to go.

SIGTERM and SIGINT: no new connection, polls are answered with `try_again`, what runs is finished, every model is saved, exit
code 0. A service that is killed instead loses nothing either; its next start has more to do again.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn

from agentlightning.checkpoint.files import make_directory
from agentlightning.errors import UserError
from agentlightning.tinker.engine_api import LoraEngine
from agentlightning.tinker.server.app import make_app
from agentlightning.tinker.server.journal import Journal
from agentlightning.tinker.server.keeper import SavePolicy
from agentlightning.tinker.server.keys import HideSecrets, Keys
from agentlightning.tinker.server.service import Service
from agentlightning.tinker.server.sweeper import Sweeper, remove_leftovers
from agentlightning.tinker.server.work_queue import MAX_BATCH

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS_S = 5  # for replies that are on their way
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says."""

    root: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    max_body_mb: int = 64
    reproducible: bool = False  # one sample request in a call of the engine: matrix products round otherwise in other company
    policy: SavePolicy = field(default_factory=SavePolicy)


class _Server(uvicorn.Server):
    """uvicorn's, which tells the service at the signal and not behind the last reply, because the polls are to end first, and
    does not raise the signal again when all is done.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], object], on_exit: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_start, self._on_exit = on_start, on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._leave)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _leave(self) -> None:
        log.info("asked to go: saving")
        self.should_exit = True
        self._on_exit()


def serve(settings: Settings, open_engine: Callable[[], LoraEngine], announce: Callable[[str, str | None], object]) -> int:
    """Runs until a signal; the exit code. `announce(url, key)` is called when it listens, with a key that was made.

    UserError for settings that cannot be: a port in use, a root that another server uses.
    """
    _log_to_stderr()
    lock = _lock(settings.root)
    config = uvicorn.Config(
        _no_app, host=settings.host, port=settings.port, log_config=None, access_log=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_WORDS_S, server_header=False, lifespan="off",
    )  # fmt: skip
    address = bound(config)
    try:
        return asyncio.run(_run(settings, open_engine, announce, config, address))
    finally:
        address.close()
        os.close(lock)


async def _run(
    settings: Settings,
    open_engine: Callable[[], LoraEngine],
    announce: Callable[[str, str | None], object],
    config: uvicorn.Config,
    address: socket.socket,
) -> int:
    journal = Journal(settings.root)
    keys = Keys(journal, settings.api_keys)
    engine = await asyncio.to_thread(open_engine)
    service = Service(engine, journal, keys, settings.root, settings.policy, 1 if settings.reproducible else MAX_BATCH)
    remove_leftovers(settings.root, service.registry)
    sweeper = Sweeper(service)
    config.app = make_app(service, sweeper, settings.max_body_mb << 20)
    server = _Server(config, partial(announce, f"http://{settings.host}:{settings.port}", keys.made), service.closing.set)
    service.start()
    tasks = [asyncio.create_task(sweeper.run()), asyncio.create_task(_stop_with(service, server))]
    try:
        await server.serve(sockets=[address])
    finally:
        service.closing.set()
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(service.close)
    code = 0 if service.runner.saved.is_set() else 1
    if service.runner.is_running:
        log.warning("the engine does not end; it is left as it is")
        os._exit(code)  # else the interpreter would wait for it too
    return code


async def _stop_with(service: Service, server: uvicorn.Server) -> None:
    """An engine that ended takes the server along: a supervisor starts both again, and clients wait for that."""
    await service.ended.wait()
    service.closing.set()
    server.should_exit = True


async def _no_app(scope: object, receive: object, send: object) -> None:
    raise AssertionError("replaced before the first request")


def _lock(root: Path) -> int:
    """One server in one root. The kernel lets go of it, however this process ends."""
    make_directory(root)
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"--root {root} is used by another server; expected one of its own: give another --root") from error
    return descriptor


def bound(config: uvicorn.Config) -> socket.socket:
    """The address, before minutes of loading; nobody can connect before the service listens."""
    try:
        address = config.bind_socket()
    except SystemExit as error:  # uvicorn's way to say that the address cannot be had
        raise UserError(
            f"{config.host}:{config.port} cannot be listened at; expected a free --port and a --host of this machine"
        ) from error
    # Connections inherit it. Else Nagle's algorithm holds back a reply's body, which is written behind its head, until the
    # client acknowledges the head: 40 ms a reply. asyncio sets it only on sockets whose protocol is named, and this one's is 0.
    address.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return address


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(HideSecrets())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
