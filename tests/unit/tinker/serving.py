"""A service on the fake engine for tests: in this process over ASGI, stopped as a kill stops it, and opened again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fake_engine import FakeEngine

from agentlightning.tinker.server.app import make_app
from agentlightning.tinker.server.journal import Journal
from agentlightning.tinker.server.keeper import SavePolicy
from agentlightning.tinker.server.keys import Keys
from agentlightning.tinker.server.service import Service
from agentlightning.tinker.server.sweeper import Sweeper, remove_leftovers
from agentlightning.tinker.server.wire import MESSAGES

KEY, OTHER = "tml-first-key", "tml-other-key"
NEVER = SavePolicy(operations=10_000, seconds=1e9)


class Client:
    """What the SDK sends, in short."""

    def __init__(self, http: httpx.AsyncClient, service: Service, engine: FakeEngine, sweeper: Sweeper) -> None:
        self.http, self.service, self.engine, self.sweeper = http, service, engine, sweeper
        self.session, self.model, self.seq = "", "", 0

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self.http.request(method, f"/api/v1/{path}", **options)

    async def post(self, path: str, body: dict[str, Any] | bytes, status: int = 200) -> dict[str, Any]:
        options: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        reply = await self.call("POST", path, **options)
        assert reply.status_code == status, reply.text
        return reply.json() if reply.content else {}

    async def result(self, future: dict[str, Any]) -> Any:
        """JSON as a dict, protobuf as bytes."""
        while True:
            reply = await self.call("POST", "retrieve_future", json={"request_id": future["request_id"]})
            assert reply.status_code == 200, reply.text
            if reply.headers["content-type"] == "application/x-protobuf":
                return reply.content
            if reply.json().get("type") != "try_again":
                return reply.json()

    async def open(self, rank: int = 4, **model: Any) -> None:
        """A session with one model."""
        self.session = (await self.post("create_session", {"tags": [], "user_metadata": {"a": 1}}))["session_id"]
        body = {"session_id": self.session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": rank}, **model}
        self.model = (await self.result(await self.post("create_model", body)))["model_id"]
        self.seq = 0

    def numbered(self, **body: Any) -> dict[str, Any]:
        self.seq += 1
        return {"model_id": self.model, "seq_id": self.seq, **body}

    async def forward_backward(self, targets: list[int], **options: Any) -> dict[str, Any]:
        self.seq += 1
        return await self.post("forward_backward", forward_backward(self.model, self.seq, targets, **options))

    async def optim_step(self, rate: float = 0.1) -> dict[str, Any]:
        return await self.post("optim_step", self.numbered(adam_params={"learning_rate": rate}))

    async def step(self, targets: list[int]) -> tuple[Any, Any]:
        """Both results of a training step."""
        first, second = await self.forward_backward(targets), await self.optim_step()
        return await self.result(first), await self.result(second)

    async def save(self, name: str | None, **options: Any) -> Any:
        return await self.result(await self.post("save_weights", self.numbered(path=name, **options)))

    async def snapshot(self, number: int) -> Any:
        body = self.numbered(sampling_session_seq_id=number)
        return await self.result(await self.post("save_weights_for_sampler", body))

    async def ask(
        self, sampler: str, seq: int, prompt: list[int] | None = None, status: int = 200, **options: Any
    ) -> dict[str, Any]:
        chunks = [{"type": "encoded_text", "tokens": prompt or [1, 2, 3]}]
        body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": {"chunks": chunks}, "num_samples": 2}
        return await self.post("asample", {**body, "sampling_params": {"max_tokens": 4}, **options}, status)


def forward_backward(model_id: str, seq: int, targets: list[int], **options: Any) -> bytes:
    """A request of one datum."""
    message = MESSAGES["ForwardBackwardRequest"](model_id=model_id, seq_id=seq, loss_fn="cross_entropy", **options)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(len(targets), dtype=np.int32).tobytes()
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.dense, tensor.dtype = np.asarray(targets, np.int64).tobytes(), 2
    tensor.shape.append(len(targets))
    return message.SerializeToString()


def output(raw: bytes) -> Any:
    return MESSAGES["ForwardBackwardOutput"].FromString(raw)


@asynccontextmanager
async def serving(
    root: Path, engine: FakeEngine | None = None, kill: bool = False, policy: SavePolicy | None = None, key: str = KEY
):
    """`kill`: leave without saving anything, as if the process had ended in the middle."""
    journal = Journal(root)
    keys = Keys(journal, [KEY, OTHER])
    engine = engine or FakeEngine()
    service = Service(engine, journal, keys, root, policy or NEVER)
    remove_leftovers(root, service.registry)
    sweeper = Sweeper(service)
    service.start()
    transport = httpx.ASGITransport(make_app(service, sweeper, 1 << 20), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-API-Key": key}) as http:
        try:
            yield Client(http, service, engine, sweeper)
        finally:
            service.closing.set()
            if kill:
                service.runner.keeper.save_idle = lambda: None
            await asyncio.to_thread(service.close)
