"""AdamW over a few small parameters: gradients lie in one flat buffer, state is kept by parameter name.

Enters: gradients summed into the buffer, by one worker or by all (one flat all-reduce). Leaves: new weights, or a
`NumericsError` before any weight has changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from agentlightning.errors import CheckpointError, NumericsError
from agentlightning.workers.settings import OptimSettings


def lr_at(settings: OptimSettings, step: int) -> float:
    """Learning rate of training step `step` (from 1): linear warm-up, then constant, linear or cosine to `min_lr_ratio`."""
    done = step - 1
    if done < settings.warmup_steps:
        return settings.lr * (done + 1) / settings.warmup_steps
    progress = min(1.0, (done - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps))
    floor = settings.min_lr_ratio
    shape = {
        "constant": 1.0,
        "linear": floor + (1 - floor) * (1 - progress),
        "cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.scheduler]
    return settings.lr * shape


class NamedAdamW:
    """AdamW (Loshchilov and Hutter, 2019) on `parameters`, float32, each known by its name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimSettings) -> None:
        self.settings = settings
        self.parameters = dict(sorted(parameters.items()))
        device = next(iter(self.parameters.values())).device
        self.flat_grad = torch.zeros(sum(p.numel() for p in self.parameters.values()), device=device)
        # Each gradient is a view of the flat buffer: backward adds into it, and one all-reduce moves everything.
        offset = 0
        for parameter in self.parameters.values():
            parameter.grad = self.flat_grad[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

    def zero_grad(self) -> None:
        """Start a new sum."""
        self.flat_grad.zero_()

    def step(self, training_step: int, what: str) -> dict[str, float]:
        """Sum the gradients over the workers, clip, and step. Returns `grad_norm` (before clipping) and `lr`.

        Raises `NumericsError` naming `what` if a gradient is NaN or infinite; then no weight has changed.
        """
        if dist.is_initialized():
            dist.all_reduce(self.flat_grad)
        norm = float(self.flat_grad.norm())
        if not math.isfinite(norm):
            raise NumericsError(f"the gradient of {what} is {norm} at step {training_step}; {self._non_finite_names()}")
        if norm > self.settings.grad_clip:
            self.flat_grad.mul_(self.settings.grad_clip / (norm + 1e-6))
        lr = lr_at(self.settings, training_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return {"grad_norm": norm, "lr": lr}

    def _non_finite_names(self) -> str:
        names = [n for n, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        return f"{len(names)} of {len(self.parameters)} parameters are hit, {names[0]} first" if names else "the norm overflows"

    def tensors(self) -> dict[str, torch.Tensor]:
        """`exp_avg.<name>`, `exp_avg_sq.<name>` float32 and `step.<name>` for every parameter that has been stepped: live."""
        return {
            f"{key}.{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def state(self) -> dict[str, np.ndarray]:
        """A copy of `tensors`."""
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.tensors().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave. Raises `CheckpointError` if it belongs to other parameters."""
        names = {key.split(".", 1)[1] for key in state}
        if names and names != set(self.parameters):
            odd = sorted(names ^ set(self.parameters))[0]
            raise CheckpointError(
                f"the optimizer state is of other parameters ({odd} is in one and not in the other); expected the adapter this "
                "run was started with: the same lora_rank and target_modules, or trainer.resume_mode=disable to start over"
            )
        self.optimizer.state.clear()
        for name in names:
            parameter = self.parameters[name]
            self.optimizer.state[parameter] = {
                "step": torch.tensor(state[f"step.{name}"], device=parameter.device),
                "exp_avg": torch.tensor(state[f"exp_avg.{name}"], device=parameter.device),
                "exp_avg_sq": torch.tensor(state[f"exp_avg_sq.{name}"], device=parameter.device),
            }


def load_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, np.ndarray], what: str) -> None:
    """Copy `weights` into `parameters` by name. Raises `CheckpointError` before anything changes if they do not fit."""
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(array.shape) for name, array in weights.items()}
    if expected != given:
        odd = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))[0]
        raise CheckpointError(
            f"the checkpoint's {what} does not fit: {odd} has shape {given.get(odd)} there and {expected.get(odd)} here; set "
            "lora_rank and target_modules as they were, or trainer.resume_mode=disable to start over"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))
