"""The routes of the REST client and the `tinker` command: runs, checkpoints, sessions, downloads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from agentlightning.errors import UserError
from agentlightning.tinker.server import requests as body
from agentlightning.tinker.server.journal import put
from agentlightning.tinker.server.paths import KINDS, TinkerPath, inside
from agentlightning.tinker.server.records import Checkpoint, Session
from agentlightning.tinker.server.registry import NotFoundError
from agentlightning.tinker.server.routes import Owner
from agentlightning.tinker.server.service import Service
from agentlightning.tinker.server.sweeper import Sweeper
from agentlightning.tinker.server.views import checkpoint_view, page_of, run_view, session_view, state_view, status_of

DOWNLOAD = "/api/v1/external_weights"  # opened by a signature in place of a key
_DOWNLOAD_S = 3600
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]


class RestRoutes:
    """What is looked at and looked after, beside the loops."""

    def __init__(self, service: Service, sweeper: Sweeper) -> None:
        self._service, self._registry, self._sweeper = service, service.registry, sweeper

    def router(self) -> APIRouter:
        """All of them."""
        router = APIRouter(prefix="/api/v1")
        one = "/training_runs/{model_id}/checkpoints/{kind}/{name}"
        routes: list[tuple[str, str, Callable[..., Awaitable[Any]]]] = [
            ("GET", "/status", self.status),
            ("GET", "/training_runs", self.runs),
            ("GET", "/training_runs/{model_id}", self.run),
            ("GET", "/training_runs/{model_id}/checkpoints", self.checkpoints_of),
            ("GET", "/checkpoints", self.checkpoints),
            ("DELETE", one, self.delete),
            ("PUT", f"{one}/ttl", self.set_ttl),
            ("POST", f"{one}/publish", self.publish),
            ("DELETE", f"{one}/publish", self.unpublish),
            ("GET", f"{one}/external_weights_urls", self.urls),
            ("GET", "/external_weights/{model_id}/{name}/{file:path}", self.download),
            ("POST", "/weights_info", self.weights_info),
            ("GET", "/sessions", self.sessions),
            ("GET", "/sessions/{session_id}", self.session),
            ("POST", "/sessions/search", self.search),
            ("PUT", "/sessions/{session_id}/project", self.set_project),
        ]
        for method, path, handler in routes:
            router.add_api_route(path, handler, methods=[method], response_model=None)
        return router

    async def status(self, owner: Owner) -> dict[str, Any]:
        """For `agl serve --status`."""
        return state_view(self._service, owner)

    # ---- runs and checkpoints

    async def runs(self, owner: Owner, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
        """Newest first."""
        models = [model for model in list(self._registry.models.values()) if model.owner == owner and model.created]
        models.sort(key=lambda model: model.last_request_at, reverse=True)
        page, cursor = page_of(models, offset, limit)
        return {"training_runs": [run_view(self._registry, model) for model in page], "cursor": cursor}

    async def run(self, owner: Owner, model_id: str) -> dict[str, Any]:
        """One run."""
        return run_view(self._registry, self._registry.model(model_id, owner))

    async def checkpoints_of(self, owner: Owner, model_id: str) -> dict[str, Any]:
        """All of a run."""
        model = self._registry.model(model_id, owner)
        return {"checkpoints": [checkpoint_view(checkpoint) for checkpoint in self._registry.checkpoints_of(model.id)]}

    async def checkpoints(self, owner: Owner, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
        """All of this key's, newest first."""
        mine = [checkpoint for checkpoint in list(self._registry.checkpoints.values()) if checkpoint.owner == owner]
        mine.sort(key=lambda checkpoint: checkpoint.created_at, reverse=True)
        page, cursor = page_of(mine, offset, limit)
        return {"checkpoints": [checkpoint_view(checkpoint) for checkpoint in page], "cursor": cursor}

    def _checkpoint(self, owner: str, model_id: str, kind: str, name: str) -> Checkpoint:
        if kind not in KINDS:
            raise NotFoundError(f"there is no kind of checkpoint {kind[:100]!r}; expected one of {', '.join(KINDS)}")
        return self._registry.checkpoint(str(TinkerPath(model_id, kind, name)), owner, public=False)

    async def delete(self, owner: Owner, model_id: str, kind: str, name: str) -> Response:
        """For good, even the last one: who asks for it means it."""
        await self._sweeper.delete(self._checkpoint(owner, model_id, kind, name))
        return Response(status_code=204)

    async def set_ttl(self, owner: Owner, model_id: str, kind: str, name: str, ttl: body.SetTtl) -> Response:
        """From now on; null: for good."""
        checkpoint = self._checkpoint(owner, model_id, kind, name)
        seconds = ttl.ttl_seconds
        checkpoint.expires_at = None if seconds is None else (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        await self._service.keep(put(checkpoint))
        return Response(status_code=204)

    async def publish(self, owner: Owner, model_id: str, kind: str, name: str) -> Response:
        """Other keys may load it."""
        return await self._set_public(self._checkpoint(owner, model_id, kind, name), True)

    async def unpublish(self, owner: Owner, model_id: str, kind: str, name: str) -> Response:
        """They may no longer."""
        return await self._set_public(self._checkpoint(owner, model_id, kind, name), False)

    async def _set_public(self, checkpoint: Checkpoint, public: bool) -> Response:
        checkpoint.public = public
        await self._service.keep(put(checkpoint))
        return Response(status_code=204)

    async def weights_info(self, owner: Owner, asked: body.WeightsInfo) -> dict[str, Any]:
        """What is needed to load it."""
        checkpoint = self._registry.checkpoint(asked.tinker_path, owner)
        lora = checkpoint.lora
        return {
            "base_model": checkpoint.base_model,
            "optimizer_config": {"type": "adamw"},
            "is_lora": True,
            "lora_rank": lora["rank"],
            "train_unembed": lora["train_unembed"],
            "train_mlp": lora["train_mlp"],
            "train_attn": lora["train_attn"],
        }

    # ---- downloads

    async def urls(self, owner: Owner, request: Request, model_id: str, kind: str, name: str) -> dict[str, Any]:
        """A signed URL for each file."""
        checkpoint = self._checkpoint(owner, model_id, kind, name)
        if kind != "external_weights":
            raise UserError(f"{checkpoint.id} is of {kind}; expected external_weights: export it with save_weights_external")
        root = self._adapter(checkpoint)
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        base, folder = str(request.base_url).rstrip("/"), f"{DOWNLOAD}/{model_id}/{name}"
        urls = {file: base + self._service.keys.sign(f"{folder}/{file}", _DOWNLOAD_S) for file in files}
        return {"urls": urls, "expires": (datetime.now(UTC) + timedelta(seconds=_DOWNLOAD_S)).isoformat()}

    async def download(self, model_id: str, name: str, file: str) -> FileResponse:
        """One file; the door has looked at the signature."""
        path = str(TinkerPath(model_id, "external_weights", name))
        if path not in self._registry.checkpoints:
            raise NotFoundError(f"there is no {path[:200]}")
        found = inside(self._adapter(self._registry.checkpoints[path]), file)
        if not found.is_file():
            raise NotFoundError(f"there is no file {file[:200]!r} in {path[:200]}")
        return FileResponse(found)

    def _adapter(self, checkpoint: Checkpoint) -> Path:
        """What PEFT loads: the state's `actor/`, without our own files beside it."""
        state = self._service.root / checkpoint.directory
        return state / "actor" if (state / "actor").is_dir() else state

    # ---- sessions

    def _mine(self, owner: str) -> list[Session]:
        mine = [session for session in list(self._registry.sessions.values()) if session.owner == owner]
        return sorted(mine, key=lambda session: (session.created_at, session.id), reverse=True)

    async def sessions(self, owner: Owner, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
        """Ids, newest first."""
        return {"sessions": [session.id for session in self._mine(owner)[offset : offset + limit]]}

    async def session(self, owner: Owner, session_id: str) -> dict[str, Any]:
        """What was made in it."""
        session = self._registry.session(session_id, owner)
        view = session_view(self._registry, session)
        models = [model.id for model in list(self._registry.models.values()) if model.session_id == session_id]
        samplers = [sampler.id for sampler in list(self._registry.samplers.values()) if sampler.session_id == session_id]
        return {**view, "training_run_ids": models, "sampler_ids": samplers}

    async def search(self, owner: Owner, asked: body.Search) -> dict[str, Any]:
        """A page of summaries, newest first."""
        found = [session for session in self._mine(owner) if _fits(session, asked)]
        if asked.cursor is not None:
            last = (str(asked.cursor["last_created_at"]).replace("Z", "+00:00"), asked.cursor["last_session_id"])
            moment = datetime.fromisoformat(last[0])
            found = [s for s in found if (datetime.fromisoformat(s.created_at), s.id) < (moment, last[1])]
        page = found[: asked.limit]
        more = len(found) > asked.limit
        cursor = {"last_created_at": page[-1].created_at, "last_session_id": page[-1].id} if more else None
        return {"sessions": [session_view(self._registry, session) for session in page], "next_cursor": cursor}

    async def set_project(self, owner: Owner, session_id: str, project: body.Project) -> Response:
        """Move it."""
        session = self._registry.session(session_id, owner)
        session.project_id = project.project_id
        await self._service.keep(put(session))
        return Response(status_code=204)


def _fits(session: Session, asked: body.Search) -> bool:
    named = asked.display_name is None and asked.session_id is None
    named = named or session.id == asked.session_id or _has_words(session.display_name, asked.display_name)
    metadata = all(str(session.user_metadata[k]) == v for k, v in asked.user_metadata.items() if k in session.user_metadata)
    metadata = metadata and asked.user_metadata.keys() <= session.user_metadata.keys()
    project = asked.project_ids is None or session.project_id in asked.project_ids
    status = status_of(session)
    return named and metadata and project and (asked.statuses is None or any(_has(status, query) for query in asked.statuses))


def _has_words(display_name: str | None, asked: str | None) -> bool:
    if display_name is None or asked is None:
        return False
    return all(word in display_name.lower() for word in asked.lower().split())


def _has(status: dict[str, Any], query: dict[str, Any]) -> bool:
    if status["type"] != query["type"]:
        return False
    reasons = query.get("reasons")
    return reasons is None or status["reason"]["type"] in reasons
