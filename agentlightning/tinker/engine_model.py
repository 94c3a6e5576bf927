"""One model of the engine: an adapter's weights, the sum of its gradients and its AdamW state, on the device or on the host.

Enters: gradients that backward passes add into one flat buffer. Leaves: new weights, or an error before any has changed; and
the tensors that a checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from agentlightning.errors import NumericsError, UserError
from agentlightning.models.multi_lora import Adapter
from agentlightning.tinker.engine_saved import LORA_ALPHA
from agentlightning.tinker.types import AdamParams, LoraConfig
from agentlightning.workers.optimizer import NamedAdamW
from agentlightning.workers.settings import OptimSettings

_RANGES = {  # what each number of AdamParams must be: words, and the test
    "learning_rate": ("a number of at least 0", lambda x: x >= 0),
    "beta1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "beta2": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "eps": ("a number of at least 0", lambda x: x >= 0),
    "weight_decay": ("a number of at least 0", lambda x: x >= 0),
    "grad_clip_norm": ("a number of at least 0 (0: no clipping)", lambda x: x >= 0),
}


def check_adam(adam: AdamParams) -> None:
    """Raise `UserError` for a number out of its range."""
    for name, (words, holds) in _RANGES.items():
        value = getattr(adam, name)
        if not (math.isfinite(value) and holds(value)):
            raise UserError(f"adam_params.{name}: given {value!r}, expected {words}")


class LoraModel:
    """`weights` by PEFT's names, on the device that it is to start on."""

    def __init__(self, lora: LoraConfig, weights: Mapping[str, torch.Tensor]) -> None:
        self.lora = lora
        self.alpha = LORA_ALPHA  # until weights are taken over that were trained with another
        self.parameters = {name: nn.Parameter(weight) for name, weight in sorted(weights.items())}
        # The numbers are those of each step's AdamParams; these are never used.
        unused = OptimSettings(lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=math.inf)
        self.optimizer = NamedAdamW(self.parameters, unused)
        self.pending = 0  # forward_backwards in the gradient sum
        self.steps = 0

    @property
    def adapter(self) -> Adapter:
        """The live weights."""
        return Adapter(self.parameters, self.alpha / self.lora.rank)

    @property
    def gradient(self) -> torch.Tensor:
        """The sum, flat, float32."""
        return self.optimizer.flat_grad

    @contextmanager
    def adding_gradient(self) -> Iterator[None]:
        """Around backward passes: what leaves by an exception leaves the sum as it was."""
        before = self.gradient.clone() if self.pending else None
        try:
            yield
        except BaseException:
            self.gradient.zero_() if before is None else self.gradient.copy_(before)
            raise
        self.pending += 1

    def sum_gradients(self) -> None:
        """Over the workers; afterwards the first one holds the sum and the others none of it."""
        if dist.is_initialized():
            dist.all_reduce(self.gradient)
            if dist.get_rank() != 0:
                self.gradient.zero_()

    def drop_gradient(self) -> None:
        """Start a new sum."""
        self.gradient.zero_()
        self.pending = 0

    def step(self, adam: AdamParams) -> dict[str, float]:
        """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019: arXiv 1711.05101), torch's.

        Raises `UserError` where there is no gradient: momentum alone would move the weights, which nobody asks for. Raises
        `NumericsError` if the gradient is NaN or infinite: no weight and no moment has changed then, and the sum is dropped.
        """
        check_adam(adam)
        if not self.pending:
            raise UserError("optim_step: there is no gradient; expected a forward_backward that succeeded before it")
        if dist.is_initialized():
            dist.all_reduce(self.gradient)
        norm = float(self.gradient.norm())
        if not math.isfinite(norm):
            self.drop_gradient()
            raise NumericsError(f"the norm of the gradient is {norm}; no weight was changed, and the gradient sum was dropped")
        if adam.grad_clip_norm > 0 and norm > adam.grad_clip_norm:
            self.gradient.mul_(adam.grad_clip_norm / (norm + 1e-6))
        for group in self.optimizer.optimizer.param_groups:
            group["lr"], group["betas"], group["eps"] = adam.learning_rate, (adam.beta1, adam.beta2), adam.eps
            group["weight_decay"] = adam.weight_decay
        self.optimizer.optimizer.step()
        self.drop_gradient()
        self.steps += 1
        return {"grad_norm:mean": norm}

    def to(self, device: torch.device) -> None:
        """Move everything; no bit changes. On the same device it costs nothing."""
        if self.gradient.device == device:
            return
        self.optimizer.flat_grad = self.gradient.to(device)
        offset = 0
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.data = parameter.data.to(device)
            parameter.grad = self.gradient[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        for state in self.optimizer.optimizer.state.values():
            state.update({key: tensor.to(device) for key, tensor in state.items()})

    def weights(self) -> dict[str, np.ndarray]:
        """A copy."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.parameters.items()}

    def gradient_tensors(self) -> dict[str, np.ndarray]:
        """A copy of the sum, by parameter name."""
        return {name: p.grad.cpu().numpy().copy() for name, p in self.parameters.items() if p.grad is not None}

    def check_fits(self, weights: Mapping[str, np.ndarray], what: str) -> None:
        """Raise `UserError` unless the names and shapes are this model's."""
        expected = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        given = {name: tuple(array.shape) for name, array in weights.items()}
        if given != expected:
            odd = min(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            raise UserError(f"{what}: {odd} has shape {given.get(odd)} there, expected {expected.get(odd)}, the model's")

    @torch.no_grad()
    def take_over(
        self,
        weights: Mapping[str, np.ndarray],
        optimizer: Mapping[str, np.ndarray],
        gradient: Mapping[str, np.ndarray],
        steps: int,
        pending: int,
        alpha: float,
    ) -> None:
        """Go on from there; all have been checked."""
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))
        self.optimizer.load_state(optimizer)
        self.drop_gradient()
        for name, array in gradient.items():
            grad = self.parameters[name].grad
            assert grad is not None
            grad.copy_(torch.from_numpy(np.array(array)))
        self.steps, self.pending, self.alpha = steps, pending, alpha
