"""The frozen base: a path goes in, a model that nothing will ever write to comes out.

Checks here what the rest of the engine stands on: full attention in every layer (the row cache masks by position) and an output
head that is a plain matrix product (log-probabilities are computed chunk by chunk from the hidden states).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from agentlightning.errors import UserError
from agentlightning.models.chat import not_found
from agentlightning.types import DType

# Settings of other families that change the logits after the output head.
_LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def resolve_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def load_base(path: str, dtype: DType, device: torch.device, gradient_checkpointing: bool) -> PreTrainedModel:
    """The model at `path`, frozen, on `device`. Raises `UserError` if it is not there or of a kind the engine cannot run."""
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=resolve_dtype(dtype, device), attn_implementation="sdpa", use_safetensors=True, device_map={"": device}
        )
    except (OSError, ValueError) as error:
        raise not_found(path, error) from error
    _check_supported(path, model.config)
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


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
