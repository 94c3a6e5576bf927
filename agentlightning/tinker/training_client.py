"""One adapter that a loop of one's own trains. `Datum`s and names enter, futures leave; nothing waits until it is asked to.

Methods and answers are those of the `tinker` SDK's `TrainingClient`, and as there `x_async()` gives the future that
`x()` gives. Two things differ on purpose: `load_state` brings back the optimizer too, and may come at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agentlightning.tinker.custom_loss import CustomLoss, run_custom_loss
from agentlightning.tinker.dispatch import EngineThread
from agentlightning.tinker.engine_api import BaseModelInfo, LoraEngine
from agentlightning.tinker.engine_saved import read_saved_model
from agentlightning.tinker.futures import Future, Ready
from agentlightning.tinker.places import Places, check_name, check_ttl
from agentlightning.tinker.sampling_client import SamplingClient
from agentlightning.tinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LoraConfig,
    ModelData,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossConfig = Mapping[str, float | str]


@dataclass(frozen=True, slots=True)
class About:
    """What a training client knows of its model; `run.json` beside its saves says the same."""

    model_id: str
    base: BaseModelInfo
    lora: LoraConfig
    user_metadata: dict[str, str]


class TrainingClient(Ready):
    """Made by a `ServiceClient`. Every call is done behind all those before it, also if one of them failed."""

    def __init__(self, engine: EngineThread, about: About, places: Places, new_sampler_id: Callable[[], str]) -> None:
        self._engine, self._about, self._places = engine, about, places
        self._new_sampler_id = new_sampler_id
        self._steps = 0  # optimizer steps behind these weights; the engine's thread counts
        self.model_id = about.model_id

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig | None = None
    ) -> Future[ForwardBackwardOutput]:
        """The loss alone."""
        return self._loss(data, loss_fn, loss_fn_config, forward_only=True)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Add the gradient of the loss, summed over `data`, to what `optim_step` will step with.

        `loss_fn`: cross_entropy, importance_sampling, ppo, cispo, dro, gspo. UserError, from the future, if data do not fit.
        """
        return self._loss(data, loss_fn, loss_fn_config, forward_only=False)

    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        """The same with a loss of your own: `loss_fn(data, logprobs)` gives (loss, metrics).

        `logprobs` is a list of float32 tensors, one a datum, of its `target_tokens`' shape; `loss` a scalar that torch can
        differentiate by them. It is called by the engine's thread, so it must not wait for this client; it adds a forward pass.
        """
        return self._engine.submit(partial(run_custom_loss, model_id=self.model_id, data=list(data), loss_fn=loss_fn))

    def optim_step(self, adam_params: AdamParams) -> Future[OptimStepResponse]:
        """One step of AdamW with the gradients since the last one. NumericsError if they are NaN: no weight changes then."""

        def step(engine: LoraEngine) -> OptimStepResponse:
            metrics = engine.optim_step(self.model_id, adam_params)
            self._steps += 1
            return OptimStepResponse(metrics)

        return self._engine.submit(step)

    # -- saving and loading -------------------------------------------------------------------------------------------

    def save_state(self, name: str, ttl_seconds: int | None = None) -> Future[SaveWeightsResponse]:
        """Weights and optimizer, durable when the answer is there; its `.path` is for `load_state`.

        A name that this client has saved before gets a number behind: nothing that a record may name changes.
        """
        return self._engine.submit(self._save(name, ttl_seconds, sampler=False)).then(
            lambda path: SaveWeightsResponse(str(path))
        )

    def save_weights_for_sampler(self, name: str, ttl_seconds: int | None = None) -> Future[SaveWeightsForSamplerResponse]:
        """The adapter alone, as `PeftModel.from_pretrained` loads it; `.path` is for `create_sampling_client`."""
        saved = self._engine.submit(self._save(name, ttl_seconds, sampler=True))
        return saved.then(lambda path: SaveWeightsForSamplerResponse(str(path)))

    def load_state(self, path: str, optimizer: bool = True) -> Future[LoadWeightsResponse]:
        """Go on from a saved state, verified before. `optimizer=False`: its weights alone, with a cold optimizer.

        A checkpoint of the built-in trainer (`RUN/global_step_N`) is one too, with the LoRA scale that the run had.
        Gradients that were added since the last `optim_step` are dropped; those that were saved come back with the optimizer.
        """

        def load(engine: LoraEngine) -> LoadWeightsResponse:
            self.take_over(engine, self._places.find(path, sampler=False), optimizer)
            return LoadWeightsResponse(path)

        return self._engine.submit(load)

    def take_over(self, engine: LoraEngine, directory: Path, optimizer: bool) -> None:
        """`load_state`, for who is on the engine's thread already."""
        saved = read_saved_model(directory)
        engine.load_state(self.model_id, directory, optimizer)
        self._steps = saved.optimizer_steps if optimizer else 0  # as the engine counts

    def load_state_with_optimizer(self, path: str) -> Future[LoadWeightsResponse]:
        """`load_state`, by the SDK's other name."""
        return self.load_state(path)

    def _save(self, name: str, ttl_seconds: int | None, *, sampler: bool) -> Callable[[LoraEngine], Path]:
        check_name(name)
        check_ttl(ttl_seconds)

        def save(engine: LoraEngine) -> Path:
            directory = self._places.new(self.model_id, "sampler_weights" if sampler else "weights", name)
            self._places.describe(self.model_id, asdict(self._about))
            (engine.save_sampler if sampler else engine.save_state)(self.model_id, directory)
            self._places.expire(directory, ttl_seconds)
            return directory

        return save

    # -- sampling -----------------------------------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """Samples from the weights as they are now, however they are trained on; nothing is written. `name` does nothing."""
        return self._sampling_client(None).result()

    async def save_weights_and_get_sampling_client_async(self, name: str | None = None) -> SamplingClient:
        """The same without blocking the event loop."""
        return await self._sampling_client(None)

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """Samples from saved weights, or from a saved state."""
        return self._sampling_client(model_path).result()

    async def create_sampling_client_async(self, model_path: str) -> SamplingClient:
        """The same without blocking the event loop."""
        return await self._sampling_client(model_path)

    def _sampling_client(self, model_path: str | None) -> Future[SamplingClient]:
        """None: of the present weights."""
        sampler_id = self._new_sampler_id()

        def add(engine: LoraEngine) -> SamplingClient:
            source = self.model_id if model_path is None else self._places.find(model_path, sampler=True)
            steps = read_saved_model(source).optimizer_steps if isinstance(source, Path) else self._steps
            engine.add_sampler(sampler_id, source)
            return SamplingClient(self._engine, sampler_id, self._about.base, stream=f"step {steps}")

        return self._engine.submit(add)

    # -- what it is ---------------------------------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        """The model's id, base and rank."""
        base = self._about.base
        data = ModelData(base.arch, base.name, base.tokenizer_path)
        return GetInfoResponse(self.model_id, data, lora_rank=self._about.lora.rank, model_name=base.name)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        from agentlightning.models.chat import load_tokenizer

        return load_tokenizer(self._about.base.tokenizer_path)

    def _loss(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig | None, *, forward_only: bool
    ) -> Future[ForwardBackwardOutput]:
        data = list(data)  # as it is now
        return self._engine.submit(lambda engine: engine.forward_backward(self.model_id, data, loss_fn, config, forward_only))

    # -- the same names with _async: they give the same futures ---------------------------------------------------------

    async def forward_async(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig | None = None
    ) -> Future[ForwardBackwardOutput]:
        """See `forward`."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig | None = None
    ) -> Future[ForwardBackwardOutput]:
        """See `forward_backward`."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        """See `forward_backward_custom`."""
        return self.forward_backward_custom(data, loss_fn)

    async def optim_step_async(self, adam_params: AdamParams) -> Future[OptimStepResponse]:
        """See `optim_step`."""
        return self.optim_step(adam_params)

    async def save_state_async(self, name: str, ttl_seconds: int | None = None) -> Future[SaveWeightsResponse]:
        """See `save_state`."""
        return self.save_state(name, ttl_seconds)

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None
    ) -> Future[SaveWeightsForSamplerResponse]:
        """See `save_weights_for_sampler`."""
        return self.save_weights_for_sampler(name, ttl_seconds)

    async def load_state_async(self, path: str, optimizer: bool = True) -> Future[LoadWeightsResponse]:
        """See `load_state`."""
        return self.load_state(path, optimizer)

    async def load_state_with_optimizer_async(self, path: str) -> Future[LoadWeightsResponse]:
        """See `load_state_with_optimizer`."""
        return self.load_state_with_optimizer(path)

    async def get_info_async(self) -> GetInfoResponse:
        """See `get_info`."""
        return self.get_info()
