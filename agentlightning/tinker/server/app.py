"""The FastAPI application: a service enters, an ASGI application leaves. An error gets the status that the SDK shows."""

from __future__ import annotations

import logging
import sqlite3

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from agentlightning.errors import UserError
from agentlightning.tinker.server.door import Door
from agentlightning.tinker.server.page import Page
from agentlightning.tinker.server.registry import NotFoundError
from agentlightning.tinker.server.requests import explain
from agentlightning.tinker.server.rest import RestRoutes
from agentlightning.tinker.server.routes import LoopRoutes
from agentlightning.tinker.server.service import ClosingError, GoneError, Service
from agentlightning.tinker.server.sweeper import Sweeper

log = logging.getLogger(__name__)


def make_app(service: Service, sweeper: Sweeper, body_bytes: int) -> ASGIApp:
    """The door, which lets in no body of more than `body_bytes`, and the routes behind it."""
    app = FastAPI(title="agl serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(LoopRoutes(service).router())
    app.include_router(RestRoutes(service, sweeper).router())
    app.include_router(Page(service).router())
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(404, _unknown_route)
    for kind in (ClosingError, sqlite3.Error, OSError):
        app.add_exception_handler(kind, _not_now)
    return Door(app, service.keys, body_bytes)


async def _user_error(request: Request, error: Exception) -> JSONResponse:
    status = 404 if isinstance(error, NotFoundError) else 410 if isinstance(error, GoneError) else 400
    return JSONResponse({"detail": str(error)}, status)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ValidationError | RequestValidationError)
    return JSONResponse({"detail": explain(error.errors())}, 422)


async def _unknown_route(request: Request, error: Exception) -> JSONResponse:
    detail = error.detail if isinstance(error, HTTPException) and error.detail != "Not Found" else None
    return JSONResponse({"detail": detail or f"{request.method} {request.url.path} is not offered by this server"}, 404)


async def _not_now(request: Request, error: Exception) -> JSONResponse:
    """What the SDK sends again by itself: a full disk that somebody mends, a server that starts again."""
    if not isinstance(error, ClosingError):
        log.error("%s %s could not be kept: %s", request.method, request.url.path, error)
    return JSONResponse({"detail": "the server cannot take the request now; send it again"}, 503)
