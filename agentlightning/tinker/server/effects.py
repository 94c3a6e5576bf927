"""What each kind of operation does to the engine and to what the service knows. An operation enters; its result leaves.

Runs in the engine's thread alone. Nothing here is durable yet: the runner commits the result and the changes together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentlightning.checkpoint.files import make_directory, remove
from agentlightning.errors import NumericsError, UserError
from agentlightning.tinker.engine_api import LoraEngine
from agentlightning.tinker.server import wire
from agentlightning.tinker.server.journal import Change, put
from agentlightning.tinker.server.paths import TinkerPath, check_name, folder_of, parse_path
from agentlightning.tinker.server.records import REFUSED, Checkpoint, Model, Operation, ResultType, Sampler, now
from agentlightning.tinker.server.registry import Registry
from agentlightning.tinker.server.requests import (
    CreateModel,
    LoadWeights,
    OptimStep,
    SaveExternal,
    SaveSampler,
    SaveWeights,
    explain,
)
from agentlightning.tinker.types import LoraConfig

# The client's doing, and the same whenever it is done again.
USER_FAULTS = (UserError, NumericsError, ValidationError)


def words(error: BaseException) -> str:
    """What the client is told."""
    return explain(error.errors()) if isinstance(error, ValidationError) else str(error)


@dataclass(slots=True)
class Effect:
    """A result, the changes that belong to it, and what it did to the model."""

    type: ResultType
    body: bytes
    changes: list[Change] = field(default_factory=list)
    gradient: bool | None = None  # whether the model holds a gradient sum now; None: as before
    save_now: bool = False  # it cannot be replayed: the checkpoint that it read may be gone by then
    tokens: int = 0
    garbage: list[Path] = field(default_factory=list)  # may go once the changes are durable


def json_effect(**values: Any) -> Effect:
    """A JSON result."""
    return Effect("json", json.dumps(values).encode())


class Effects:
    """By kind: `run(operation, payload)`. UserError for what the client did wrong."""

    def __init__(self, engine: LoraEngine, registry: Registry, root: Path) -> None:
        self._engine, self._registry, self._root = engine, registry, root
        self._kinds: dict[str, Callable[[Model, Operation, bytes], Effect]] = {
            "create_model": self._create_model,
            "create_from_state": self._create_from_state,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_sampler,
            "save_weights_external": self._save_external,
            "load_weights": self._load_weights,
            REFUSED: self._refuse,
        }

    def run(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        """Do it."""
        return self._kinds[operation.kind](model, operation, payload)

    def _refuse(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        raise UserError(payload.decode())

    # ---- training

    def _create_model(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        request = CreateModel.model_validate_json(payload)
        self._engine.create_model(model.id, request.lora_config.plain())
        return self._created(model, json_effect(type="create_model", model_id=model.id))

    def _create_from_state(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        request = LoadWeights.model_validate_json(payload)
        source = self._training_checkpoint(request.path, operation.owner)
        self._engine.create_model(model.id, LoraConfig(**source.lora))
        self._engine.load_state(model.id, self._root / source.directory, request.optimizer)
        model.lora = source.lora
        effect = self._created(model, json_effect(type="load_weights", path=request.path, model_id=model.id))
        effect.save_now = True
        return effect

    def _created(self, model: Model, effect: Effect) -> Effect:
        model.created, effect.gradient = True, False
        effect.changes.append(put(model))
        return effect

    def _forward_backward(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        request = wire.decode_forward_backward(payload)
        output = self._engine.forward_backward(
            model.id, request.data, request.loss_fn, request.loss_fn_config, request.forward_only
        )
        tokens = sum(datum.model_input.length for datum in request.data)
        gradient = None if request.forward_only else True
        return Effect("protobuf", wire.encode_forward_backward(output), gradient=gradient, tokens=tokens)

    def _optim_step(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        metrics = self._engine.optim_step(model.id, OptimStep.model_validate_json(payload).adam_params.plain())
        effect = json_effect(metrics=metrics, type="optim_step")
        effect.gradient = False
        return effect

    def _load_weights(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        request = LoadWeights.model_validate_json(payload)
        source = self._training_checkpoint(request.path, operation.owner)
        if source.lora["rank"] != model.lora["rank"]:
            raise UserError(
                f"{request.path} has rank {source.lora['rank']}, the model {model.lora['rank']}; expected the same: make the "
                "client with create_training_client_from_state, which takes the rank from the checkpoint"
            )
        self._engine.load_state(model.id, self._root / source.directory, request.optimizer)
        effect = json_effect(type="load_weights", path=request.path, model_id=model.id)
        effect.gradient, effect.save_now = False, True
        return effect

    def _training_checkpoint(self, path: str, owner: str) -> Checkpoint:
        parsed = parse_path(path)
        if parsed.kind != "weights":
            raise UserError(f"{path} is of {parsed.kind}, which no training can go on from; expected a path of save_state")
        return self._registry.checkpoint(path, owner)

    # ---- checkpoints

    def _save_weights(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        request = SaveWeights.model_validate_json(payload)
        path, old = self._free_path(model, "weights", request.path, request.overwrite)
        directory = self._new_directory(model, path, operation)
        size = self._engine.save_state(model.id, directory)
        effect = json_effect(type="save_weights", path=str(path))
        expires, metadata = _expiry(request.ttl_seconds), request.user_metadata
        self._checkpoint(model, path, directory, size, expires, metadata, effect)
        if old is not None:
            effect.garbage.append((self._root / old.directory).parent)
        return effect

    def _save_sampler(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        request = SaveSampler.model_validate_json(payload)
        if (request.path is None) == (request.sampling_session_seq_id is None):
            raise UserError("path and sampling_session_seq_id are both given or both missing; expected one of them")
        if request.path is not None:
            path, _ = self._free_path(model, "sampler_weights", request.path)
            directory = self._new_directory(model, path, operation)
            size = self._engine.save_sampler(model.id, directory)
            effect = json_effect(type="save_weights_for_sampler", path=str(path))
            self._checkpoint(model, path, directory, size, _expiry(request.ttl_seconds), request.user_metadata, effect)
            return effect
        sampler_id = f"{model.session_id}:sample:{request.sampling_session_seq_id}"
        if sampler_id in self._registry.samplers:
            raise UserError(
                f"sampling_session_seq_id={request.sampling_session_seq_id} is taken by {sampler_id}; expected a new one"
            )
        directory = new_state_directory(self._folder(model) / "snapshots" / str(operation.seq))
        self._engine.save_sampler(model.id, directory)
        sampler = Sampler(
            id=sampler_id,
            session_id=model.session_id,
            owner=model.owner,
            base_model=model.base_model,
            stream=f"{model.id.partition(':')[2]}@{operation.seq}",
            directory=str(directory.relative_to(self._root)),
            model_id=model.id,
            used_at=now(),
        )
        self._registry.add(sampler)
        effect = json_effect(type="save_weights_for_sampler", path=None, sampling_session_id=sampler_id)
        effect.changes.append(put(sampler))
        return effect

    def _save_external(self, model: Model, operation: Operation, payload: bytes) -> Effect:
        request = SaveExternal.model_validate_json(payload)
        if request.age_encryption_recipients:
            raise UserError("age_encryption_recipients are given, but this server encrypts no exports; expected none")
        path, _ = self._free_path(model, "external_weights", request.path)
        directory = self._new_directory(model, path, operation)
        size = self._engine.save_sampler(model.id, directory)
        effect = json_effect(type="save_weights_external", path=str(path))
        self._checkpoint(model, path, directory, size, _expiry(request.ttl_seconds), None, effect)
        return effect

    def _free_path(
        self, model: Model, kind: str, name: str | None, overwrite: bool = False
    ) -> tuple[TinkerPath, Checkpoint | None]:
        path = TinkerPath(model.id, kind, check_name(name))
        if str(path) not in self._registry.checkpoints:
            return path, None
        if not overwrite:
            raise UserError(f"{path} is there already; expected a name that is free: give another one, or overwrite=True")
        return path, self._registry.checkpoints[str(path)]

    def _folder(self, model: Model) -> Path:
        return self._root / "models" / folder_of(model.id)

    def _new_directory(self, model: Model, path: TinkerPath, operation: Operation) -> Path:
        return new_state_directory(self._folder(model) / path.kind / f"{path.name}@{operation.seq}")

    def _checkpoint(
        self,
        model: Model,
        path: TinkerPath,
        directory: Path,
        size: int,
        expires: str | None,
        metadata: dict[str, str] | None,
        effect: Effect,
    ) -> None:
        checkpoint = Checkpoint(
            id=str(path),
            model_id=model.id,
            owner=model.owner,
            kind=path.kind,
            name=path.name,
            directory=str(directory.relative_to(self._root)),
            created_at=now(),
            size_bytes=size,
            base_model=model.base_model,
            lora=model.lora,
            expires_at=expires,
            user_metadata=metadata,
        )
        self._registry.add(checkpoint)
        effect.changes.append(put(checkpoint))


def new_state_directory(folder: Path) -> Path:
    """`folder/state`, which is not there yet. What a killed process began in `folder` is nobody's."""
    if folder.exists():
        remove(folder)
    make_directory(folder)
    return folder / "state"


def _expiry(ttl_seconds: int | None) -> str | None:
    return None if ttl_seconds is None else (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat()
