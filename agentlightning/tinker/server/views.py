"""Records as the REST client sees them, and the service's state as `agl serve --status` and the page show it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import psutil

from agentlightning import __version__
from agentlightning.tinker.server.paths import KINDS
from agentlightning.tinker.server.records import Checkpoint, Model, Session
from agentlightning.tinker.server.registry import Registry
from agentlightning.tinker.server.service import Service


def checkpoint_view(checkpoint: Checkpoint) -> dict[str, Any]:
    """The SDK's Checkpoint."""
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": KINDS[checkpoint.kind],
        "time": checkpoint.created_at,
        "tinker_path": checkpoint.id,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": checkpoint.expires_at,
    }


def run_view(registry: Registry, model: Model) -> dict[str, Any]:
    """The SDK's TrainingRun."""
    checkpoints = registry.checkpoints_of(model.id)
    return {
        "training_run_id": model.id,
        "base_model": model.base_model,
        "model_owner": model.owner,
        "is_lora": True,
        "lora_rank": model.lora["rank"],
        "corrupted": False,
        "last_request_time": model.last_request_at or model.created_at,
        "last_checkpoint": _last(checkpoints, "weights"),
        "last_sampler_checkpoint": _last(checkpoints, "sampler_weights"),
        "user_metadata": _texts(model.user_metadata),
    }


def _last(checkpoints: Sequence[Checkpoint], kind: str) -> dict[str, Any] | None:
    of_kind = [checkpoint for checkpoint in checkpoints if checkpoint.kind == kind]
    return checkpoint_view(of_kind[-1]) if of_kind else None


def session_view(registry: Registry, session: Session) -> dict[str, Any]:
    """The SDK's SessionSummary."""
    models = {model.id for model in list(registry.models.values()) if model.session_id == session.id}
    checkpoints = [checkpoint for checkpoint in list(registry.checkpoints.values()) if checkpoint.model_id in models]
    return {
        "session_id": session.id,
        "created_at": session.created_at,
        "owner": session.owner,
        "project_id": session.project_id or "",
        "status": status_of(session),
        "checkpoints_count": len(checkpoints),
        "display_name": session.display_name,
        "user_metadata": _texts(session.user_metadata),
        "checkpoint_storage_bytes": sum(checkpoint.size_bytes for checkpoint in checkpoints),
    }


def status_of(session: Session) -> dict[str, Any]:
    """The SDK's SessionStatus."""
    return {"type": "active"} if session.finished is None else {"type": "client_finished", **session.finished}


def _texts(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    """The wire wants text."""
    if metadata is None:
        return None
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


def page_of(items: Sequence[Any], offset: int, limit: int) -> tuple[list[Any], dict[str, int]]:
    """A page, and its cursor."""
    return list(items[offset : offset + limit]), {"offset": offset, "limit": limit, "total_count": len(items)}


def state_view(service: Service, owner: str) -> dict[str, Any]:
    """Models and checkpoints of this key's owner; the queue, the speed and the memory of the whole service."""
    registry, held = service.registry, set(service.runner.keeper.held)
    checkpoints = [checkpoint for checkpoint in list(registry.checkpoints.values()) if checkpoint.owner == owner]
    training, samples = service.queue.lengths()
    engine = service.runner.memory
    resident = psutil.Process().memory_info().rss + engine.host_bytes
    return {
        "version": __version__,
        "base_model": service.base.name,
        "up_seconds": round(time.time() - service.started_at),
        "queue": {"training": training, "samples": samples},
        "tokens_per_second": service.runner.rates(),
        "memory": {"resident_bytes": resident, "device_bytes": engine.device_bytes},
        "models": [
            {
                "id": model.id,
                "rank": model.lora["rank"],
                "requests": service.queue.next_seq(model.id) - 1,
                "saved": max(model.saved_seq, 0),
                "in_engine": model.id in held,
                "last_request_at": model.last_request_at,
            }
            for model in list(registry.models.values())
            if model.owner == owner
        ],
        "checkpoints": {"count": len(checkpoints), "bytes": sum(checkpoint.size_bytes for checkpoint in checkpoints)},
        "latest_checkpoints": [checkpoint_view(c) for c in sorted(checkpoints, key=lambda c: c.created_at)[-10:][::-1]],
    }
