"""LoRA adapters on the frozen base: `actor`, and for PPO perhaps `critic`. The reference policy is the base with them off.

Enters: a base, the adapters' shapes, and for an adapter that goes on from another one PEFT's directory of it. Leaves: a PEFT
model, each adapter's parameters under the names PEFT saves them by, and for the rollout a copy of the base with the actor
merged in.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from agentlightning.errors import UserError
from agentlightning.models.base import shallow_copy
from agentlightning.types import LoraShape

_START = "actor_rollout_ref.model.lora_adapter_path"


class Adapters:
    """The PEFT model and what one needs to know of it.

    `model` is the PEFT model; its base is changed in place. Adapter weights are float32 whatever the base is. Those named in
    `starts` begin with the weights in that directory, and have its target modules and variant; the others begin as the base.
    """

    def __init__(
        self, base: PreTrainedModel, shapes: Mapping[str, LoraShape], seed: int, starts: Mapping[str, str] | None = None
    ) -> None:
        starts = starts or {}
        configs = {
            name: _config_of_start(starts[name], shape) if name in starts else _lora_config(shape)
            for name, shape in shapes.items()
        }
        first, *others = configs
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that is being replaced
                warnings.filterwarnings("error", message="You have passed exclude_modules", category=UserWarning)
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(base, configs[first], adapter_name=first)  # pyright: ignore[reportAttributeAccessIssue]
                for name in others:
                    self.model.add_adapter(name, configs[name])
        except (ValueError, UserWarning) as error:
            raise UserError(
                f"PEFT refuses the adapter: {error}; see actor_rollout_ref.model.target_modules and "
                "actor_rollout_ref.model.exclude_modules"
            ) from error
        self.base: PreTrainedModel = self.model.get_base_model()  # pyright: ignore[reportAttributeAccessIssue]
        for name in configs:
            _magnitudes_in_float32(self.base, name)
        self.parameters: dict[str, dict[str, nn.Parameter]] = {name: self._parameters_of(name) for name in configs}
        for name, path in starts.items():
            _load_start(path, self.parameters[name])
        self.checkpoints_activations = any(bool(getattr(module, "gradient_checkpointing", False)) for module in base.modules())
        self.use(first)

    def _parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """By the names PEFT saves them by: given the parameters as the state, it hands them out renamed."""
        everything = dict(self.model.named_parameters())
        named = get_peft_model_state_dict(self.model, state_dict=everything, adapter_name=name, save_embedding_layers=False)
        return {key: parameter for key, parameter in named.items() if isinstance(parameter, nn.Parameter)}

    def use(self, name: str, training: bool = False) -> None:
        """Switch to adapter `name`: the forward pass goes through it, and its parameters alone take gradients.

        Transformers checkpoints activations in training mode only; there is no dropout that the mode would switch on.
        """
        self.model.set_adapter(name)
        self.base.train(training and self.checkpoints_activations)

    def config_json(self, name: str) -> dict[str, Any]:
        """What PEFT writes into `adapter_config.json`."""
        config = self.model.peft_config[name].to_dict()
        config["inference_mode"] = True
        # PEFT's dictionary holds enums and sets; a round trip through JSON leaves what a file would hold.
        return json.loads(json.dumps(config, default=_plain))

    def unmergeable(self, name: str) -> str | None:
        """The first module under adapter `name` that cannot be merged by adding matrices: quantised, an embedding, ..."""
        for path, layer in _layers(self.base, name):
            if not isinstance(layer, Linear) or type(layer.get_base_layer()) is not nn.Linear:
                return path
        return None


class MergedCopy:
    """The base with the actor merged into its weights: decodes as fast as a model without adapters.

    Parameters that no adapter touches are shared with the base. Merging is PEFT's own, made anew from the base at every
    version, so nothing drifts; in float32 it changes log-probabilities by about 1e-6 (measured in the tests). Only for adapters
    of which `Adapters.unmergeable` names no module.
    """

    def __init__(self, plain: PreTrainedModel, adapters: Adapters, name: str) -> None:
        self.model, self.name = plain, name
        self.layers: list[tuple[Linear, nn.Linear]] = []
        for path, layer in _layers(adapters.base, name):
            target = plain.get_submodule(path)
            assert isinstance(layer, Linear)
            assert isinstance(target, nn.Linear)
            target.weight = nn.Parameter(target.weight.detach().clone(), requires_grad=False)
            self.layers.append((layer, target))

    @staticmethod
    def plain_copy(base: PreTrainedModel) -> PreTrainedModel:
        """What the constructor takes; must be made before the adapters go into `base`."""
        return shallow_copy(base)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapter's present weights."""
        for layer, target in self.layers:
            base_weight = layer.get_base_layer().weight
            assert isinstance(base_weight, torch.Tensor)
            if self.name in layer.lora_variant:  # DoRA: the sum is scaled by row, which PEFT knows how to
                target.weight.copy_(layer.lora_variant[self.name].merge_safe(layer, self.name, base_weight))
            else:
                torch.add(base_weight, layer.get_delta_weight(self.name), out=target.weight)


def _layers(base: nn.Module, name: str) -> list[tuple[str, LoraLayer]]:
    """The modules under adapter `name`, with their paths in the base."""
    return [(path, layer) for path, layer in base.named_modules() if isinstance(layer, LoraLayer) and name in layer.r]


def _magnitudes_in_float32(base: nn.Module, name: str) -> None:
    """Make DoRA's magnitudes anew, now that the adapter is float32.

    PEFT has made them in the base's type: in bfloat16 they are off by up to 0.2 %, and the policy would not start as the base.
    """
    for _, layer in _layers(base, name):
        if layer.use_dora[name]:
            layer.lora_variant[name].init(layer, adapter_name=name)


def _lora_config(shape: LoraShape) -> LoraConfig:
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType] - PEFT only divides by the rank
        target_modules=_list(shape.target_modules),
        exclude_modules=_list(shape.exclude_modules),
        use_rslora=shape.use_rslora,
        use_dora=shape.use_dora,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",  # pyright: ignore[reportArgumentType] - an enum of strings
    )


def _list(modules: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(modules) if isinstance(modules, tuple) else modules


def _config_of_start(path: str, shape: LoraShape) -> LoraConfig:
    """PEFT's configuration in the directory `path`, without dropout; its rank and alpha must be those of `shape`."""
    try:
        document = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
        found = LoraShape.from_peft(document)
        config = LoraConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{_START}: no adapter to start from at {path!r}: {error}; expected a directory written by PEFT's save_pretrained, "
            f"or {_START}=null"
        ) from error
    assert isinstance(config, LoraConfig)
    if (found.rank, found.alpha) != (shape.rank, shape.alpha):
        raise UserError(
            f"{_START}: the adapter at {path!r} has rank {found.rank} and alpha {found.alpha:g}, given {shape.rank} and "
            f"{shape.alpha:g}; mend it with actor_rollout_ref.model.lora_rank={found.rank} "
            f"actor_rollout_ref.model.lora_alpha={found.alpha:g}"
        )
    config.lora_dropout, config.init_lora_weights, config.inference_mode = 0.0, True, False
    return config


def _load_start(path: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the weights in the directory `path` into `parameters`; nothing but safetensors is read."""
    file = Path(path) / "adapter_model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{_START}: {file} cannot be read ({error}); expected the weights as safetensors, for a pickle (adapter_model.bin) "
            "is not opened: save the adapter again with PEFT's save_pretrained"
        ) from error
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if given != expected:
        odd = min(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise UserError(
            f"{_START}: the adapter at {path!r} does not fit the base: {odd} has shape {given.get(odd)} there and "
            f"{expected.get(odd)} here; mend it with the base it was trained on: actor_rollout_ref.model.path="
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
