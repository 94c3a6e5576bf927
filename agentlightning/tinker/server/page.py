"""The small page at `/`. A key is typed into a form once; a ticket in a cookie opens the page from then on, nothing else."""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from agentlightning.tinker.server.service import Service
from agentlightning.tinker.server.views import state_view

_COOKIE, _COOKIE_S = "agl_ticket", 12 * 3600
_HEAD = (
    "<!doctype html><meta charset=utf-8><title>agl serve</title>"
    "<style>body{font:14px system-ui;margin:2em}td,th{padding:.2em 1em .2em 0;text-align:left}</style><h1>agl serve</h1>"
)
_FORM = "<form method=post>API key <input type=password name=key autofocus> <button>look</button></form>"
_SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
    "Cache-Control": "no-store",
}


class Page:
    """GET shows it, POST takes the key."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def router(self) -> APIRouter:
        """Both."""
        router = APIRouter()
        router.add_api_route("/", self.show, methods=["GET"], response_model=None)
        router.add_api_route("/", self.enter, methods=["POST"], response_model=None)
        return router

    async def show(self, request: Request) -> Response:
        """The state, or the form."""
        owner = request.scope["state"]["owner"]
        if owner is None and _COOKIE in request.cookies:
            owner = self._service.keys.ticket_owner(request.cookies[_COOKIE])
        if owner is None:
            return HTMLResponse(_HEAD + _FORM, 401, _SAFE)
        return HTMLResponse(_HEAD + state_html(state_view(self._service, owner)), headers=_SAFE)

    async def enter(self, request: Request) -> Response:
        """A key for a ticket."""
        words = parse_qs((await request.body()).decode("latin-1"))
        owner = self._service.keys.owner(words["key"][0]) if "key" in words else None
        if owner is None:
            return HTMLResponse(_HEAD + _FORM, 401, _SAFE)
        response = RedirectResponse("/", 303)
        ticket = self._service.keys.ticket(owner, _COOKIE_S)
        response.set_cookie(_COOKIE, ticket, max_age=_COOKIE_S, httponly=True, samesite="strict")
        return response


def state_html(state: dict[str, Any]) -> str:
    """Tables; every text in them is escaped."""
    speed, queue, memory = state["tokens_per_second"], state["queue"], state["memory"]
    facts = {
        "base model": state["base_model"],
        "up": f"{state['up_seconds']} s",
        "queue": f"{queue['training']} training, {queue['samples']} samples",
        "tokens/s": f"{speed['train']} training, {speed['sample']} sampling",
        "memory": f"{memory['resident_bytes'] / 1e6:.0f} MB, on GPUs {memory['device_bytes'] / 1e6:.0f} MB",
        "checkpoints": f"{state['checkpoints']['count']}, {state['checkpoints']['bytes'] / 1e6:.1f} MB",
    }
    rows = "".join(f"<tr><th>{escape(name)}<td>{escape(str(value))}" for name, value in facts.items())
    models = _table(state["models"], ("id", "rank", "requests", "saved", "in_engine", "last_request_at"))
    checkpoints = _table(state["latest_checkpoints"], ("tinker_path", "time", "size_bytes", "expires_at"))
    return f"<table>{rows}</table><h2>Models</h2>{models}<h2>Latest checkpoints</h2>{checkpoints}"


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    head = "".join(f"<th>{escape(column)}" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(row[column]))}" for column in columns) for row in rows)
    return f"<table><tr>{head}{body}</table>"
