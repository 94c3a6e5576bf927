"""The engine behind custom loops and the service, in this process: one frozen base, many LoRA models and samplers on it.

Enters: what `engine_api.LoraEngine` says. Models that were used last keep their weights, gradient and optimizer on the device,
the others on the host; samplers stay on the host and are stacked on the device while they sample.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

import agentlightning
from agentlightning.checkpoint import store
from agentlightning.checkpoint.fingerprint import model_identity
from agentlightning.checkpoint.manifest import MANIFEST
from agentlightning.errors import UserError
from agentlightning.models.base import load_base
from agentlightning.models.chat import check_vocabulary, load_tokenizer
from agentlightning.models.multi_lora import Adapter, MultiLora
from agentlightning.tinker.engine_api import BaseModelInfo, EngineMemory, LoraEngine, SampleRequest
from agentlightning.tinker.engine_data import CheckedData, Limits, check_data
from agentlightning.tinker.engine_model import LoraModel
from agentlightning.tinker.engine_passes import DatumResult, run_data
from agentlightning.tinker.engine_sampling import Sampler, SamplingLimits
from agentlightning.tinker.engine_saved import (
    CONFIG_FILE,
    GRADIENT_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    SavedModel,
    optimizer_in,
    saved_model_of,
)
from agentlightning.tinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    SampleResponse,
    TensorData,
)
from agentlightning.types import DType

_TINY = "tiny"  # the name of the embedded base
_MAX_RANK = 1024


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is told at birth, in this process or as a worker."""

    base_model: str  # "tiny", a directory, or a name on the Hugging Face hub
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: DType = "auto"
    num_threads: int | None = None  # None: torch's
    seed: int = 0  # of samples whose parameters name none
    max_resident_models: int = 32  # models, and samplers at a time, on the device
    max_batch_tokens: int = 16_384  # padded tokens run together
    max_num_seqs: int = 256  # completions under way
    gradient_checkpointing: bool = False

    @property
    def path(self) -> str:
        """Where the base is."""
        if self.base_model == _TINY:
            return str(Path(agentlightning.__file__).resolve().parent / "calculator" / "base")
        directory = Path(self.base_model).expanduser()
        return str(directory.resolve()) if directory.is_dir() else self.base_model


def open_engine(
    base_model: str,
    *,
    backend: Literal["inprocess", "ray"] = "inprocess",
    workers: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: DType = "auto",
    num_threads: int | None = None,
    seed: int = 0,
    max_resident_models: int = 32,
    max_batch_tokens: int = 16_384,
    max_num_seqs: int = 256,
    gradient_checkpointing: bool = False,
) -> LoraEngine:
    """Load `base_model` ("tiny", a directory, or a name on the Hugging Face hub) and be ready for models and samplers.

    `backend="ray"`: on `workers` processes, one for each GPU or on CPU cores. Raises `UserError` for what cannot be.
    """
    for name, value in (
        ("workers", workers),
        ("max_resident_models", max_resident_models),
        ("max_batch_tokens", max_batch_tokens),
        ("max_num_seqs", max_num_seqs),
        ("num_threads", num_threads if num_threads is not None else 1),
    ):
        if value < 1:
            raise UserError(f"{name}: given {value}, expected at least 1")
    for name, given, known in (
        ("backend", backend, ("inprocess", "ray")),
        ("device", device, ("auto", "cpu", "cuda")),
        ("dtype", dtype, ("auto", "float32", "bfloat16")),
    ):
        if given not in known:
            raise UserError(f"{name}: given {given!r}, expected one of {', '.join(known)}")
    if backend == "inprocess" and workers != 1:
        raise UserError(f"workers: given {workers} with backend=inprocess, expected 1; or backend=ray")

    settings = EngineSettings(
        base_model=base_model,
        device=device,
        dtype=dtype,
        num_threads=num_threads,
        seed=seed,
        max_resident_models=max_resident_models,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        gradient_checkpointing=gradient_checkpointing,
    )
    if backend == "inprocess":
        return InProcessLoraEngine(settings)
    from agentlightning.tinker.ray_engine import RayLoraEngine

    return RayLoraEngine(workers, settings)


class InProcessLoraEngine:
    """See `engine_api.LoraEngine`."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self.settings = settings
        self.device = _device(settings.device)
        try:
            self.model = load_base(settings.path, settings.dtype, self.device, settings.gradient_checkpointing)
            config = self.model.config.get_text_config()
            tokenizer = load_tokenizer(settings.path)
            check_vocabulary(tokenizer, config.vocab_size)
        except UserError as error:  # it speaks of the trainer's keys
            raise UserError(
                f"base_model: given {settings.base_model!r}, expected {_TINY!r}, a directory, or a name on the Hugging Face "
                f"hub: {error}"
            ) from error
        self.limits = Limits(int(config.vocab_size), int(config.max_position_embeddings))
        self.digest = _base_digest(self.model)
        self.lora = MultiLora(self.model)
        sizes = SamplingLimits(settings.max_num_seqs, settings.max_batch_tokens, settings.max_resident_models)
        self.sampler = Sampler(self.lora, tokenizer, self.limits, sizes, settings.seed)
        self.models: dict[str, LoraModel] = {}  # in the order of their last use
        self.samplers: dict[str, Adapter | None] = {}  # on the host

    def base_model(self) -> BaseModelInfo:
        """See the protocol."""
        return BaseModelInfo(
            self.settings.base_model, str(self.model.config.model_type), self.settings.path, self.limits.context
        )

    def data_limits(self) -> Limits:
        """What the base can take."""
        return self.limits

    def create_model(self, model_id: str, lora: LoraConfig) -> None:
        """See the protocol."""
        if model_id in self.models:
            raise UserError(f"model {model_id!r} exists already; expected another id")
        if not 1 <= lora.rank <= _MAX_RANK:
            raise UserError(f"lora_config.rank: given {lora.rank}, expected 1 to {_MAX_RANK}")
        paths = self.lora.targets(lora.train_attn, lora.train_mlp, lora.train_unembed)
        self._make_room()
        self.models[model_id] = LoraModel(lora, self.lora.new_weights(paths, lora.rank, lora.seed or 0))

    def unload_model(self, model_id: str) -> None:
        """See the protocol."""
        self._look_up(model_id)
        del self.models[model_id]

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """See the protocol."""
        self._look_up(model_id)
        return as_output(self.run_checked(model_id, check_data(data, loss_fn, loss_fn_config, self.limits), forward_only))

    def run_checked(self, model_id: str, checked: CheckedData, forward_only: bool) -> list[DatumResult]:
        """`forward_backward` of data that were checked before. None at all is fine: then others have them."""
        model = self._resident(model_id)
        self.lora.use(model.adapter)
        try:
            if forward_only:
                return run_data(self.model, checked, self.settings.max_batch_tokens, backward=False)
            self.model.train(self.settings.gradient_checkpointing)
            with model.adding_gradient():
                return run_data(self.model, checked, self.settings.max_batch_tokens, backward=True)
        finally:
            self.model.eval()
            self.lora.off()

    def optim_step(self, model_id: str, adam: AdamParams) -> dict[str, float]:
        """See the protocol."""
        return self._resident(model_id).step(adam)

    def save_state(self, model_id: str, directory: Path) -> int:
        """See the protocol."""
        model = self._look_up(model_id)
        tensors = {WEIGHTS_FILE: model.weights(), OPTIMIZER_FILE: model.optimizer.state()}
        if model.pending:
            tensors[GRADIENT_FILE] = model.gradient_tensors()
        return self._save(model, directory, tensors)

    def save_sampler(self, model_id: str, directory: Path) -> int:
        """See the protocol."""
        model = self._look_up(model_id)
        return self._save(model, directory, {WEIGHTS_FILE: model.weights()})

    def load_state(self, model_id: str, directory: Path, optimizer: bool) -> None:
        """See the protocol."""
        model = self._look_up(model_id)
        loaded = store.load(directory)
        saved = self._saved_model(loaded)
        _check_lora(model.lora, saved.lora, directory)
        files = loaded.tensors
        model.check_fits(files[WEIGHTS_FILE], f"{directory}/{WEIGHTS_FILE}")
        moments = optimizer_in(files) if optimizer else {}
        if moments is None:
            raise UserError(
                f"{directory} holds weights to sample from and no optimizer; expected what save_state has written, or load it "
                "without the optimizer"
            )
        gradient = files.get(GRADIENT_FILE, {})
        if gradient:
            model.check_fits(gradient, f"{directory}/{GRADIENT_FILE}")
        if optimizer:
            steps, pending = saved.optimizer_steps, saved.pending
            model.take_over(files[WEIGHTS_FILE], moments, gradient, steps, pending, saved.lora_alpha)
        else:
            model.take_over(files[WEIGHTS_FILE], {}, {}, 0, 0, saved.lora_alpha)

    def add_sampler(self, sampler_id: str, source: str | Path | None) -> None:
        """See the protocol. A path may also name the `actor` folder itself."""
        if sampler_id in self.samplers:
            raise UserError(f"sampler {sampler_id!r} exists already; expected another id")
        if source is None:
            self.samplers[sampler_id] = None
            return
        adapter = self._saved_adapter(source) if isinstance(source, Path) else _snapshot(self._look_up(source).adapter)
        self.lora.check_weights(adapter.weights, f"{source}" if isinstance(source, Path) else f"model {source!r}")
        self.samplers[sampler_id] = adapter

    def memory(self) -> EngineMemory:
        """See the protocol."""
        return EngineMemory(torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0)

    def drop_sampler(self, sampler_id: str) -> None:
        """See the protocol."""
        self.check_samplers([sampler_id])
        del self.samplers[sampler_id]

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleResponse]:
        """See the protocol."""
        self.check_samplers([request.sampler_id for request in requests])
        return self.sampler.sample(requests, self.samplers)

    def check_samplers(self, sampler_ids: Sequence[str]) -> None:
        """Raise `UserError` unless all of them are there."""
        for sampler_id in sampler_ids:
            if sampler_id not in self.samplers:
                raise UserError(f"no sampler {sampler_id!r}; expected one that was added and not dropped")

    def close(self) -> None:
        """See the protocol."""
        self.models.clear()
        self.samplers.clear()

    def _look_up(self, model_id: str) -> LoraModel:
        if model_id not in self.models:
            raise UserError(f"no model {model_id!r}; expected one that was created and not unloaded")
        return self.models[model_id]

    def _resident(self, model_id: str) -> LoraModel:
        """The model on the device, as the one used last; the one not used for longest leaves for the host if it must."""
        model = self._look_up(model_id)
        del self.models[model_id]
        self._make_room()
        model.to(self.device)
        self.models[model_id] = model
        return model

    def _make_room(self) -> None:
        """Leave one place on the device."""
        kept = self.settings.max_resident_models - 1
        models = list(self.models.values())
        for model in models[: max(0, len(models) - kept)]:
            model.to(torch.device("cpu"))

    def _save(self, model: LoraModel, directory: Path, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> int:
        lora = model.lora
        paths = self.lora.targets(lora.train_attn, lora.train_mlp, lora.train_unembed)
        pending = model.pending if GRADIENT_FILE in tensors else 0
        state = SavedModel(self.settings.base_model, self.digest, lora, model.steps, pending, model.alpha)
        config = self.lora.peft_config(paths, lora.rank, model.alpha, self.settings.path)
        files = store.CheckpointFiles(tensors, json={CONFIG_FILE: config, STATE_FILE: state.json()})
        return store.save(directory.parent, directory.name, model.steps, files).bytes

    def _saved_model(self, loaded: store.LoadedCheckpoint) -> SavedModel:
        """The state of a saved model, which is of this base."""
        saved = saved_model_of(loaded)
        if saved.base_digest != (model_identity(self.settings.path) if saved.of_run else self.digest):
            raise UserError(
                f"{loaded.path} is of the base {saved.base_model!r}, and this engine holds {self.settings.base_model!r}, whose "
                f"weights are others; expected base_model={saved.base_model}"
            )
        return saved

    def _saved_adapter(self, path: Path) -> Adapter:
        directory = path.parent if path.name == "actor" and not (path / MANIFEST).exists() else path
        loaded = store.load(directory)
        saved = self._saved_model(loaded)
        weights = {name: torch.from_numpy(np.array(array)) for name, array in loaded.tensors[WEIGHTS_FILE].items()}
        return Adapter(weights, saved.lora_alpha / saved.lora.rank)


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: given cuda, and there is no GPU that torch can use; mend it with device=cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def as_output(results: Sequence[DatumResult]) -> ForwardBackwardOutput:
    """In the SDK's words; the sum over data does not depend on how they were cut."""
    outputs = [{"logprobs": TensorData(result.logp, "float32")} for result in results]
    return ForwardBackwardOutput("TorchLossReturn", outputs, {"loss:sum": math.fsum(result.loss for result in results)})


def _snapshot(adapter: Adapter) -> Adapter:
    """A copy on the host."""
    return Adapter({name: weight.detach().to("cpu", copy=True) for name, weight in adapter.weights.items()}, adapter.scale)


def _check_lora(given: LoraConfig, saved: LoraConfig, directory: Path) -> None:
    for name in ("rank", "train_attn", "train_mlp", "train_unembed"):
        if getattr(given, name) != getattr(saved, name):
            raise UserError(
                f"{directory}: lora_config.{name} is {getattr(saved, name)} there and {getattr(given, name)} in the model; "
                f"expected a model created with {name}={getattr(saved, name)}"
            )


def _base_digest(model: PreTrainedModel) -> str:
    """Names a base whatever it is called: its kind and sizes, and the first numbers of every weight.

    In bfloat16, so that a base loaded in float32 and in bfloat16 is the same one. Read before layers are wrapped.
    """
    config: dict[str, Any] = {
        "model_type": model.config.model_type,
        "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
    }
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for parameter in model.parameters():
        first = parameter.detach().flatten()[:64]
        digest.update((first.bfloat16() if first.is_floating_point() else first).float().cpu().numpy().tobytes())
    return digest.hexdigest()
