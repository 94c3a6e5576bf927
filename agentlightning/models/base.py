"""The frozen base: a path goes in, a model that nothing will ever write to comes out.

Checks here what the rest of the engine stands on: full attention in every layer (the row cache masks by position), an output
head that is a plain matrix product (log-probabilities are computed chunk by chunk from the hidden states), and that every
weight comes from the files.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from agentlightning.errors import UserError
from agentlightning.models.chat import not_found
from agentlightning.types import DType, Quantization

# Settings of other families that change the logits after the output head.
_LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
_OVERRIDE = "actor_rollout_ref.model.override_config"
_DECIDED_ELSEWHERE = {  # values of a model's configuration that have a key of their own, or none
    "dtype": "actor_rollout_ref.model.dtype=float32",
    "torch_dtype": "actor_rollout_ref.model.dtype=float32",
    "quantization_config": "actor_rollout_ref.model.quantization=4bit",
    "model_type": "actor_rollout_ref.model.path=<a model of that kind>",
    "architectures": "actor_rollout_ref.model.path=<a model of that kind>",
}


def resolve_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def dtype_name(dtype: DType, device: torch.device) -> DType:
    """The same with `auto` decided."""
    return "bfloat16" if resolve_dtype(dtype, device) == torch.bfloat16 else "float32"


def load_base(
    path: str,
    dtype: DType,
    device: torch.device,
    gradient_checkpointing: bool,
    *,
    trust_remote_code: bool = False,
    override_config: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model at `path`, frozen, on `device`. Raises `UserError` if it is not there or of a kind the engine cannot run."""
    check_quantization(quantization, device, installed=importlib.util.find_spec("bitsandbytes") is not None)
    transformers_logging.disable_progress_bar()
    config = load_model_config(path, trust_remote_code, override_config or {})
    _check_supported(path, config)
    base_dtype = resolve_dtype(dtype, device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=base_dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
            quantization_config=quantization_config(quantization, base_dtype),
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise not_found(path, error) from error
    except (RuntimeError, KeyError, TypeError) as error:  # shapes, and values that only the model's own code looks at
        raise _does_not_fit(path, override_config or {}, error) from error
    model, report = loaded
    if report["missing_keys"]:
        raise _does_not_fit(path, override_config or {}, f"{sorted(report['missing_keys'])[0]} is not in the files")
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_quantization(quantization: Quantization | None, device: torch.device, installed: bool) -> None:
    """Raise `UserError` where the quantised base cannot be trained on; on a CPU bitsandbytes' kernels carry no gradients.

    `installed`: whether bitsandbytes is.
    """
    key = "actor_rollout_ref.model.quantization"
    if quantization is None:
        return
    if device.type != "cuda":
        raise UserError(f"{key}: given {quantization} on {device.type}, expected a GPU; mend it with {key}=null")
    if not installed:
        raise UserError(
            f"{key}: given {quantization} without bitsandbytes; mend it with pip install 'agentlightning[quantization]', or "
            f"{key}=null"
        )


def quantization_config(quantization: Quantization | None, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """QLoRA's base (Dettmers et al., 2023: arXiv 2305.14314): NF4 whose constants are quantised too, multiplied in
    `compute_dtype`."""
    if quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_model_config(path: str, trust_remote_code: bool, override: Mapping[str, Any]) -> PreTrainedConfig:
    """The model's own configuration with `override` in it; values that are sections are merged key by key.

    What transformers keeps in `rope_parameters` may be named alone, as it was in older files: `{rope_theta: 1e6}`.
    Raises `UserError` for a name that the configuration does not have.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_found(path, error) from error
    if not override:
        return config
    known = config.to_dict()
    try:
        return type(config).from_dict(_merged(known, _in_their_places(override, known)))
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{_OVERRIDE}: given {dict(override)}: {reason}; mend it with a value that the model's configuration takes"
        ) from error


def _in_their_places(override: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    rope = known.get("rope_parameters") or {}
    placed: dict[str, Any] = {}
    for key, value in override.items():
        if key in _DECIDED_ELSEWHERE:
            raise UserError(f"{_OVERRIDE}.{key}: given {value!r}, expected no such key; say {_DECIDED_ELSEWHERE[key]} instead")
        if key in known:
            placed = _merged(placed, {key: value})
        elif key in rope:
            placed = _merged(placed, {"rope_parameters": {key: value}})
        else:
            nearest = difflib.get_close_matches(key, [*known, *rope], n=1, cutoff=0.0)[0]
            raise UserError(
                f"{_OVERRIDE}.{key}: given {value!r}, expected a key of the model's own configuration; did you mean {nearest}? "
                f"mend it with +{_OVERRIDE}.{nearest}={value} in its place"
            )
    return placed


def _merged(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in other.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(before, value)
        else:
            merged[key] = list(value) if isinstance(value, tuple) else value
    return merged


def _does_not_fit(path: str, override: Mapping[str, Any], reason: object) -> UserError:
    blame = f"mend it with other {_OVERRIDE} (given {dict(override)})" if override else "expected files that are whole"
    return UserError(f"the weights at {path!r} are not those of its configuration: {reason}; {blame}")


def output_head(model: PreTrainedModel) -> nn.Module:
    """What turns hidden states into logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head


def shallow_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second set of modules over the same parameters, so that adapters put into one leave the other plain."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _check_supported(path: str, config: PreTrainedConfig) -> None:
    settings = config.to_dict()
    kinds = set(settings.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"the model at {path!r} has layers of kind {sorted(kinds)}; the rollout runs full attention only: choose another "
            "actor_rollout_ref.model.path (Qwen2.5, Qwen3, Llama 3 and the like)"
        )
    for name, neutral in _LOGIT_TRANSFORMS.items():
        if settings.get(name, neutral) not in (neutral, None):
            raise UserError(
                f"the model at {path!r} changes its logits after the output head ({name}={settings[name]}), which the training "
                "pass does not know: choose another actor_rollout_ref.model.path"
            )
