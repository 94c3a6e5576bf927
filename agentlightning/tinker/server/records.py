"""What the service remembers: plain records, each a JSON document in the database, and the operations with their payloads."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

Category = Literal["user", "server"]
ResultType = Literal["json", "protobuf", "user", "server"]  # the latter two: an error's text, and whose fault it was
SAMPLE = "sample"  # the kind of operation that has no order
REFUSED = "refused"  # the kind that only takes up its number; its payload is the error


def now() -> str:
    """ISO, UTC."""
    return datetime.now(UTC).isoformat()


@dataclass(slots=True)
class Session:
    """What a client opened. It and all below it belong to one key."""

    table: ClassVar[str] = "sessions"
    id: str
    owner: str
    created_at: str
    user_metadata: dict[str, Any]
    tags: list[str]
    project_id: str | None = None
    display_name: str | None = None
    finished: dict[str, Any] | None = None  # {"reason": {"type": ..}, "detail": ..}
    seen_at: str = ""  # the last sign of life


@dataclass(slots=True)
class Model:
    """A training run: an adapter with its optimizer. `id` is `<session>:train:<number>`."""

    table: ClassVar[str] = "models"
    id: str
    session_id: str
    owner: str
    created_at: str
    base_model: str
    lora: dict[str, Any]  # LoraConfig's fields
    user_metadata: dict[str, Any] | None = None
    saved_seq: int = -1  # the last operation that `saved_state` covers
    saved_state: str | None = None  # relative to the root
    last_request_at: str = ""
    created: bool = False  # operation 0 succeeded


@dataclass(slots=True)
class Sampler:
    """Weights that a client samples from, `<session>:sample:<number>`: a saved directory, or the base alone."""

    table: ClassVar[str] = "samplers"
    id: str
    session_id: str
    owner: str
    base_model: str
    stream: str  # names its draws: the same in every run of the same program, whatever the session is called
    model_path: str | None = None
    directory: str | None = None  # relative to the root
    model_id: str | None = None  # an unnamed snapshot's
    used_at: str = ""  # the last request, or the start of this process


@dataclass(slots=True)
class Checkpoint:
    """A named checkpoint; `id` is its `tinker://` path."""

    table: ClassVar[str] = "checkpoints"
    id: str
    model_id: str
    owner: str
    kind: str
    name: str
    directory: str  # relative to the root
    created_at: str
    size_bytes: int
    base_model: str
    lora: dict[str, Any]
    public: bool = False
    expires_at: str | None = None
    user_metadata: dict[str, str] | None = None


Record = Session | Model | Sampler | Checkpoint


def document(record: Record) -> dict[str, Any]:
    """As JSON holds it."""
    return asdict(record)


@dataclass(slots=True)
class Blob:
    """Bytes in a payload file. `data` is there until they are on the disk, the place from then on."""

    chain: Literal["requests", "results"]
    data: bytes | None
    segment: int = -1
    offset: int = 0
    size: int = 0
    digest: str = ""


@dataclass(slots=True)
class Operation:
    """One acknowledged request. `owner_id` is its model or, for a sample, its sampler; `seq` its number there."""

    request_id: str
    owner_id: str
    owner: str  # the key's
    seq: int
    kind: str
    payload: Blob | None  # None once neither running nor replaying it needs the bytes
    payload_digest: str
    result_type: ResultType | None = None
    result: Blob | None = None
    finished_at: float = 0.0  # seconds since the epoch
    fetched_at: float = 0.0  # 0: not yet, as far as is known
    kept: Future[None] | None = None  # says when it is durable; None: it was read from the disk
    durable: asyncio.Event = field(default_factory=asyncio.Event)  # acknowledged
    done: asyncio.Event = field(default_factory=asyncio.Event)  # its result may be given out

    def is_kept(self) -> bool:
        """Whether it is durable; waits until that is known."""
        return self.kept is None or self.kept.exception() is None

    @property
    def succeeded(self) -> bool:
        """Whether it has a result that is no error."""
        return self.result_type in ("json", "protobuf")
