"""The start of a loop of one's own: a base's name enters, clients that train and sample it leave.

Without an address the engine runs here, on Ray workers or in this process, and starts with the first client that is created.
With one (`base_url=`, or TINKER_BASE_URL) the clients talk to a server, `agl serve` or another one that speaks its language.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from agentlightning.errors import ConfigError, UserError
from agentlightning.tinker.dispatch import EngineThread
from agentlightning.tinker.engine_api import LoraEngine
from agentlightning.tinker.engine_saved import read_saved_model
from agentlightning.tinker.futures import Future
from agentlightning.tinker.places import Places
from agentlightning.tinker.sampling_client import SamplingClient
from agentlightning.tinker.training_client import About, TrainingClient
from agentlightning.tinker.types import LoraConfig

Backend = Literal["ray", "inprocess"]
Status = Literal["success", "errored", "interrupted"]
Metadata = Mapping[str, str]
_IMPATIENT_S = 5.0  # what an error on its way out waits for the call that runs


@dataclass(frozen=True, slots=True)
class SupportedModel:
    """A base that clients can be created for."""

    model_name: str
    max_context_length: int | None = None  # tokens; None: not opened yet


@dataclass(frozen=True, slots=True)
class GetServerCapabilitiesResponse:
    """What can be trained and sampled."""

    supported_models: list[SupportedModel]


class ServiceClient:
    """Makes clients. Example: `ServiceClient(backend="inprocess").create_lora_training_client("tiny", rank=8)`.

    A context manager: at its end everything that was asked for is done and the engine closed; where an error leaves it, what
    has not begun is given up.
    """

    def __new__(cls, *args: Any, base_url: str | None = None, backend: Backend | None = None, **options: Any) -> ServiceClient:
        """With an address it is a client of a server."""
        if cls is ServiceClient and (base_url or (backend is None and os.environ.get("TINKER_BASE_URL"))):
            from agentlightning.tinker.http_client import HttpServiceClient

            return object.__new__(HttpServiceClient)
        return object.__new__(cls)

    def __init__(
        self,
        user_metadata: Metadata | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        backend: Backend | None = None,
        root: str | os.PathLike[str] | None = None,
        workers: int = 1,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int | None = None,
        seed: int = 0,
        max_batch_tokens: int = 16_384,
        gradient_checkpointing: bool = False,
    ) -> None:
        """`backend`: "ray" (the default), on so many `workers`, or "inprocess". Saves lie below `root` (None:
        `checkpoints/tinker`). The other options are those of `open_engine`; `seed` decides new adapters and all samples whose
        `SamplingParams` have no seed of their own.
        """
        if backend not in (None, "ray", "inprocess"):
            raise ConfigError(f"backend={backend!r}; expected 'ray' or 'inprocess'")
        if api_key is not None:
            raise ConfigError("api_key is for a server, but there is no address; expected base_url='http://...' beside it")
        self._places = Places(root)
        self._engine_options = {
            "backend": backend or "ray",
            "workers": workers,
            "device": device,
            "dtype": dtype,
            "num_threads": num_threads,
            "seed": seed,
            "max_batch_tokens": max_batch_tokens,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self._session = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        self._seed: int | None = seed
        self._engines: dict[str, EngineThread] = {}  # by the base's name
        self._lock = threading.Lock()
        self._models, self._samplers = count(), count()
        self._closed = False

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Metadata | None = None,
    ) -> TrainingClient:
        """A new adapter on `base_model`: "tiny" (in the package), a directory, or a name on the hub.

        Waits until it is there. `seed` draws its weights (None: the service client's). `user_metadata` is written beside what
        the client saves, into `run.json`.
        """
        lora = LoraConfig(rank, self._seed if seed is None else seed, train_unembed, train_mlp, train_attn)
        return self._create(base_model, lora, user_metadata).result()

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Metadata | None = None,
    ) -> TrainingClient:
        """The same without blocking the event loop."""
        lora = LoraConfig(rank, self._seed if seed is None else seed, train_unembed, train_mlp, train_attn)
        return await self._create(base_model, lora, user_metadata)

    def create_training_client_from_state(
        self, path: str, base_model: str | None = None, user_metadata: Metadata | None = None
    ) -> TrainingClient:
        """Another adapter that starts from saved weights, with a cold optimizer. Base and shape are the saved ones."""
        return self._create_from(path, base_model, user_metadata, optimizer=False).result()

    async def create_training_client_from_state_async(
        self, path: str, base_model: str | None = None, user_metadata: Metadata | None = None
    ) -> TrainingClient:
        """The same without blocking the event loop."""
        return await self._create_from(path, base_model, user_metadata, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self, path: str, base_model: str | None = None, user_metadata: Metadata | None = None
    ) -> TrainingClient:
        """Another adapter that goes on from a saved state."""
        return self._create_from(path, base_model, user_metadata, optimizer=True).result()

    async def create_training_client_from_state_with_optimizer_async(
        self, path: str, base_model: str | None = None, user_metadata: Metadata | None = None
    ) -> TrainingClient:
        """The same without blocking the event loop."""
        return await self._create_from(path, base_model, user_metadata, optimizer=True)

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> SamplingClient:
        """Samples from saved weights, or from a base as it is. Waits until it is there."""
        return self._create_sampler(model_path, base_model).result()

    async def create_sampling_client_async(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """The same without blocking the event loop."""
        return await self._create_sampler(model_path, base_model)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The bases that are open, and the one in the package; any directory with a base is another."""
        opened = [engine.submit(_supported).result() for engine in self._engines.values()]
        return GetServerCapabilitiesResponse(opened if "tiny" in self._engines else [SupportedModel("tiny"), *opened])

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """The same without blocking the event loop."""
        return await asyncio.to_thread(self.get_server_capabilities)

    def close(self, status: Status = "success", detail: str | None = None) -> Future[None]:
        """End the engine. "success": when all that was asked for is done; otherwise what has not begun is given up."""
        with self._lock:
            self._closed = True
            engines = list(self._engines.values())
        ends = [engine.close(finish=status == "success") for engine in engines]
        return _all_of(ends)

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close().result()
            return
        try:
            self.close("errored").result(_IMPATIENT_S)
        except TimeoutError:
            return  # a long call runs; the process need not wait for it

    async def __aenter__(self) -> ServiceClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _create(
        self,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Metadata | None,
        state: tuple[Path, bool] | None = None,
    ) -> Future[TrainingClient]:
        """A client of a new model; with `state`, (directory, with its optimizer), one that goes on from there."""
        if type(lora.rank) is not int or lora.rank < 1:
            raise UserError(f"rank={lora.rank!r}; expected a whole number from 1")
        thread = self._engine(base_model)
        model_id = f"{self._session}:train:{next(self._models)}"

        def create(engine: LoraEngine) -> TrainingClient:
            about = About(model_id, engine.base_model(), lora, dict(user_metadata or {}))
            engine.create_model(model_id, lora)
            client = TrainingClient(thread, about, self._places, self._new_sampler_id)
            if state is not None:
                client.take_over(engine, *state)
            return client

        return thread.submit(create)

    def _create_from(
        self, path: str, base_model: str | None, user_metadata: Metadata | None, *, optimizer: bool
    ) -> Future[TrainingClient]:
        directory = self._places.find(path, sampler=False)
        saved = read_saved_model(directory)
        return self._create(base_model or saved.base_model, saved.lora, user_metadata, (directory, optimizer))

    def _create_sampler(self, model_path: str | None, base_model: str | None) -> Future[SamplingClient]:
        if (model_path is None) == (base_model is None):
            given = "neither" if model_path is None else "both"
            raise UserError(f"create_sampling_client was given {given}; expected model_path= or base_model=, one of them")
        directory = None if model_path is None else self._places.find(model_path, sampler=True)
        saved = None if directory is None else read_saved_model(directory)
        name = base_model if saved is None else saved.base_model
        assert name is not None
        thread = self._engine(name)
        sampler_id = self._new_sampler_id()

        def create(engine: LoraEngine) -> SamplingClient:
            engine.add_sampler(sampler_id, directory)
            stream = "base" if saved is None else f"step {saved.optimizer_steps}"
            return SamplingClient(thread, sampler_id, engine.base_model(), stream)

        return thread.submit(create)

    def _new_sampler_id(self) -> str:
        return f"{self._session}:sample:{next(self._samplers)}"

    def _engine(self, base_model: str) -> EngineThread:
        with self._lock:
            if self._closed:
                raise UserError("this ServiceClient is closed; make another one: ServiceClient(...)")
            if base_model not in self._engines:
                self._engines[base_model] = EngineThread(partial(_open, base_model, self._engine_options))
            return self._engines[base_model]


def _open(base_model: str, options: Mapping[str, Any]) -> LoraEngine:
    from agentlightning.tinker.engine import open_engine  # torch and the model's code come with it

    return open_engine(base_model, **options)


def _supported(engine: LoraEngine) -> SupportedModel:
    base = engine.base_model()
    return SupportedModel(base.name, base.max_context_length)


def _all_of(ends: list[Future[None]]) -> Future[None]:
    """Done when all are."""
    from concurrent.futures import Future as ConcurrentFuture

    done: ConcurrentFuture[None] = ConcurrentFuture()
    waiting = [end.future() for end in ends]

    def count_down(_: object) -> None:
        if all(end.done() for end in waiting) and not done.done():
            done.set_result(None)

    for end in waiting:
        end.add_done_callback(count_down)
    count_down(None)
    return Future(done)
