"""A loss that the loop brings along. Data and a function enter; the gradient of its loss is added to the model's sum.

The loss C is a function of the log-probabilities alone, so its gradient by the weights is that of the linear loss
sum(logp * dC/dlogp) with the second factor held fixed: cross_entropy with weights -dC/dlogp. One forward pass gives the
log-probabilities, torch the derivatives, and one forward_backward the rest. The SDK does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentlightning.errors import UserError
from agentlightning.tinker.engine_api import LoraEngine
from agentlightning.tinker.types import Datum, ForwardBackwardOutput, TensorData

if TYPE_CHECKING:
    import torch

CustomLoss = Callable[[list[Datum], list[Any]], tuple[Any, Mapping[str, float]]]


def run_custom_loss(engine: LoraEngine, model_id: str, data: list[Datum], loss_fn: CustomLoss) -> ForwardBackwardOutput:
    """Metrics: the function's own, `loss:sum` (its loss) and `surrogate_loss:sum` (the linear one's).

    Raises UserError if there is nothing to differentiate; what `loss_fn` raises passes through.
    """
    linear = [_with_weights(number, datum, None) for number, datum in enumerate(data)]
    outputs = engine.forward_backward(model_id, linear, "cross_entropy", None, True).loss_fn_outputs
    logprobs = [output["logprobs"].to_torch().requires_grad_() for output in outputs]
    loss, metrics = loss_fn(list(data), list(logprobs))
    value = float(loss.detach().sum())
    gradients = _gradients(loss, logprobs)
    pairs = zip(data, gradients, strict=True)
    linear = [_with_weights(number, datum, -gradient) for number, (datum, gradient) in enumerate(pairs)]
    answer = engine.forward_backward(model_id, linear, "cross_entropy", None, False)
    losses = {"loss:sum": value, "surrogate_loss:sum": answer.metrics["loss:sum"]}
    return replace(answer, metrics={**answer.metrics, **metrics, **losses})


def _gradients(loss: torch.Tensor, logprobs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    if not loss.requires_grad:
        raise UserError("the custom loss does not depend on the log-probabilities; expected a scalar made of them by torch")
    loss.backward()
    return [torch.zeros_like(logprob) if logprob.grad is None else logprob.grad for logprob in logprobs]


def _with_weights(number: int, datum: Datum, weights: torch.Tensor | None) -> Datum:
    """The datum for cross_entropy; None: zeros, which the forward pass does not look at."""
    import torch

    if "target_tokens" not in datum.loss_fn_inputs:
        raise UserError(f"data[{number}].loss_fn_inputs has no target_tokens; a custom loss needs them")
    targets: TensorData = datum.loss_fn_inputs["target_tokens"]
    weights = torch.zeros(targets.shape) if weights is None else weights
    return Datum(datum.model_input, {"target_tokens": targets, "weights": weights})
