"""What every request passes first: the key, the size of its body, and one line in the log.

The line has method, path, status, time and owner: no header, no query, no body, so no key and no signature. Pure ASGI, so that
long polls cost nothing here.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentlightning.tinker.server.keys import Keys, hide
from agentlightning.tinker.server.rest import DOWNLOAD

API, HEALTH = "/api/v1/", "/api/v1/healthz"
# Numbered by the client, which does not count back: one that is too large is an operation that fails, not a gap in its numbers.
_NUMBERED = ("/api/v1/forward_backward", "/api/v1/forward")
_DRAINED = 16  # times the limit: so much of such a body is read and dropped
_QUIET = (HEALTH, "/api/v1/retrieve_future", "/api/v1/session_heartbeat", "/api/v1/telemetry")
_FORBIDDEN = (
    "X-API-Key is missing or not one of this server's; expected the key that it printed at its first start, or --api-key"
)
log = logging.getLogger(__name__)


class Door:
    """Lets in those with a key. Sets `owner` in the request's state, and `refused`, if its body was cut, to why."""

    def __init__(self, app: ASGIApp, keys: Keys, body_bytes: int) -> None:
        self._app, self._keys, self._limit = app, keys, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        owner = self._keys.owner(headers["x-api-key"]) if "x-api-key" in headers else None
        state = scope.setdefault("state", {})
        state["owner"], state["refused"] = owner, None
        started, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if not self._may_pass(path, scope["query_string"], owner):
            await _refuse(noting, 401, _FORBIDDEN)
        elif path in _NUMBERED:
            await self._app(scope, self._cut(receive, state), noting)
        elif self._is_too_large(headers):
            await _refuse(noting, 413, self._too_large())
        else:
            await self._app(scope, self._counted(receive), noting)
        level = logging.DEBUG if path in _QUIET and status < 400 else logging.INFO
        log.log(
            level, "%s %s %d %.0f ms %s", scope["method"], hide(path), status, 1e3 * (time.monotonic() - started), owner or "-"
        )

    def _may_pass(self, path: str, query: bytes, owner: str | None) -> bool:
        if owner is not None or path == HEALTH or not path.startswith(API):
            return True
        if not path.startswith(f"{DOWNLOAD}/"):
            return False
        words = parse_qs(query.decode("latin-1"))
        signed = "expires" in words and "signature" in words
        return signed and self._keys.is_signed(path, words["expires"][0], words["signature"][0])

    def _is_too_large(self, headers: Headers) -> bool:
        length = headers.get("content-length", "0")
        return not length.isdigit() or int(length) > self._limit

    def _too_large(self) -> str:
        return f"the body is larger than {self._limit} bytes; expected less: send fewer data at a time, or --max-body-mb"

    def _cut(self, receive: Receive, state: dict[str, Any]) -> Receive:
        """`receive`, whose body ends at the limit; what comes behind is dropped, because a client reads no answer before it has
        sent all.
        """
        taken, kept = 0, b""

        async def cutting() -> Message:
            nonlocal taken, kept
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                room, body = self._limit - taken, message.get("body", b"")
                taken += len(body)
                if taken <= self._limit:
                    return message
                state["refused"] = self._too_large()
                if taken > _DRAINED * self._limit:
                    raise HTTPException(413, self._too_large())
                kept += body[: max(0, room)]
                if not message.get("more_body", False):
                    return {"type": "http.request", "body": kept, "more_body": False}

        return cutting

    def _counted(self, receive: Receive) -> Receive:
        """`receive`, ending a body without a length that grows too large."""
        taken = 0

        async def counting() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message["body"]) if "body" in message else 0
            if taken > self._limit:
                raise HTTPException(413, self._too_large())
            return message

        return counting


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
