"""LoRA adapters on the frozen base: `actor`, and for PPO perhaps `critic`. The reference policy is the base with them off.

Enters: a base and the adapters' shapes. Leaves: a PEFT model, each adapter's parameters under the names PEFT saves them by, and
for the rollout a copy of the base with the actor merged in.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers import PreTrainedModel

from agentlightning.errors import UserError
from agentlightning.models.base import shallow_copy
from agentlightning.types import LoraShape


class Adapters:
    """The PEFT model and what one needs to know of it.

    `model` is the PEFT model; its base is changed in place. Adapter weights are float32 whatever the base is.
    """

    def __init__(self, base: PreTrainedModel, shapes: Mapping[str, LoraShape], seed: int) -> None:
        configs = {name: _lora_config(shape) for name, shape in shapes.items()}
        first, *others = configs
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that is being replaced
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(base, configs[first], adapter_name=first)  # pyright: ignore[reportAttributeAccessIssue]
                for name in others:
                    self.model.add_adapter(name, configs[name])
        except ValueError as error:
            raise UserError(f"PEFT refuses the adapter: {error}; see actor_rollout_ref.model.target_modules") from error
        self.base: PreTrainedModel = self.model.get_base_model()  # pyright: ignore[reportAttributeAccessIssue]
        self.parameters: dict[str, dict[str, nn.Parameter]] = {
            name: {
                parameter_name.replace(f".{name}.", "."): parameter
                for parameter_name, parameter in self.model.named_parameters()
                if f".{name}." in parameter_name and "lora_" in parameter_name
            }
            for name in configs
        }
        self.checkpoints_activations = any(bool(getattr(module, "gradient_checkpointing", False)) for module in base.modules())
        self.use(first)

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


class MergedCopy:
    """The base with the actor merged into its weights: decodes as fast as a model without adapters.

    Parameters that no adapter touches are shared with the base. Merging is a plain float addition, made anew from the base
    at every version, so nothing drifts; in float32 it changes log-probabilities by about 1e-6 (measured in the tests).
    """

    def __init__(self, plain: PreTrainedModel, adapters: Adapters, name: str) -> None:
        self.model, self.name = plain, name
        self.layers: list[tuple[Linear, nn.Linear]] = []
        for path, layer in adapters.base.named_modules():
            if isinstance(layer, Linear) and name in layer.lora_A:
                target = plain.get_submodule(path)
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
            torch.add(base_weight, layer.get_delta_weight(self.name), out=target.weight)


def _lora_config(shape: LoraShape) -> LoraConfig:
    targets = shape.target_modules if isinstance(shape.target_modules, str) else list(shape.target_modules)
    return LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")  # pyright: ignore[reportArgumentType]


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
