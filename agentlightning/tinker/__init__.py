"""Doors two and three: a training client for loops of one's own, and the service that the `tinker` SDK talks to.

`from agentlightning.tinker import ServiceClient, types` is all that a loop needs. The names are the SDK's, and come when they
are asked for: importing this imports neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentlightning.tinker import types
    from agentlightning.tinker.futures import Future as APIFuture
    from agentlightning.tinker.sampling_client import SamplingClient
    from agentlightning.tinker.service_client import ServiceClient
    from agentlightning.tinker.training_client import TrainingClient
    from agentlightning.tinker.types import (
        AdamParams,
        Datum,
        EncodedTextChunk,
        ForwardBackwardOutput,
        LoraConfig,
        ModelInput,
        OptimStepResponse,
        SampledSequence,
        SampleResponse,
        SamplingParams,
        StopReason,
        TensorData,
        TensorDtype,
    )

__all__ = [
    "APIFuture",
    "AdamParams",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "LoraConfig",
    "ModelInput",
    "OptimStepResponse",
    "SampleResponse",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TrainingClient",
    "types",
]
_CLIENTS = {
    "APIFuture": ("futures", "Future"),
    "SamplingClient": ("sampling_client", "SamplingClient"),
    "ServiceClient": ("service_client", "ServiceClient"),
    "TrainingClient": ("training_client", "TrainingClient"),
}


def __getattr__(name: str) -> Any:
    """A public name, at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "types":
        return import_module(f"{__name__}.types")
    module, attribute = _CLIENTS.get(name, ("types", name))
    return getattr(import_module(f"{__name__}.{module}"), attribute)
