"""The same clients for a server: the `tinker` SDK carries our words there and its answers back.

So a loop runs on an engine of its own or on `agl serve` without a change. What the SDK raises passes through as it is.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlightning.errors import ConfigError, UserError
from agentlightning.tinker.custom_loss import CustomLoss
from agentlightning.tinker.futures import Future
from agentlightning.tinker.sampling_client import SamplingClient
from agentlightning.tinker.service_client import (
    GetServerCapabilitiesResponse,
    Metadata,
    ServiceClient,
    Status,
    SupportedModel,
)
from agentlightning.tinker.training_client import LossConfig, TrainingClient
from agentlightning.tinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LoraConfig,
    ModelData,
    ModelInput,
    OptimStepResponse,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TensorData,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HttpServiceClient(ServiceClient):
    """What `ServiceClient(base_url=...)` gives."""

    def __init__(
        self, user_metadata: Metadata | None = None, *, base_url: str | None = None, api_key: str | None = None, **options: Any
    ) -> None:
        """Raises ConfigError for options of an engine in this process, and if the SDK is not installed."""
        address = base_url or os.environ["TINKER_BASE_URL"]
        if options:
            raise ConfigError(
                f"ServiceClient was given the address {address} and {', '.join(options)}, which the server decides; leave out "
                "one of them"
            )
        metadata = dict(user_metadata) if user_metadata else None
        self._sdk = _sdk(address).ServiceClient(user_metadata=metadata, base_url=address, api_key=api_key)
        self._seed = None

    def _create(
        self,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Metadata | None,
        state: tuple[Path, bool] | None = None,
    ) -> Future[TrainingClient]:
        assert state is None, "a server's states are found by the server"
        return _ours(
            self._sdk.create_lora_training_client(
                base_model,
                rank=lora.rank,
                seed=lora.seed,
                train_mlp=lora.train_mlp,
                train_attn=lora.train_attn,
                train_unembed=lora.train_unembed,
                user_metadata=dict(user_metadata) if user_metadata else None,
            ),
            HttpTrainingClient,
        )

    def _create_from(
        self, path: str, base_model: str | None, user_metadata: Metadata | None, *, optimizer: bool
    ) -> Future[TrainingClient]:
        sdk = self._sdk
        create = sdk.create_training_client_from_state_with_optimizer if optimizer else sdk.create_training_client_from_state
        metadata = dict(user_metadata) if user_metadata else None
        return _ours(create(path, base_model=base_model, user_metadata=metadata), HttpTrainingClient)

    def _create_sampler(self, model_path: str | None, base_model: str | None) -> Future[SamplingClient]:
        return _ours(self._sdk.create_sampling_client(model_path=model_path, base_model=base_model), HttpSamplingClient)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """What the server says it has."""
        answer = _quietly(self._sdk.get_server_capabilities)
        return GetServerCapabilitiesResponse(
            [SupportedModel(m.model_name, m.max_context_length) for m in answer.supported_models]
        )

    def close(self, status: Status = "success", detail: str | None = None) -> Future[None]:
        """End the session."""
        return _ours(self._sdk.close(status, detail), lambda _: None)


class HttpTrainingClient(TrainingClient):
    """A `TrainingClient` of a server."""

    def __init__(self, sdk_client: Any) -> None:
        self._sdk = sdk_client
        self.model_id = sdk_client.model_id

    def _loss(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig | None, *, forward_only: bool
    ) -> Future[ForwardBackwardOutput]:
        run = self._sdk.forward if forward_only else self._sdk.forward_backward
        return _ours(run([_sdk_datum(datum) for datum in data], loss_fn, config), _output)

    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        """See `TrainingClient`."""
        ours = list(data)
        run = self._sdk.forward_backward_custom
        return _ours(run([_sdk_datum(datum) for datum in ours], lambda _, logprobs: loss_fn(ours, logprobs)), _output)

    def optim_step(self, adam_params: AdamParams) -> Future[OptimStepResponse]:
        """See `TrainingClient`."""
        params = _types().AdamParams(**asdict(adam_params))
        return _ours(self._sdk.optim_step(params), lambda answer: OptimStepResponse(answer.metrics))

    def save_state(self, name: str, ttl_seconds: int | None = None) -> Future[SaveWeightsResponse]:
        """See `TrainingClient`."""
        return _ours(self._sdk.save_state(name, ttl_seconds=ttl_seconds), lambda answer: SaveWeightsResponse(answer.path))

    def save_weights_for_sampler(self, name: str, ttl_seconds: int | None = None) -> Future[SaveWeightsForSamplerResponse]:
        """See `TrainingClient`."""
        saved = self._sdk.save_weights_for_sampler(name, ttl_seconds=ttl_seconds)
        return _ours(saved, lambda answer: SaveWeightsForSamplerResponse(answer.path))

    def load_state(self, path: str, optimizer: bool = True) -> Future[LoadWeightsResponse]:
        """See `TrainingClient`. Not every server allows it once the model was trained; `agl serve` does."""
        load = self._sdk.load_state_with_optimizer if optimizer else self._sdk.load_state
        return _ours(_quietly(load, path), lambda _: LoadWeightsResponse(path))

    def _sampling_client(self, model_path: str | None) -> Future[SamplingClient]:
        sdk = self._sdk
        made = sdk.save_weights_and_get_sampling_client() if model_path is None else sdk.create_sampling_client(model_path)
        return _ours(made, HttpSamplingClient)

    def get_info(self) -> GetInfoResponse:
        """See `TrainingClient`."""
        info = self._sdk.get_info()
        data = ModelData(info.model_data.arch, info.model_data.model_name, info.model_data.tokenizer_id)
        return GetInfoResponse(self.model_id, data, lora_rank=info.lora_rank, model_name=info.model_name)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """See `TrainingClient`."""
        return self._sdk.get_tokenizer()


class HttpSamplingClient(SamplingClient):
    """A `SamplingClient` of a server. Without a seed the server chooses one."""

    def __init__(self, sdk_client: Any) -> None:
        self._sdk = sdk_client

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
    ) -> Future[SampleResponse]:
        """See `SamplingClient`."""
        tokens = _types().ModelInput.from_ints(prompt.to_ints())
        params = _types().SamplingParams(**asdict(sampling_params))
        answer = self._sdk.sample(
            tokens,
            num_samples,
            params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            None if target_prompt_logprobs is None else _sdk_tensor(target_prompt_logprobs),
            prompt_alt_tokens_k,
        )
        return _ours(answer, _sample_response)

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        """See `SamplingClient`."""
        return _ours(self._sdk.compute_logprobs(_types().ModelInput.from_ints(prompt.to_ints())), list)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """See `SamplingClient`."""
        return self._sdk.get_tokenizer()

    def get_base_model(self) -> str:
        """See `SamplingClient`."""
        return self._sdk.get_base_model()


def _sdk(address: str) -> Any:
    try:
        return importlib.import_module("tinker")
    except ImportError as error:
        raise ConfigError(
            f"base_url={address!r} (or TINKER_BASE_URL): talking to a server needs the tinker SDK, which is not installed "
            f"({error}): pip install tinker; or without an address, the engine in this process: ServiceClient(backend='ray')"
        ) from error


def _types() -> Any:
    return importlib.import_module("tinker.types")


def _ours(future: Any, convert: Callable[[Any], Any]) -> Future[Any]:
    """A future of the SDK's as one of ours."""
    return Future(future.future()).then(convert)


def _quietly(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call what the SDK warns of as deprecated: servers of today need it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return call(*arguments)


def _sdk_datum(datum: Datum) -> Any:
    types = _types()
    inputs: Mapping[str, TensorData] = datum.loss_fn_inputs
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.model_input.to_ints()),
        loss_fn_inputs={name: _sdk_tensor(tensor) for name, tensor in inputs.items()},
    )


def _sdk_tensor(tensor: TensorData) -> Any:
    return _types().TensorData(
        data=tensor.data,
        dtype=tensor.dtype,
        shape=tensor.shape,
        sparse_crow_indices=tensor.sparse_crow_indices,
        sparse_col_indices=tensor.sparse_col_indices,
    )


def _output(answer: Any) -> ForwardBackwardOutput:
    outputs = [{name: _tensor(tensor) for name, tensor in output.items()} for output in answer.loss_fn_outputs]
    return ForwardBackwardOutput(answer.loss_fn_output_type, outputs, dict(answer.metrics))


def _tensor(tensor: Any) -> TensorData:
    if tensor.dtype not in ("float32", "int64"):
        raise UserError(f"the server answered with a tensor of {tensor.dtype}, expected float32 or int64")
    return TensorData(tensor.data, tensor.dtype, tensor.shape, tensor.sparse_crow_indices, tensor.sparse_col_indices)


def _sample_response(answer: Any) -> SampleResponse:
    sequences = [SampledSequence(s.stop_reason, list(s.tokens), s.logprobs, s.topk_logprobs) for s in answer.sequences]
    named, drawn = answer.target_prompt_logprobs, answer.prompt_alt_tokens
    return SampleResponse(
        sequences,
        answer.prompt_logprobs,
        answer.topk_prompt_logprobs,
        None if named is None else _tensor(named),
        None if drawn is None else PromptAltTokens(_tensor(drawn.tokens), _tensor(drawn.logprobs)),
    )
