"""The one thread that uses the engine: takes work from the queue, does it, commits its result, and lets the client have it.

It may begin before the request is durable, but a result is given out when both are, so that no client has seen one that a
restarted service would not know. An error that is the client's is an answer; a fault of the engine is one too, with its
traceback in the log, and the model is restored from what is durable. Anything else ends the thread, and with it the service:
its next start goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sqlite3
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

from agentlightning.checkpoint.files import remove
from agentlightning.checkpoint.manifest import digest
from agentlightning.errors import AgentLightningError, UserError
from agentlightning.tinker.engine_api import EngineMemory, LoraEngine, SampleRequest
from agentlightning.tinker.server import wire
from agentlightning.tinker.server.effects import USER_FAULTS, Effect, Effects, words
from agentlightning.tinker.server.journal import Change, Journal, drop_payload, finish
from agentlightning.tinker.server.keeper import CHANGES_MODEL, Keeper, SavePolicy
from agentlightning.tinker.server.records import SAMPLE, Blob, Model, Operation
from agentlightning.tinker.server.registry import Registry
from agentlightning.tinker.server.requests import Asample
from agentlightning.tinker.server.work_queue import Chore, Sample, Train, WorkQueue
from agentlightning.tinker.types import EncodedTextChunk, ModelInput, SampleResponse

IDLE_S = 0.5
MAX_SAMPLERS = 32  # in the engine; any other is brought back from its directory
_RATE_WINDOW_S = 60.0
_RETRY_S = 1.0
_CLOSE_S = 15.0  # for the engine to end
_MEMORY_S = 10.0  # how old what the status says of the engine's memory may be
_EARLY = ("forward_backward", "optim_step")  # may begin before they are durable: they change the engine alone
# What PyTorch, the file system and our own mistakes raise. Not `Exception`: what is not foreseen ends the service.
FAULTS = (
    AgentLightningError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
log = logging.getLogger(__name__)


class Runner:
    """`start`, then `close`. `on_end` is called when the thread ends; `saved` says whether that was as it should be."""

    def __init__(
        self,
        engine: LoraEngine,
        registry: Registry,
        journal: Journal,
        queue: WorkQueue,
        root: Path,
        call_soon: Callable[[Callable[[], object]], object],
        policy: SavePolicy | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self._engine, self._registry, self._journal, self._queue, self._root = engine, registry, journal, queue, root
        self._effects = Effects(engine, registry, root)
        self.keeper = Keeper(engine, registry, journal, self._effects, root, policy or SavePolicy())
        self._samplers: OrderedDict[str, None] = OrderedDict()  # in the engine, the longest unused first
        self._tokens: deque[tuple[float, str, int]] = deque()
        self.memory = EngineMemory()  # as it was a moment ago: only the engine's own thread can ask
        self._memory_at = -math.inf
        self.saved = threading.Event()  # it was told to go, and all is on the disk
        self._unwritten: set[str] = set()  # requests with results that are on their way to the disk
        self._call_soon, self._on_end = call_soon, on_end
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Open a line for each model, queue what waits, and begin."""
        for model in list(self._registry.models.values()):
            answered = [op.seq for op in self._registry.operations_of(model.id) if op.result_type is not None]
            self._queue.open_line(model.id, max([model.saved_seq, *answered]) + 1)
        for operation in list(self._registry.operations.values()):
            if operation.result_type is None:
                self._queue.add(operation)
        self._thread.start()

    def close(self) -> None:
        """Finish what runs, save what can be, close the engine. What waits is done by the next start.

        An engine that does not end, because its cluster went first, is left: all is saved by then.
        """
        self._queue.close()
        while self._thread.is_alive() and not self.saved.wait(_RETRY_S):
            pass
        self._thread.join(_CLOSE_S)

    @property
    def is_running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def rates(self) -> dict[str, float]:
        """Tokens a second over the last minute: `train`, `sample`."""
        since = time.monotonic() - _RATE_WINDOW_S
        recent = [entry for entry in list(self._tokens) if entry[0] >= since]
        return {
            kind: round(sum(count for _, of, count in recent if of == kind) / _RATE_WINDOW_S, 1) for kind in ("train", "sample")
        }

    def _run(self) -> None:
        try:
            while True:
                work = self._queue.next(IDLE_S)
                if isinstance(work, Chore):
                    work.run()
                elif isinstance(work, Train):
                    self._train(work.operation)
                elif isinstance(work, Sample):
                    self._sample(work.operations)
                elif self._queue.closed:
                    break
                else:
                    self._save_idle()
                self._look_at_memory()
            self._save_idle()
            self.saved.set()
            self._engine.close()
        finally:
            self._on_end()

    def _look_at_memory(self) -> None:
        """Now and then: on Ray it is a call to every worker."""
        now = time.monotonic()
        if now - self._memory_at >= _MEMORY_S:
            self._memory_at = now
            with contextlib.suppress(AgentLightningError):  # a worker has died: whoever needs it is told
                self.memory = self._engine.memory()

    # ---- training

    def _train(self, operation: Operation) -> None:
        """An operation; with a forward_backward the optim_step that waits behind it, so that one commit is for both results."""
        model = self._registry.models[operation.owner_id]
        effect = self._do(model, operation)
        if effect is None:
            return
        if effect.save_now:
            self._finish_and_save(model, operation, effect)
            return
        results = [(operation, effect)]
        update = self._queue.follow(model.id) if operation.kind == "forward_backward" else None
        if update is not None:
            updated = self._do(model, update)
            results += [] if updated is None else [(update, updated)]
        self._finish(*results)
        if model.id in self.keeper.held and operation.kind in CHANGES_MODEL and self.keeper.is_due(model):
            self._save(lambda: self.keeper.save(model))

    def _do(self, model: Model, operation: Operation) -> Effect | None:
        """What came of it. None if it could not be made durable: who sent it was told so, and what it did is void."""
        if operation.kind not in _EARLY and not operation.is_kept():
            self._queue.retreat(model.id)
            return None
        try:
            effect = self._attempt(operation)
        except USER_FAULTS as error:
            effect = Effect("user", words(error).encode())
        except FAULTS as error:
            log.exception("%s: operation %d (%s) failed", model.id, operation.seq, operation.kind)
            effect = Effect("server", f"{operation.kind} failed in the server: {type(error).__name__}: {error}".encode())
            self.keeper.drop(model.id)
        if not operation.is_kept():
            self.keeper.drop(model.id)
            self._queue.retreat(model.id)
            return None
        if effect.type != "server" and model.created:
            self.keeper.note(model, operation, effect.gradient)
        self._queue.advance(model.id)
        self._count("train", effect.tokens)
        return effect

    def _finish_and_save(self, model: Model, operation: Operation, effect: Effect) -> None:
        """Saved before it is answered: what it read may be deleted behind the answer."""
        committed = threading.Event()
        self._finish((operation, effect), then=committed.set)
        committed.wait()
        while not self._save(lambda: self.keeper.save(model)) and not self._queue.closed:
            time.sleep(_RETRY_S)
        self._give_out([operation])

    def _attempt(self, operation: Operation) -> Effect:
        model = self._registry.models[operation.owner_id]
        if operation.seq > 0 and not model.created:
            raise UserError(f"{model.id} could not be created; expected a model that was: see the error of its creation")
        self.keeper.load(model)
        assert operation.payload is not None
        return self._effects.run(model, operation, self._journal.segments.read(operation.payload))

    def _save_idle(self) -> None:
        if not self._save(self.keeper.save_idle):
            time.sleep(_RETRY_S)

    def _save(self, save: Callable[[], None]) -> bool:
        """A save that fails loses nothing: the operations are kept until one succeeds. It must not overtake a result that could
        not be written yet, or the operation would count as undone although the state holds it.
        """
        try:
            self._journal.write().result()
            if self._unwritten:
                return False
            save()
        except (*FAULTS, sqlite3.Error):
            log.exception("a model's state could not be saved; its operations are kept, and it is tried again")
            return False
        return True

    def put_away(self, model_id: str) -> None:
        """Save what can be and make room: the client is gone. The next operation brings the model back."""
        model = self._registry.models[model_id]
        if model_id in self.keeper.held and self.keeper.can_save(model):
            self._save(lambda: self.keeper.save(model))
        self.keeper.drop(model_id)

    # ---- sampling

    def _sample(self, operations: Sequence[Operation]) -> None:
        """All in one call; where one of them is at fault, each on its own."""
        requests: list[tuple[Operation, SampleRequest, Asample]] = []
        for operation in operations:
            try:
                requests.append((operation, *self._sample_request(operation)))
            except FAULTS as error:
                self._fail_sample(operation, error)
        if not requests:
            return
        try:
            responses = self._engine.sample([request for _, request, _ in requests])
        except FAULTS as error:
            if len(requests) == 1:
                self._fail_sample(requests[0][0], error)
            else:
                for operation, _, _ in requests:
                    self._sample([operation])
            return
        for (operation, request, body), response in zip(requests, responses, strict=True):
            encoded = wire.encode_sample(_last_n(response, body.prompt_logprobs_last_n))
            self._finish_sample(operation, Effect("protobuf", encoded))
            tokens = request.prompt.length + sum(len(sequence.tokens) for sequence in response.sequences)
            self._count("sample", tokens)
        self._make_room()

    def _sample_request(self, operation: Operation) -> tuple[SampleRequest, Asample]:
        assert operation.payload is not None
        body = Asample.model_validate_json(self._journal.segments.read(operation.payload))
        self._load_sampler(operation.owner_id)
        request = SampleRequest(
            sampler_id=operation.owner_id,
            prompt=ModelInput([EncodedTextChunk(chunk.tokens) for chunk in body.prompt.chunks]),
            num_samples=body.num_samples,
            sampling_params=body.sampling_params.plain(),
            stream=self._stream(operation, body),
            prompt_logprobs=bool(body.prompt_logprobs),
            topk_prompt_logprobs=body.topk_prompt_logprobs,
            topk_sample_logprobs=body.topk_sample_logprobs,
            target_prompt_logprobs=body.target_prompt_logprobs.plain() if body.target_prompt_logprobs else None,
            prompt_alt_tokens_k=body.prompt_alt_tokens_k,
        )
        return request, body

    def _stream(self, operation: Operation, body: Asample) -> str:
        """With a seed, the same prompt gives the same completions again; without one, each request has draws of its own."""
        if body.sampling_params.seed is not None:
            return digest(json.dumps([chunk.tokens for chunk in body.prompt.chunks]).encode())
        return f"{self._registry.samplers[operation.owner_id].stream}/{operation.seq}"

    def _load_sampler(self, sampler_id: str) -> None:
        if sampler_id in self._samplers:
            self._samplers.move_to_end(sampler_id)
            return
        if sampler_id not in self._registry.samplers:
            raise UserError(f"the snapshot {sampler_id} is gone; expected one whose session has not ended: make it again")
        directory = self._registry.samplers[sampler_id].directory
        self._engine.add_sampler(sampler_id, None if directory is None else self._root / directory)
        self._samplers[sampler_id] = None

    def drop_sampler(self, sampler_id: str) -> None:
        """Take a sampler out of the engine; a chore."""
        if sampler_id in self._samplers:
            del self._samplers[sampler_id]
            self._engine.drop_sampler(sampler_id)

    def _make_room(self) -> None:
        """Take the longest unused samplers out of the engine."""
        while len(self._samplers) > MAX_SAMPLERS:
            self.drop_sampler(next(iter(self._samplers)))

    def _fail_sample(self, operation: Operation, error: BaseException) -> None:
        if isinstance(error, USER_FAULTS):
            self._finish_sample(operation, Effect("user", words(error).encode()))
            return
        log.error("sample %d of %s failed", operation.seq, operation.owner_id, exc_info=error)
        text = f"sampling failed in the server: {type(error).__name__}: {error}"
        self._finish_sample(operation, Effect("server", text.encode()))

    def _finish_sample(self, operation: Operation, effect: Effect) -> None:
        if operation.is_kept():  # else nobody knows of it
            self._finish((operation, effect))

    # ---- results

    def _finish(self, *results: tuple[Operation, Effect], then: Callable[[], object] | None = None) -> None:
        """Commit the results together, and do `then` (give them out). A full disk is waited for."""
        changes: list[Change] = []
        blobs: list[Blob] = []
        for operation, effect in results:
            blob, finished_at = Blob("results", effect.body), time.time()
            operation.result_type, operation.result, operation.finished_at = effect.type, blob, finished_at
            changes += [*effect.changes, finish(operation, effect.type, blob, finished_at)]
            if operation.kind == SAMPLE:
                changes.append(drop_payload([operation.request_id]))
            blobs.append(blob)
            self._unwritten.add(operation.request_id)

        def committed(future: Future[None]) -> None:
            error = future.exception()
            if error is not None:
                log.error("the result of %s cannot be written (%s); trying again", results[0][0].request_id, error)
                timer = threading.Timer(_RETRY_S, self._finish, results, {"then": then})
                timer.daemon = True
                timer.start()
                return
            for operation, effect in results:
                self._written(operation, effect)
            (then or partial(self._give_out, [operation for operation, _ in results]))()

        self._journal.write(*changes, blobs=blobs).add_done_callback(committed)

    def _written(self, operation: Operation, effect: Effect) -> None:
        self._unwritten.discard(operation.request_id)
        if operation.kind == SAMPLE and operation.payload is not None:
            self._journal.segments.release(operation.payload)
            operation.payload = None
        for path in effect.garbage:
            remove(path)

    def answer(self, operation: Operation, message: str) -> None:
        """Fail an operation that will not run."""
        self._finish((operation, Effect("user", message.encode())))

    def _give_out(self, operations: Sequence[Operation]) -> None:
        self._call_soon(lambda: [operation.done.set() for operation in operations])

    def _count(self, kind: str, tokens: int) -> None:
        if tokens:
            self._tokens.append((time.monotonic(), kind, tokens))
        while self._tokens and self._tokens[0][0] < time.monotonic() - 2 * _RATE_WINDOW_S:
            self._tokens.popleft()


def _last_n(response: SampleResponse, last_n: int | None) -> SampleResponse:
    """Only the last `last_n` prompt tokens keep their log-probabilities."""
    if last_n is None:
        return response
    logprobs, topk = response.prompt_logprobs, response.topk_prompt_logprobs
    if logprobs is not None:
        logprobs = [None] * (len(logprobs) - last_n) + list(logprobs[-last_n:])
    if topk is not None:
        topk = [None] * (len(topk) - last_n) + list(topk[-last_n:])
    return replace(response, prompt_logprobs=logprobs, topk_prompt_logprobs=topk)
