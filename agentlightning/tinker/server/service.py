"""What the routes do: requests of a known owner enter, are checked, made durable and queued; futures and results leave.

Runs in the event loop. What a client did wrong is a UserError here (400, or 404) when it can be seen at once, else the error of
the future: never a status that the SDK would send again for minutes.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentlightning.checkpoint.manifest import digest
from agentlightning.errors import UserError
from agentlightning.tinker.engine_api import BaseModelInfo, LoraEngine
from agentlightning.tinker.server import wire
from agentlightning.tinker.server.journal import Change, Journal, accept, put
from agentlightning.tinker.server.keeper import SavePolicy
from agentlightning.tinker.server.keys import Keys
from agentlightning.tinker.server.paths import parse_path
from agentlightning.tinker.server.records import REFUSED, SAMPLE, Blob, Model, Operation, Sampler, Session, now
from agentlightning.tinker.server.registry import NotFoundError, Registry
from agentlightning.tinker.server.requests import Asample, CreateModel, CreateSampler, CreateSession, LoadWeights, OntoModel
from agentlightning.tinker.server.runner import Runner
from agentlightning.tinker.server.work_queue import MAX_BATCH, WorkQueue

POLL_S = 25.0  # the SDK gives up a poll at 45 s
SAMPLE_PREFIX = "sample-"
_LARGE = 1 << 20  # bytes of a result
# What a submit that is sent again may have changed: the SDK counts its sampling sessions at each attempt.
_VOLATILE = ("sampling_session_seq_id",)


class GoneError(UserError):
    """A result that will not come, of something that the SDK may send again (410)."""


class ClosingError(Exception):
    """The service is going; its next start will take the request (503, which the SDK sends again)."""


@dataclass(slots=True)
class Answer:
    """What a poll gives."""

    media_type: str
    body: bytes


class Service:
    """Built inside the running event loop; `start`, then `close`."""

    def __init__(
        self,
        engine: LoraEngine,
        journal: Journal,
        keys: Keys,
        root: Path,
        policy: SavePolicy | None = None,
        max_batch: int = MAX_BATCH,
    ) -> None:
        self.journal, self.keys, self.root = journal, keys, root
        self.registry = Registry.of(journal.loaded)
        for sampler in self.registry.samplers.values():
            sampler.used_at = now()
        self.base: BaseModelInfo = engine.base_model()
        self.queue = WorkQueue(max_batch)
        self.closing, self.ended = asyncio.Event(), asyncio.Event()
        self.started_at = time.time()
        self._loop = asyncio.get_running_loop()
        self.runner = Runner(
            engine, self.registry, journal, self.queue, root, self._call_soon, policy, lambda: self._call_soon(self.ended.set)
        )

    def _call_soon(self, call: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def start(self) -> None:
        """Go on with what waits."""
        self.runner.start()

    def close(self) -> None:
        """Save, and end; blocks."""
        self.runner.close()
        self.journal.close()

    async def keep(self, *changes: Change, blobs: Sequence[Blob] = ()) -> None:
        """Returns when the changes are durable."""
        await _durable(self.journal.write(*changes, blobs=blobs))

    # ---- sessions

    async def create_session(self, owner: str, body: CreateSession) -> Session:
        """A new one."""
        session = Session(
            id=uuid.uuid4().hex,
            owner=owner,
            created_at=now(),
            user_metadata=body.user_metadata or {},
            tags=body.tags,
            project_id=body.project_id,
            display_name=body.display_name,
            seen_at=now(),
        )
        self.registry.add(session)
        await self.keep(put(session))
        return session

    async def finish_session(self, owner: str, session_id: str, reason: dict[str, Any], detail: str | None) -> None:
        """Its models leave the engine; what waits for a request that will not come any more fails."""
        session = self.registry.session(session_id, owner)
        session.finished = {"reason": reason, "detail": detail}
        await self.keep(put(session))
        for model in [model for model in list(self.registry.models.values()) if model.session_id == session_id]:
            for operation in self.queue.cut(model.id):
                self.runner.answer(operation, f"request {operation.seq} waited for an earlier one, and the session has ended")
            if self.queue.is_empty(model.id):
                self.queue.add_chore(lambda model_id=model.id: self.runner.put_away(model_id))

    # ---- operations

    async def create_model(self, owner: str, raw: bytes) -> Operation:
        """A model of this session; the same number again is the same model."""
        body = CreateModel.model_validate_json(raw)
        self._check_base(body.base_model)
        lora = asdict(body.lora_config.plain())
        return await self._new_model(owner, "create_model", raw, (body.session_id, body.model_seq_id), lora, body.user_metadata)

    async def load_weights(self, owner: str, raw: bytes) -> Operation:
        """Onto a model, or as a new one."""
        named = OntoModel.model_validate_json(raw)
        if named.session_id is None and named.model_id is not None and named.seq_id is not None:
            return await self.submit(owner, "load_weights", named.model_id, named.seq_id, raw)
        body = LoadWeights.model_validate_json(raw)
        if body.session_id is None or body.model_seq_id is None:
            raise UserError("load_weights names neither a model; expected model_id and seq_id, or session_id and model_seq_id")
        if body.base_model is not None:
            self._check_base(body.base_model)
        if parse_path(body.path).kind != "weights":
            raise UserError(f"the path is {body.path}; expected one of save_state, tinker://<run>/weights/<name>")
        source = self.registry.checkpoint(body.path, owner)
        number = (body.session_id, body.model_seq_id)
        return await self._new_model(owner, "create_from_state", raw, number, source.lora, body.user_metadata)

    def _check_base(self, name: str) -> None:
        if name != self.base.name:
            raise NotFoundError(
                f"base_model is {name[:200]!r}; expected {self.base.name!r}, the one that this server was started with"
            )

    async def _new_model(
        self, owner: str, kind: str, raw: bytes, named: tuple[str, int], lora: dict[str, Any], metadata: dict[str, Any] | None
    ) -> Operation:
        session_id, number = named
        self.registry.session(session_id, owner)
        model_id = f"{session_id}:train:{number}"
        if model_id not in self.registry.models:
            self.registry.add(Model(model_id, session_id, owner, now(), self.base.name, lora, metadata))
            self.queue.open_line(model_id, 0)
        return await self.submit(owner, kind, model_id, 0, raw, put(self.registry.models[model_id]))

    async def forward_backward(self, owner: str, raw: bytes) -> Operation:
        """One with a protobuf body. What cannot be read is an operation too, if its number can: else that would be a gap."""
        try:
            message = wire.parse_forward_backward(raw)
        except UserError as error:
            head = wire.numbered_head(raw)
            if head is None:
                raise
            return await self.refused(owner, *head, str(error))
        if message.seq_id < 1:
            raise UserError(f"seq_id is {message.seq_id}; expected 1 or more, counted by the client")
        return await self.submit(owner, "forward_backward", message.model_id, message.seq_id, raw)

    async def refused(self, owner: str, model_id: str, seq: int, why: str) -> Operation:
        """One that fails in its turn."""
        return await self.submit(owner, REFUSED, model_id, seq, why.encode())

    async def submit(self, owner: str, kind: str, model_id: str, seq: int, raw: bytes, *changes: Change) -> Operation:
        """Durable when this returns. The same number again gives the same operation, UserError if it is another one."""
        model = self.registry.model(model_id, owner)
        model.last_request_at = now()
        return await self._accept(owner, kind, model_id, seq, raw, *changes)

    async def sample(self, owner: str, raw: bytes) -> tuple[Operation, int]:
        """The operation, and how many samples it asks for."""
        body = Asample.model_validate_json(raw)
        self.registry.sampler(body.sampling_session_id, owner).used_at = now()
        self._check_prompt(body)
        operation = await self._accept(owner, SAMPLE, body.sampling_session_id, body.seq_id, raw)
        return operation, body.num_samples

    def _check_prompt(self, body: Asample) -> None:
        kinds = {chunk.type for chunk in body.prompt.chunks} - {"encoded_text"}
        if kinds:
            raise UserError(
                f"the prompt holds chunks of {', '.join(sorted(kinds))}; expected encoded_text: this base reads tokens alone"
            )
        tokens = [token for chunk in body.prompt.chunks for token in chunk.tokens]
        longest = self.base.max_context_length
        if not tokens or len(tokens) >= longest or min(tokens) < 0 or max(tokens) >= 1 << 31:
            raise UserError(f"the prompt has {len(tokens)} tokens; expected 1 to {longest - 1} token ids, none below 0")
        body.check_size(len(tokens), longest)
        last_n = body.prompt_logprobs_last_n
        if last_n is not None and (not body.prompt_logprobs or last_n > len(tokens) - 1):
            raise UserError(f"prompt_logprobs_last_n is {last_n}; expected prompt_logprobs with it, and 1 to {len(tokens) - 1}")

    async def _accept(self, owner: str, kind: str, owner_id: str, seq: int, raw: bytes, *changes: Change) -> Operation:
        numbered = self.registry.numbered
        if owner_id in numbered and seq in numbered[owner_id]:
            return await self._again(numbered[owner_id][seq], kind, raw)
        if self.closing.is_set():
            raise ClosingError
        if kind != SAMPLE and seq < self.queue.next_seq(owner_id):
            raise UserError(
                f"request {seq} of {owner_id} was answered long ago; expected {self.queue.next_seq(owner_id)} or more"
            )
        prefix = SAMPLE_PREFIX if kind == SAMPLE else "op-"
        blob = Blob("requests", raw)
        operation = Operation(prefix + uuid.uuid4().hex, owner_id, owner, seq, kind, blob, digest(raw))
        self.registry.add_operation(operation)
        operation.kept = self.journal.write(*changes, accept(operation), blobs=[blob])
        self.queue.add(operation)  # the engine may begin; the runner gives nothing out before this is durable
        try:
            await _durable(operation.kept)
        except Exception:  # not acknowledged: the client's next attempt is a first one
            self.queue.take_back(operation)
            self.registry.forget_operation(operation)
            operation.durable.set()
            raise
        operation.durable.set()
        return operation

    async def _again(self, operation: Operation, kind: str, raw: bytes) -> Operation:
        await operation.durable.wait()
        if operation.request_id not in self.registry.operations:  # the first attempt could not be kept
            raise ClosingError
        if operation.kind != kind or not self._is_same(operation, raw):
            raise UserError(
                f"request {operation.seq} of {operation.owner_id} was a {operation.kind} with other contents; expected a new "
                "number: two clients must not use one model"
            )
        return operation

    def _is_same(self, operation: Operation, raw: bytes) -> bool:
        if operation.payload_digest == digest(raw) or operation.payload is None:
            return True
        if operation.kind == REFUSED:
            return False
        before = self.journal.segments.read(operation.payload)
        if operation.kind == "forward_backward":
            return wire.parse_forward_backward(before) == wire.parse_forward_backward(raw)
        return _steady(before) == _steady(raw)

    async def cancel(self, owner: str, request_id: str) -> None:
        """A sample that nobody waits for any more."""
        operation = self._operation(owner, request_id)
        if operation.kind == SAMPLE and self.queue.take_sample(operation):
            self.runner.answer(operation, "the client cancelled the request")

    # ---- futures

    def _operation(self, owner: str, request_id: str) -> Operation:
        operations = self.registry.operations
        if request_id not in operations or operations[request_id].owner != owner:
            if request_id.startswith(SAMPLE_PREFIX):
                raise GoneError(f"the sample {request_id[:100]} is gone; expected one that was asked for")
            raise NotFoundError(f"there is no request {request_id[:100]!r} of this key's")
        return operations[request_id]

    async def retrieve(self, owner: str, request_id: str, timeout: float = POLL_S) -> Answer:
        """The result, an error, or `try_again` when there is none so soon."""
        operation = self._operation(owner, request_id)
        await _first_of(operation.done, self.closing, timeout)
        if not operation.done.is_set():
            return _json({"type": "try_again", "request_id": request_id, "queue_state": "active", **self._reason(operation)})
        assert operation.result is not None
        read = self.journal.segments.read  # a small one lies in the page cache: another thread would cost more
        body = read(operation.result) if operation.result.size < _LARGE else await asyncio.to_thread(read, operation.result)
        operation.fetched_at = operation.fetched_at or time.time()
        if operation.result_type == "protobuf":
            return Answer(wire.CONTENT_TYPE, body)
        if operation.result_type == "json":
            return Answer("application/json", body)
        return _json({"error": body.decode(), "category": operation.result_type})

    def _reason(self, operation: Operation) -> dict[str, str]:
        missing = self.queue.missing(operation)
        if missing is not None:
            return {"queue_state_reason": f"request {operation.seq} waits for request {missing}, which has not come yet"}
        training, samples = self.queue.lengths()
        return {"queue_state_reason": f"{training} training requests and {samples} samples wait"}

    # ---- samplers

    async def create_sampler(self, owner: str, body: CreateSampler) -> Sampler:
        """Of saved weights or of the base; the same number again is the same one."""
        self.registry.session(body.session_id, owner)
        sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
        if sampler_id in self.registry.samplers:
            return self.registry.sampler(sampler_id, owner)
        directory = None
        if body.model_path is not None:
            path = parse_path(body.model_path)
            if path.kind != "sampler_weights":
                raise UserError(
                    f"model_path is {body.model_path}; expected one of save_weights_for_sampler, .../sampler_weights/<name>"
                )
            directory = self.registry.checkpoint(body.model_path, owner).directory
        elif body.base_model is None:
            raise UserError("neither model_path nor base_model is given; expected one of them")
        if body.base_model is not None:
            self._check_base(body.base_model)
        sampler = Sampler(
            id=sampler_id,
            session_id=body.session_id,
            owner=owner,
            base_model=self.base.name,
            stream=self._stream(body),
            model_path=body.model_path,
            directory=directory,
            used_at=now(),
        )
        self.registry.add(sampler)
        await self.keep(put(sampler))
        return sampler

    def _stream(self, body: CreateSampler) -> str:
        """What is sampled, without the sessions' random names, and which time in this session: so that a program that is run
        again draws the same, and one that samples the same weights twice does not."""
        same = [s for s in list(self.registry.samplers.values()) if s.session_id == body.session_id and s.model_id is None]
        times = sum(sampler.model_path == body.model_path for sampler in same)
        source = "base" if body.model_path is None else body.model_path.partition(":train:")[2]
        return f"{source}#{times}"


async def _durable(written: Future[None]) -> None:
    """Wait; who is cancelled meanwhile must not cancel the write."""
    await asyncio.shield(asyncio.wrap_future(written))


def _steady(raw: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(raw).items() if name not in _VOLATILE}


def _json(value: dict[str, Any]) -> Answer:
    return Answer("application/json", json.dumps(value).encode())


async def _first_of(done: asyncio.Event, closing: asyncio.Event, timeout: float) -> None:
    """Until one of them is set, or the time is up."""
    if done.is_set() or closing.is_set():
        return
    waits = [asyncio.ensure_future(event.wait()) for event in (done, closing)]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
