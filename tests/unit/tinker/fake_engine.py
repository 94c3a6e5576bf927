"""A `LoraEngine` of numpy alone: toy weights that move as real ones do, so that a replay can be checked bit for bit.

A model is a vector per token; the log-probability of a target is a plain function of it. Nothing here is meant to learn.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from agentlightning.errors import NumericsError, UserError
from agentlightning.tinker.engine_api import BaseModelInfo, EngineMemory, SampleRequest
from agentlightning.tinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
)

VOCABULARY = 64


@dataclass
class _Model:
    lora: LoraConfig
    weights_V: np.ndarray
    moment_V: np.ndarray = field(default_factory=lambda: np.zeros(VOCABULARY))
    gradient_V: np.ndarray = field(default_factory=lambda: np.zeros(VOCABULARY))
    steps: int = 0


class FakeEngine:
    """See `engine_api.LoraEngine`. `calls` is what was asked of it; `slow_s` is how long each call takes."""

    def __init__(self, slow_s: float = 0.0) -> None:
        self.models: dict[str, _Model] = {}
        self.samplers: dict[str, np.ndarray] = {}
        self.calls: list[tuple[str, str]] = []
        self.batches: list[int] = []
        self.slow_s = slow_s
        self.fail_next: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def _call(self, name: str, of: str) -> None:
        self.gate.wait()
        if self.slow_s:
            time.sleep(self.slow_s)
        self.calls.append((name, of))
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error

    def base_model(self) -> BaseModelInfo:
        return BaseModelInfo("tiny", "toy", "/tokenizer", 512)

    def memory(self) -> EngineMemory:
        return EngineMemory(device_bytes=3_000_000, host_bytes=0)

    def create_model(self, model_id: str, lora: LoraConfig) -> None:
        self._call("create_model", model_id)
        if model_id in self.models:
            raise UserError(f"{model_id} is there")
        weights_V = np.random.default_rng(lora.seed or 0).normal(size=VOCABULARY) / lora.rank
        self.models[model_id] = _Model(lora, weights_V)

    def unload_model(self, model_id: str) -> None:
        self._call("unload_model", model_id)
        del self.models[model_id]

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        self._call("forward_backward", model_id)
        model = self.models[model_id]
        for datum in data:
            if datum.loss_fn_inputs["target_tokens"].array.shape != (datum.model_input.length,):
                raise UserError("target_tokens do not fit model_input")
        outputs, loss = [], 0.0
        for datum in data:
            targets = datum.loss_fn_inputs["target_tokens"].array
            logp_T = -np.abs(model.weights_V[targets % VOCABULARY]).astype(np.float32)
            weights = datum.loss_fn_inputs["weights"].array if "weights" in datum.loss_fn_inputs else np.ones(len(targets))
            loss -= float((logp_T * weights).sum())
            if not forward_only:
                np.add.at(model.gradient_V, targets % VOCABULARY, weights * np.sign(model.weights_V[targets % VOCABULARY]))
            outputs.append({"logprobs": TensorData(logp_T, "float32")})
        return ForwardBackwardOutput("toy", outputs, {"loss:sum": loss})

    def optim_step(self, model_id: str, adam: AdamParams) -> dict[str, float]:
        self._call("optim_step", model_id)
        model = self.models[model_id]
        if not np.isfinite(model.gradient_V).all():
            raise NumericsError("the gradient is not finite; no weight was changed")
        model.moment_V = adam.beta1 * model.moment_V + (1 - adam.beta1) * model.gradient_V
        model.weights_V = model.weights_V - adam.learning_rate * model.moment_V
        norm = float(np.linalg.norm(model.gradient_V))
        model.gradient_V, model.steps = np.zeros(VOCABULARY), model.steps + 1
        return {"grad_norm:mean": norm}

    def save_state(self, model_id: str, directory: Path) -> int:
        self._call("save_state", model_id)
        model = self.models[model_id]
        directory.mkdir()
        np.savez(directory / "state.npz", weights=model.weights_V, moment=model.moment_V, steps=model.steps)
        (directory / "lora.json").write_text(json.dumps(asdict(model.lora)))
        return sum(path.stat().st_size for path in directory.iterdir())

    def load_state(self, model_id: str, directory: Path, optimizer: bool) -> None:
        self._call("load_state", model_id)
        model = self.models[model_id]
        with np.load(directory / "state.npz") as saved:
            model.weights_V = saved["weights"]
            model.moment_V = saved["moment"] if optimizer else np.zeros(VOCABULARY)
            model.steps = int(saved["steps"]) if optimizer else 0
        model.gradient_V = np.zeros(VOCABULARY)

    def save_sampler(self, model_id: str, directory: Path) -> int:
        self._call("save_sampler", model_id)
        directory.mkdir()
        np.save(directory / "weights.npy", self.models[model_id].weights_V)
        return (directory / "weights.npy").stat().st_size

    def add_sampler(self, sampler_id: str, source: str | Path | None) -> None:
        self._call("add_sampler", sampler_id)
        if sampler_id in self.samplers:
            raise UserError(f"{sampler_id} is there")
        if source is None:
            self.samplers[sampler_id] = np.zeros(VOCABULARY)
        elif isinstance(source, Path):
            self.samplers[sampler_id] = np.load(source / "weights.npy")
        else:
            self.samplers[sampler_id] = self.models[source].weights_V.copy()

    def drop_sampler(self, sampler_id: str) -> None:
        del self.samplers[sampler_id]

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleResponse]:
        self._call("sample", ",".join(request.stream for request in requests))
        self.batches.append(len(requests))
        for request in requests:
            if max(request.prompt.to_ints()) >= VOCABULARY:
                raise UserError("a token is not in the vocabulary")
        return [self._one(request) for request in requests]

    def _one(self, request: SampleRequest) -> SampleResponse:
        weights_V, sequences = self.samplers[request.sampler_id], []
        for i in range(request.num_samples):
            seen = repr((request.stream, request.sampling_params.seed, i, request.prompt.to_ints())).encode()
            seed = int.from_bytes(hashlib.sha256(weights_V.tobytes() + seen).digest()[:8], "little")
            tokens = np.random.default_rng(seed).integers(0, VOCABULARY, request.sampling_params.max_tokens or 4).tolist()
            sequences.append(SampledSequence("length", tokens, [-abs(float(weights_V[token])) - 0.5 for token in tokens]))
        prompt = request.prompt.to_ints()
        logprobs = [None, *(-abs(float(weights_V[token])) for token in prompt[1:])] if request.prompt_logprobs else None
        topk = None
        if request.topk_prompt_logprobs:
            topk = [None, *([(token, -1.0)] for token in prompt[1:])]
        if request.topk_sample_logprobs:
            sequences = [replace(one, topk_logprobs=[[(token, -1.0)] for token in one.tokens]) for one in sequences]
        named, k = request.target_prompt_logprobs, request.prompt_alt_tokens_k
        looked_up, drawn = None, None
        if named is not None:
            at = (named.shape, named.sparse_crow_indices, named.sparse_col_indices)
            looked_up = TensorData(-named.array, "float32", *at)
        if k:
            tokens = np.zeros((len(prompt) - 1, k))
            drawn = PromptAltTokens(TensorData(tokens, "int64"), TensorData(tokens, "float32"))
        return SampleResponse(sequences, logprobs, topk, looked_up, drawn)

    def close(self) -> None:
        self.closed = True
