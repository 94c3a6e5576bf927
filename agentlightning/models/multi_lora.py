"""Many LoRA adapters over one frozen base, none of them part of it: weights are handed to the layers before each pass.

Enters: a base, whose linear layers are wrapped in place. Leaves: passes through one adapter (training), through another one for
each row (sampling for several models at once), or through the base alone. Why not PEFT's own multi-adapter model: there an
adapter is modules inside the base, so that taking one in or out rebuilds hundreds of them, and its mixed batches run once an
adapter. The arithmetic of one adapter is PEFT's, operation by operation; names and files are PEFT's too.

Letters: R rows of the batch, K adapters, G rows of the largest of K groups, Q tokens a row, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from agentlightning.errors import UserError
from agentlightning.models.base import output_head

_PREFIX = "base_model.model."
_LOOP_BEYOND = 4  # padding groups to one size may at most cost this factor


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights by the names that PEFT saves them by: `base_model.model.<path>.lora_A.weight` [r, I], `lora_B` [O, r]."""

    weights: Mapping[str, torch.Tensor]
    scale: float  # alpha / r

    def pair(self, path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B of one layer; None where the adapter does not touch it."""
        if f"{_PREFIX}{path}.lora_A.weight" not in self.weights:
            return None
        return self.weights[f"{_PREFIX}{path}.lora_A.weight"], self.weights[f"{_PREFIX}{path}.lora_B.weight"]


@dataclass(frozen=True, slots=True)
class _One:
    """The same adapter for all rows. Gradients flow to its weights."""

    a_rI: torch.Tensor
    b_Or: torch.Tensor
    scale: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x.to(self.a_rI.dtype), self.a_rI), self.b_Or) * self.scale


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Which rows of a batch are of which adapter, laid out so that one batched product serves all."""

    groups: tuple[torch.Tensor, ...]  # K times the rows of one adapter, perhaps none
    row_KG: torch.Tensor  # the same, padded with row 0
    place_R: torch.Tensor  # where in K * G each row is

    @classmethod
    def of(cls, adapters: Sequence[int], count: int, device: torch.device) -> RowGroups:
        """`adapters`: that of each row, among `count`. Laid out on the host, so that a GPU is not waited for."""
        adapter_R = np.array(adapters, dtype=np.int64)
        groups = [np.flatnonzero(adapter_R == k) for k in range(count)]
        width = max(len(group) for group in groups)
        row_KG = np.zeros((count, width), dtype=np.int64)
        place_R = np.zeros_like(adapter_R)
        for k, group in enumerate(groups):
            row_KG[k, : len(group)] = group
            place_R[group] = k * width + np.arange(len(group))
        on_device = [torch.from_numpy(array).to(device) for array in (*groups, row_KG, place_R)]
        return cls(tuple(on_device[:-2]), on_device[-2], on_device[-1])


@dataclass(frozen=True, slots=True)
class _PerRow:
    """Another adapter for each row."""

    a_KIr: torch.Tensor
    b_KrO: torch.Tensor
    rows: RowGroups

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.rows
        x_RQI = x.to(self.a_KIr.dtype).reshape(len(x), -1, x.shape[-1])
        if rows.row_KG.numel() > _LOOP_BEYOND * len(x):
            out_RQO = x_RQI.new_zeros(*x_RQI.shape[:2], self.b_KrO.shape[-1])
            for k, group in enumerate(rows.groups):
                if len(group):
                    out_RQO[group] = x_RQI[group] @ self.a_KIr[k] @ self.b_KrO[k]
        else:
            K, G = rows.row_KG.shape
            x_KNI = x_RQI[rows.row_KG].reshape(K, -1, x.shape[-1])
            out_KNO = torch.bmm(torch.bmm(x_KNI, self.a_KIr), self.b_KrO)
            out_RQO = out_KNO.reshape(K * G, -1, out_KNO.shape[-1])[rows.place_R]
        return out_RQO.reshape(*x.shape[:-1], out_RQO.shape[-1])


class LoraLinear(nn.Module):
    """A linear layer of the base, and what the adapters of the present pass add to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta: _One | _PerRow | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base's output, in its type, with the adapter's added in float32."""
        y = self.base(x)
        return y if self.delta is None else (y + self.delta(x)).to(y.dtype)


class AdapterStack:
    """K adapters side by side on the device, padded to the largest rank; the scale is in B, which is exact for powers of 2."""

    def __init__(self, lora: MultiLora, adapters: Sequence[Adapter]) -> None:
        self.size = len(adapters)
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for path, layer in lora.layers.items():
            pairs = [adapter.pair(path) for adapter in adapters]
            rank = max((len(pair[0]) for pair in pairs if pair is not None), default=0)
            if not rank:
                continue
            a_KIr = layer.weight.new_zeros(self.size, layer.base.in_features, rank, dtype=torch.float32)
            b_KrO = layer.weight.new_zeros(self.size, rank, layer.base.out_features, dtype=torch.float32)
            for k, (adapter, pair) in enumerate(zip(adapters, pairs, strict=True)):
                if pair is not None:
                    a_KIr[k, :, : len(pair[0])] = pair[0].detach().T
                    b_KrO[k, : len(pair[0])] = pair[1].detach().T * adapter.scale
            self.pairs[path] = (a_KIr, b_KrO)


class MultiLora:
    """The base with its linear layers wrapped. One pass at a time: `use`, `use_rows` or `off`, and then the forward pass."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        head = output_head(base)
        found = [(path, module) for path, module in base.named_modules() if isinstance(module, nn.Linear)]
        self.head_path = next((path for path, module in found if module is head), None)
        self.layers: dict[str, LoraLinear] = {}
        for path, module in found:
            parent, _, name = path.rpartition(".")
            self.layers[path] = LoraLinear(module)
            setattr(base.get_submodule(parent), name, self.layers[path])

    def off(self) -> None:
        """The base alone."""
        for layer in self.layers.values():
            layer.delta = None

    def use(self, adapter: Adapter) -> None:
        """One adapter for all rows; its weights are on the base's device."""
        for path, layer in self.layers.items():
            pair = adapter.pair(path)
            layer.delta = _One(*pair, adapter.scale) if pair is not None else None

    def use_rows(self, stack: AdapterStack, rows: RowGroups) -> None:
        """The adapter of each row of the next pass, among those of `stack`."""
        for path, layer in self.layers.items():
            layer.delta = _PerRow(*stack.pairs[path], rows) if path in stack.pairs else None

    def targets(self, attn: bool, mlp: bool, unembed: bool) -> tuple[str, ...]:
        """Paths of the layers of these kinds: under a module called attention, elsewhere in the decoder, the output head.

        The head may be tied to the embeddings: its adapter changes the logits alone. Linear layers only: experts that a
        model keeps in one tensor stay as they are. Raises `UserError` if nothing is left.
        """
        chosen = []
        for path in self.layers:
            is_attention = "attn" in path or "attention" in path
            wanted = unembed if path == self.head_path else attn if is_attention else mlp
            chosen += [path] if wanted else []
        if not chosen:
            raise UserError(
                f"no layer to train: given train_attn={attn}, train_mlp={mlp}, train_unembed={unembed}; expected one of them "
                "true and the base to have linear layers of its kind"
            )
        return tuple(chosen)

    def new_weights(self, paths: Sequence[str], rank: int, seed: int) -> dict[str, torch.Tensor]:
        """PEFT's start: A from Kaiming's uniform distribution, B zero, float32. The same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        weights: dict[str, torch.Tensor] = {}
        for path in paths:
            layer = self.layers[path].base
            a_rI = torch.empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(a_rI, a=math.sqrt(5), generator=generator)
            weights[f"{_PREFIX}{path}.lora_A.weight"] = a_rI
            weights[f"{_PREFIX}{path}.lora_B.weight"] = torch.zeros(layer.out_features, rank)
        return {name: weight.to(self.base.device) for name, weight in weights.items()}

    def check_weights(self, weights: Mapping[str, torch.Tensor], what: str) -> None:
        """Raise `UserError` unless `weights` are pairs of float32 for layers of this base, and finite."""
        names = {f"{_PREFIX}{path}.lora_{letter}.weight" for path in self.layers for letter in "AB"}
        odd = sorted(weights.keys() - names)
        if odd or not weights:
            raise UserError(f"{what} holds {odd[0] if odd else 'no weights'}; expected LoRA pairs of the base's linear layers")
        adapter = Adapter(weights, 1.0)
        for path, layer in self.layers.items():
            here = [f"{_PREFIX}{path}.lora_{letter}.weight" in weights for letter in "AB"]
            if here == [False, False]:
                continue
            if not all(here):
                raise UserError(f"{what} holds half a pair for {path}; expected lora_A and lora_B")
            pair = adapter.pair(path)
            assert pair is not None
            expected = [(len(pair[0]), layer.base.in_features), (layer.base.out_features, len(pair[0]))]
            if [tuple(weight.shape) for weight in pair] != expected:
                given = [tuple(weight.shape) for weight in pair]
                raise UserError(f"{what} does not fit the base: {path} has shapes {given} there, expected {expected}")
            if not all(bool(weight.isfinite().all()) for weight in pair):
                raise UserError(f"{what} holds NaN or inf in {path}; expected finite weights")

    def peft_config(self, paths: Sequence[str], rank: int, alpha: float, base_name: str) -> dict[str, Any]:
        """What PEFT writes into `adapter_config.json` for an adapter of these layers."""
        leaves = sorted({path.rpartition(".")[2] for path in paths})
        reached = {path for path in self.layers if path.rpartition(".")[2] in leaves}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftLoraConfig(
                r=rank,
                lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - PEFT only divides by the rank
                target_modules=leaves if reached == set(paths) else sorted(paths),
                lora_dropout=0.0,
                task_type="CAUSAL_LM",  # pyright: ignore[reportArgumentType] - an enum of strings
                base_model_name_or_path=base_name,
                inference_mode=True,
            ).to_dict()
        return json.loads(json.dumps(config, default=_plain))


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
