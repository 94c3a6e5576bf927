"""What the clients and the server need of the machinery behind them: one frozen base, many models and samplers on it.

A model is an adapter with its gradient sum and its optimizer; a sampler is weights that never change again. Everything is
synchronous and called by one thread at a time; who calls keeps the order. Implemented by `tinker/engine.py` in this process,
and by `tinker/ray_engine.py` on Ray workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agentlightning.tinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    ModelInput,
    SampleResponse,
    SamplingParams,
    TensorData,
)


@dataclass(frozen=True, slots=True)
class BaseModelInfo:
    """The frozen base."""

    name: str  # what the user called it
    arch: str
    tokenizer_path: str  # absolute, or a hub name
    max_context_length: int  # tokens


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes that the engine holds, of all its workers together."""

    device_bytes: int = 0  # allocated by tensors on GPUs
    host_bytes: int = 0  # resident, of processes beside the one that calls


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """`num_samples` completions of one prompt by one sampler.

    `stream` names the request for ever: together with the seed (`sampling_params.seed`, or the engine's) and the index of the
    sample it decides every draw, whoever else is sampled at the same time.

    `target_prompt_logprobs`: int64 [len(prompt) - 1, K]; the ids in row i are looked up at prompt position i + 1, -1 is none.
    """

    sampler_id: str
    prompt: ModelInput
    num_samples: int
    sampling_params: SamplingParams
    stream: str
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0  # draws at each prompt position but the first


class LoraEngine(Protocol):
    """Raises `UserError` (agentlightning.errors) for what a caller did wrong, `NumericsError` for NaN and inf."""

    def base_model(self) -> BaseModelInfo:
        """The frozen base."""
        ...

    def create_model(self, model_id: str, lora: LoraConfig) -> None:
        """A new adapter with a cold optimizer. The same id again is an error."""
        ...

    def unload_model(self, model_id: str) -> None:
        """Forget a model; samplers made from it stay."""
        ...

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """Add the gradient of the summed loss to the model's sum (not with `forward_only`); all data are checked before."""
        ...

    def optim_step(self, model_id: str, adam: AdamParams) -> dict[str, float]:
        """Step with the gradient sum, and start a new one. Metrics: `grad_norm:mean`... NaN: error, no weight changed."""
        ...

    def save_state(self, model_id: str, directory: Path) -> int:
        """Adapter (PEFT's layout in `actor/`), optimizer, gradient sum and shape into a new durable checkpoint directory.

        Returns its bytes. Its record `NAME.pt` lies beside it.
        """
        ...

    def load_state(self, model_id: str, directory: Path, optimizer: bool) -> None:
        """Verify, then take over weights, and with `optimizer` its state and the gradient sum that was saved (else both are
        cold). The model's present gradient sum is dropped.
        """
        ...

    def save_sampler(self, model_id: str, directory: Path) -> int:
        """The adapter alone, durable; `PeftModel.from_pretrained` loads `directory/actor`. Returns its bytes."""
        ...

    def add_sampler(self, sampler_id: str, source: str | Path | None) -> None:
        """Weights to sample from: of a model as it is now (its id), of a saved directory (a Path), or the base alone (None)."""
        ...

    def drop_sampler(self, sampler_id: str) -> None:
        """Forget a sampler."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleResponse]:
        """All requests in one batch, whichever samplers they are of."""
        ...

    def memory(self) -> EngineMemory:
        """What it holds now."""
        ...

    def close(self) -> None:
        """End it."""
        ...
