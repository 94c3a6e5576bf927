"""The routes that a training or sampling loop uses. HTTP enters and leaves; what is done is the service's.

A body that becomes an operation is read as bytes: these very bytes are what is journaled and, if need be, replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from agentlightning.errors import UserError
from agentlightning.tinker.server import requests as body
from agentlightning.tinker.server import wire
from agentlightning.tinker.server.keys import hide
from agentlightning.tinker.server.records import Operation, now
from agentlightning.tinker.server.service import Service

# The SDK's own defaults, said aloud: how large a chunk of a forward_backward may be.
CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "sample_use_retrieve_futures": False,
    "sample_join_sampling_session": False,
    "custom_loss_server_side": False,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}
_TELEMETRY_WORDS, _TELEMETRY_EVENTS = 300, 20
_LOUD = ("ERROR", "CRITICAL")
log = logging.getLogger(__name__)


async def owner_of(request: Request) -> str:  # not `def`: FastAPI would call that in another thread
    """The key's owner, whom the door let in."""
    return request.scope["state"]["owner"]


Owner = Annotated[str, Depends(owner_of)]


class LoopRoutes:
    """Sessions, training, sampling, futures."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def router(self) -> APIRouter:
        """All of them."""
        router = APIRouter(prefix="/api/v1")
        posts: dict[str, Callable[..., Awaitable[Any]]] = {  # routes are tried in this order: those of each step first
            "/retrieve_future": self.retrieve,
            "/forward_backward": self.forward_backward,
            "/optim_step": self.numbered,
            "/asample": self.asample,
            "/client/config": self.client_config,
            "/client/dynamic_config": self.dynamic_config,
            "/create_session": self.create_session,
            "/session_heartbeat": self.heartbeat,
            "/sessions/{session_id}/finish": self.finish,
            "/telemetry": self.telemetry,
            "/create_model": self.create_model,
            "/get_info": self.get_info,
            "/unload_model": self.unload_model,
            "/forward": self.forward_backward,
            "/save_weights": self.numbered,
            "/save_weights_for_sampler": self.numbered,
            "/save_weights_external": self.numbered,
            "/load_weights": self.load_weights,
            "/create_sampling_session": self.create_sampler,
            "/cancel_future": self.cancel,
        }
        for path, handler in posts.items():
            router.add_api_route(path, handler, methods=["POST"], response_model=None)
        router.add_api_route("/healthz", self.healthz, methods=["GET"])
        router.add_api_route("/get_server_capabilities", self.capabilities, methods=["GET"])
        router.add_api_route("/samplers/{sampler_id}", self.sampler, methods=["GET"])
        return router

    # ---- the service itself

    async def healthz(self) -> dict[str, str]:
        """Without a key."""
        return {"status": "ok"}

    async def client_config(self) -> dict[str, Any]:
        """Flags for the SDK."""
        return CLIENT_CONFIG

    async def dynamic_config(self) -> dict[str, Any]:
        """Flags that it asks for again."""
        return DYNAMIC_CONFIG

    async def capabilities(self) -> dict[str, Any]:
        """The one base."""
        base = self._service.base
        model = {"model_name": base.name, "max_context_length": base.max_context_length, "trainable": True, "sampleable": True}
        return {"supported_models": [model]}

    async def telemetry(self, request: Request) -> dict[str, str]:
        """What went wrong at a client, in a line each. The events' data are left out: they hold headers, and so keys."""
        events = (await request.json())["events"]
        for event in [event for event in events if event["severity"] in _LOUD][:_TELEMETRY_EVENTS]:
            if "error_type" in event:
                log.warning("client: %s: %s", event["error_type"], hide(str(event["error_message"]))[:_TELEMETRY_WORDS])
            elif "event_name" in event:
                log.warning("client: %s", str(event["event_name"])[:_TELEMETRY_WORDS])
        return {"status": "accepted"}

    # ---- sessions

    async def create_session(self, owner: Owner, session: body.CreateSession) -> dict[str, Any]:
        """A new one."""
        return {"type": "create_session", "session_id": (await self._service.create_session(owner, session)).id}

    async def heartbeat(self, owner: Owner, beat: body.SessionId) -> Any:
        """410 ends the SDK's heartbeats."""
        session = self._service.registry.session(beat.session_id, owner)
        session.seen_at = now()
        if session.finished is not None:
            return Response(status_code=410)
        return {"type": "session_heartbeat"}

    async def finish(self, owner: Owner, session_id: str, finish: body.Finish) -> Response:
        """The client is done."""
        await self._service.finish_session(owner, session_id, finish.reason, finish.detail)
        return Response(status_code=204)

    # ---- training

    async def create_model(self, owner: Owner, request: Request) -> dict[str, Any]:
        """A future."""
        return _future(await self._service.create_model(owner, await request.body()))

    async def get_info(self, owner: Owner, named: body.ModelId) -> dict[str, Any]:
        """What a training client says of its model."""
        model, base = self._service.registry.model(named.model_id, owner), self._service.base
        return {
            "type": "get_info",
            "model_id": model.id,
            "is_lora": True,
            "lora_rank": model.lora["rank"],
            "model_name": base.name,
            "model_data": {"arch": base.arch, "model_name": base.name, "tokenizer_id": base.tokenizer_path},
            "optimizer_config": {"type": "adamw"},
        }

    async def unload_model(self, owner: Owner, named: body.ModelId) -> dict[str, Any]:
        """Accepted: a model that is not used leaves the engine by itself."""
        return {"type": "unload_model", "model_id": self._service.registry.model(named.model_id, owner).id}

    async def forward_backward(self, owner: Owner, request: Request) -> dict[str, Any]:
        """A future; the body is protobuf."""
        if "content-encoding" in request.headers:
            raise UserError(f"Content-Encoding is {request.headers['content-encoding']}; expected none, as client/config says")
        raw = await request.body()
        why = request.scope["state"]["refused"]
        if why is None:
            return _future(await self._service.forward_backward(owner, raw))
        head = wire.numbered_head(raw)
        if head is None:
            raise HTTPException(413, why)
        return _future(await self._service.refused(owner, *head, why))

    async def numbered(self, owner: Owner, request: Request) -> dict[str, Any]:
        """A future of what the path names."""
        raw = await request.body()
        named = body.Numbered.model_validate_json(raw)
        kind = request.url.path.rpartition("/")[2]
        return _future(await self._service.submit(owner, kind, named.model_id, named.seq_id, raw))

    async def load_weights(self, owner: Owner, request: Request) -> dict[str, Any]:
        """A future."""
        return _future(await self._service.load_weights(owner, await request.body()))

    # ---- sampling

    async def create_sampler(self, owner: Owner, sampler: body.CreateSampler) -> dict[str, Any]:
        """A sampling session."""
        made = await self._service.create_sampler(owner, sampler)
        return {"type": "create_sampling_session", "sampling_session_id": made.id}

    async def sampler(self, owner: Owner, sampler_id: str) -> dict[str, Any]:
        """What it samples from."""
        sampler = self._service.registry.sampler(sampler_id, owner)
        return {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.model_path}

    async def asample(self, owner: Owner, request: Request) -> dict[str, Any]:
        """A future, with an id for each sequence that will come."""
        operation, count = await self._service.sample(owner, await request.body())
        return {
            "request_id": operation.request_id,
            "sample_sequence_ids": [f"{operation.request_id}:{i}" for i in range(count)],
        }

    # ---- futures

    async def retrieve(self, owner: Owner, future: body.RequestId) -> Response:
        """Waits for the result, but not for long."""
        answer = await self._service.retrieve(owner, future.request_id)
        return Response(answer.body, media_type=answer.media_type)

    async def cancel(self, owner: Owner, future: body.RequestId) -> Response:
        """Nobody waits for it."""
        await self._service.cancel(owner, future.request_id)
        return Response(status_code=204)


def _future(operation: Operation) -> dict[str, Any]:
    return {"request_id": operation.request_id, "model_id": operation.owner_id}
