"""The JSON bodies of the wire, checked by pydantic. Fields that a newer SDK adds are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from agentlightning.errors import UserError
from agentlightning.tinker.types import AdamParams, LoraConfig, SamplingParams, TensorData

_HOUR, _TEN_YEARS = 3600, 10 * 366 * 24 * 3600
_MAX_WIDTH = 100  # log-probabilities at a position
_MAX_CELLS = 1 << 24  # of all samples of a request
Size = Annotated[int, Field(ge=0, lt=1 << 63)]
Ttl = int | None


def explain(faults: Sequence[Any]) -> str:
    """pydantic's errors in a line: the fields at fault, without what was sent, which may be large."""
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in faults[:5])


class Body(BaseModel):
    """A request."""

    model_config = {"protected_namespaces": ()}


class Lora(Body):
    """`LoraConfig`."""

    rank: int = Field(32, ge=1, le=4096)
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def plain(self) -> LoraConfig:
        """As the engine takes it."""
        return LoraConfig(**self.model_dump())


class Optimizer(Body):
    """Which optimizer a model has: AdamW."""

    type: Literal["adamw"] = "adamw"


class CreateSession(Body):
    """`create_session`."""

    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    project_id: str | None = None
    display_name: str | None = None


class SessionId(Body):
    """`session_heartbeat`."""

    session_id: str


class Finish(Body):
    """`sessions/{id}/finish`."""

    reason: dict[str, Any]
    detail: str | None = None


class Project(Body):
    """`sessions/{id}/project`."""

    project_id: str


class Search(Body):
    """`sessions/search`."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    statuses: list[dict[str, Any]] | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: dict[str, Any] | None = None


class CreateModel(Body):
    """`create_model`."""

    session_id: str
    model_seq_id: int = Field(ge=0)
    base_model: str
    lora_config: Lora = Field(default_factory=lambda: Lora.model_validate({}))
    optimizer_config: Optimizer = Optimizer()
    user_metadata: dict[str, Any] | None = None


class ModelId(Body):
    """`get_info`, `unload_model`."""

    model_id: str


class Numbered(Body):
    """What every operation of a model has. At the door nothing else is looked at: a number that was refused would be a gap, and
    all behind it would wait for it, so what is wrong with the rest is the operation's own error.
    """

    model_id: str
    seq_id: int = Field(ge=1)


class Adam(Body):
    """`AdamParams`; finite numbers."""

    learning_rate: float = Field(1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    grad_clip_norm: float = Field(0.0, allow_inf_nan=False)

    def plain(self) -> AdamParams:
        """As the engine takes it."""
        return AdamParams(**self.model_dump())


class OptimStep(Numbered):
    """`optim_step`. Another optimizer's parameters come under another name, so that `adam_params` is missing: refused."""

    adam_params: Adam


class SaveWeights(Numbered):
    """`save_weights`."""

    path: str | None = None
    ttl_seconds: Ttl = Field(None, ge=_HOUR, le=_TEN_YEARS)
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveSampler(Numbered):
    """`save_weights_for_sampler`: named by `path`, or unnamed with a number of its sampling session."""

    path: str | None = None
    sampling_session_seq_id: int | None = Field(None, ge=0)
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl = Field(None, ge=_HOUR, le=_TEN_YEARS)
    user_metadata: dict[str, str] | None = None


class SaveExternal(Numbered):
    """`save_weights_external`."""

    path: str
    ttl_seconds: Ttl = Field(None, ge=_HOUR, le=_TEN_YEARS)
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Body):
    """`load_weights` onto a model (model_id, seq_id), or as a new one (session_id, model_seq_id)."""

    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = Field(None, ge=1)
    session_id: str | None = None
    model_seq_id: int | None = Field(None, ge=0)
    base_model: str | None = None
    optimizer_config: Optimizer | None = None
    user_metadata: dict[str, Any] | None = None


class OntoModel(Body):
    """`load_weights` as far as it must be read to number it."""

    model_id: str | None = None
    seq_id: int | None = Field(None, ge=1)
    session_id: str | None = None


class CreateSampler(Body):
    """`create_sampling_session`."""

    session_id: str
    sampling_session_seq_id: int = Field(ge=0)
    base_model: str | None = None
    model_path: str | None = None


class Chunk(Body):
    """One of a prompt."""

    type: str = "encoded_text"
    tokens: list[int] = []


class Prompt(Body):
    """A ModelInput."""

    chunks: list[Chunk]


class Sampling(Body):
    """`SamplingParams`."""

    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = -1
    top_p: float = Field(1.0, gt=0, le=1)

    def plain(self) -> SamplingParams:
        """As the engine takes it."""
        return SamplingParams(**self.model_dump())


class Targets(Body):
    """A TensorData of token ids, dense or sparse; -1 names none."""

    data: list[Annotated[int, Field(ge=-1, lt=1 << 31)]]
    dtype: Literal["int64"]
    shape: tuple[Size, Size]
    sparse_crow_indices: list[Size] | None = None
    sparse_col_indices: list[Size] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Targets:
        self.plain()
        return self

    def plain(self) -> TensorData:
        """As the engine takes it. ValueError if the parts do not fit."""
        return TensorData(**self.model_dump())


class Asample(Body):
    """`asample`."""

    sampling_session_id: str
    seq_id: int = Field(ge=0, lt=1 << 63)
    prompt: Prompt
    sampling_params: Sampling
    num_samples: int = Field(1, ge=1, le=4096)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(0, ge=0, le=_MAX_WIDTH)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)
    topk_sample_logprobs: int = Field(0, ge=0, le=_MAX_WIDTH)
    target_prompt_logprobs: Targets | None = None
    prompt_alt_tokens_k: int = Field(0, ge=0, le=_MAX_WIDTH)

    def check_size(self, prompt_tokens: int, context: int) -> None:
        """UserError for an answer that would be too large for a server that others use as well."""
        targets = self.target_prompt_logprobs
        named = 0 if targets is None else sum(token >= 0 for token in targets.data)
        if named > _MAX_WIDTH * prompt_tokens:
            raise UserError(
                f"target_prompt_logprobs names {named} ids; expected at most {_MAX_WIDTH} for each of the {prompt_tokens} "
                f"prompt tokens, {_MAX_WIDTH * prompt_tokens} in all"
            )
        tokens = self.num_samples * min(self.sampling_params.max_tokens or context, context)
        if tokens * self.topk_sample_logprobs > _MAX_CELLS:
            raise UserError(
                f"topk_sample_logprobs is {self.topk_sample_logprobs}, of {self.num_samples} samples together up to {tokens} "
                f"tokens; expected at most {_MAX_CELLS} log-probabilities in an answer: lower num_samples or max_tokens"
            )


class RequestId(Body):
    """`retrieve_future`, `cancel_future`."""

    request_id: str


class SetTtl(Body):
    """`.../ttl`; null keeps the checkpoint for good."""

    ttl_seconds: int | None = Field(None, ge=1, le=_TEN_YEARS)


class WeightsInfo(Body):
    """`weights_info`."""

    tinker_path: str
