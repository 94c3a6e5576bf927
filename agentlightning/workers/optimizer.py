"""AdamW over a few small parameters: gradients lie in one flat buffer, state is kept by parameter name.

Enters: gradients summed into the buffer, over the shards and over the workers. Leaves: new weights, or a `NumericsError` before
any weight has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from agentlightning.errors import CheckpointError, NumericsError
from agentlightning.workers.logical_shards import GradientTree
from agentlightning.workers.settings import OptimSettings
from agentlightning.workers.shards import shards_of_workers

# DoRA's. Weight decay draws LoRA's matrices to the base, which they start at with zero; a magnitude of zero is no model at all.
_MAGNITUDE = "lora_magnitude_vector"
_DECAY_SHARE = 0.1  # of the training steps: wsd's last part (Hu et al., 2024: arXiv 2404.06395 find a tenth to be enough)
_TIMESCALE = 10_000  # of inverse_sqrt without warm-up, as transformers has it


def lr_at(settings: OptimSettings, step: int) -> float:
    """Learning rate of training step `step` (from 1), the same for all its optimizer steps, as in verl.

    Linear warm-up over `warmup_steps`, whose first step already learns. Then, with transformers' definitions: `constant`;
    `linear` and `cosine` to `min_lr_ratio` at the end; `inverse_sqrt`, which has no end (big_vision's); `wsd` (warm-up, stable,
    decay), constant but for the last tenth of all steps, which go linearly to `min_lr_ratio`.
    """
    done = max(0, step - 1 - settings.idle_steps)
    if done < settings.warmup_steps:
        return settings.lr * (done + 1) / settings.warmup_steps
    return settings.lr * _SHAPES[settings.scheduler](settings, done - settings.warmup_steps)


def _constant(settings: OptimSettings, since_warmup: int) -> float:
    return 1.0


def _linear(settings: OptimSettings, since_warmup: int) -> float:
    return _down_to_floor(settings, 1 - min(1.0, since_warmup / _steps_after_warmup(settings)))


def _cosine(settings: OptimSettings, since_warmup: int) -> float:
    progress = min(1.0, since_warmup / _steps_after_warmup(settings))
    return _down_to_floor(settings, 0.5 * (1 + math.cos(math.pi * progress)))


def _inverse_sqrt(settings: OptimSettings, since_warmup: int) -> float:
    timescale = settings.warmup_steps or _TIMESCALE
    return max(settings.min_lr_ratio, math.sqrt(timescale / (since_warmup + timescale)))


def _wsd(settings: OptimSettings, since_warmup: int) -> float:
    left = _steps_after_warmup(settings)
    decay = min(left, max(1, round(_DECAY_SHARE * (settings.total_steps - settings.idle_steps))))
    return _down_to_floor(settings, 1 - min(1.0, max(0, since_warmup - (left - decay)) / decay))


def _down_to_floor(settings: OptimSettings, share: float) -> float:
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share


def _steps_after_warmup(settings: OptimSettings) -> int:
    return max(1, settings.total_steps - settings.idle_steps - settings.warmup_steps)


_SHAPES: Mapping[str, Callable[[OptimSettings, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}


class NamedAdamW:
    """AdamW (Loshchilov and Hutter, 2019) on `parameters`, float32, each known by its name.

    `logical_shards`: gradients are added by the tree of `GradientTree`, and `end_of_shard` follows the passes of each shard.
    Without, each worker's are one sum, and those of the workers are added in whatever order the collective does.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: OptimSettings, logical_shards: int | None = None
    ) -> None:
        self.settings, self.logical_shards = settings, logical_shards
        self.tree: GradientTree | None = None
        self.parameters = dict(sorted(parameters.items()))
        device = next(iter(self.parameters.values())).device
        self.flat_grad = torch.zeros(sum(p.numel() for p in self.parameters.values()), device=device)
        # Each gradient is a view of the flat buffer: backward adds into it, and one all-reduce moves everything.
        offset = 0
        for parameter in self.parameters.values():
            parameter.grad = self.flat_grad[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        decayed = [p for name, p in self.parameters.items() if _MAGNITUDE not in name]
        magnitudes = [p for name, p in self.parameters.items() if _MAGNITUDE in name]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": settings.weight_decay}]
        if magnitudes:
            groups.append({"params": magnitudes, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)

    def zero_grad(self) -> None:
        """Start a new sum."""
        self.flat_grad.zero_()
        if self.logical_shards is not None:
            world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
            self.tree = GradientTree(self.logical_shards, shards_of_workers(self.logical_shards, world_size)[rank].start)

    def end_of_shard(self) -> None:
        """What was added since the last call is one shard's gradient."""
        if self.tree is not None:
            self.tree.add(self.flat_grad)
            self.flat_grad.zero_()

    @contextmanager
    def undone_on_error(self, optimizer_steps: int) -> Iterator[None]:
        """Around the `optimizer_steps` of one update: what leaves the block by an exception leaves weights and moments as they
        were before it.

        A single step changes nothing before its last check, so only several need the copy: three times the adapter's bytes.
        """
        if optimizer_steps < 2:
            yield
            return
        weights = [parameter.detach().clone() for parameter in self.parameters.values()]
        moments = {name: tensor.clone() for name, tensor in self.tensors().items()}
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, before in zip(self.parameters.values(), weights, strict=True):
                    parameter.copy_(before)
            self._set_moments(moments)
            raise

    def step(self, training_step: int, what: str) -> dict[str, float]:
        """Sum the gradients over the workers, clip, and step. Returns `grad_norm` (before clipping) and `lr`.

        Raises `NumericsError` naming `what` if a gradient is NaN or infinite; then no weight has changed.
        """
        self._sum_gradients()
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

    def _sum_gradients(self) -> None:
        """Over the shards and workers, into the flat buffer."""
        if self.tree is not None:
            self.flat_grad.copy_(self.tree.total())
            self.tree = None
        elif dist.is_initialized():
            dist.all_reduce(self.flat_grad)

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
        self._set_moments({key: torch.tensor(array) for key, array in state.items()})

    def _set_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """`tensors` as those of `tensors`; parameters without any have not been stepped."""
        self.optimizer.state.clear()
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            parameter = self.parameters[name]
            self.optimizer.state.setdefault(parameter, {})[kind] = tensor.to(parameter.device)


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
