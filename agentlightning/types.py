"""The objects that flow from room to room: prompts go in, completions come out, a batch is trained on.

Letters in names are dimensions: B samples, P prompt tokens (padded), T response tokens (padded). Everything is numpy, so that
it crosses processes without copies and no room needs torch to hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

StopReason = Literal["stop", "length", "turns"]
DType = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["4bit"]


# What an adapter may hold that is not trained here, and the value that says it holds none of it.
_UNTRAINED: Mapping[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
}
_LEAVES_THE_BASE_ALONE = (True, False, "gaussian", "eva", "orthogonal")  # of PEFT's init_lora_weights


@dataclass(frozen=True, slots=True)
class LoraShape:
    """An adapter in PEFT's words. The modules are a list of names or a regular expression; "all-linear" is every linear one."""

    rank: int
    alpha: float
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    use_rslora: bool = False  # scaled by alpha / sqrt(rank) (Kalajdzievski, 2023: arXiv 2312.03732)
    use_dora: bool = False  # a trained magnitude for each output (Liu et al., 2024: arXiv 2402.09353)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoraShape:
        """The shape in an adapter_config.json. ValueError, in words, where it is not one that can be trained here."""
        if config.get("peft_type") != "LORA":
            raise ValueError(f"it is of PEFT's kind {config.get('peft_type')!r}; expected LORA")
        for key, none in _UNTRAINED.items():
            if config.get(key, none) not in (none, None):
                raise ValueError(f"it has {key}={config[key]!r}, which is not trained here; expected an adapter without")
        if config.get("init_lora_weights", True) not in _LEAVES_THE_BASE_ALONE:
            raise ValueError(
                f"it was made with init_lora_weights={config['init_lora_weights']!r}, which changes the base; expected one "
                "that PEFT's save_pretrained has converted to plain LoRA (path_initial_model_for_weight_conversion)"
            )
        return cls(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            target_modules=_names(config["target_modules"]) or "all-linear",
            exclude_modules=_names(config.get("exclude_modules")),
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
        )


def _names(modules: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return modules if modules is None or isinstance(modules, str) else tuple(sorted(modules))


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """How many samples, or with `max_tokens` how many padded tokens, go through the model at once."""

    max_rows: int
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data file, ready to be sampled from.

    Example: `Prompt(uid="train.jsonl:17", messages=({"role": "user", "content": "2+2?"},), token_ids=(256, 50), ...)`.
    """

    uid: str  # names the row for ever: the random stream of its samples hangs on it
    messages: tuple[Mapping[str, str], ...]
    token_ids: tuple[int, ...]  # the chat template applied, with the generation prompt
    data_source: str
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. `temperature=0` is greedy; `top_k=-1` and `top_p=1` switch the filters off (verl's words)."""

    n: int = 1
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    max_tokens: int = 256  # response tokens in all, observations included
    stop: tuple[str, ...] = ()
    max_assistant_turns: int = 1
    max_tokens_per_turn: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer: every token after the prompt, the policy's own and the observations between its turns."""

    uid: str
    sample_index: int  # 0 <= sample_index < n
    token_ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # bool [T]; True where the policy chose the token
    logprobs: np.ndarray  # float32 [T]; of the chosen tokens at the sampling temperature, 0 where mask is False
    turns: tuple[Mapping[str, str], ...]  # the messages after the prompt: assistant, tool, assistant, ...
    stop_reason: StopReason
    adapter_version: int
    from_journal: bool = False  # finished before the run was killed, and not sampled again

    @property
    def num_turns(self) -> int:
        """Assistant turns taken."""
        return sum(turn["role"] == "assistant" for turn in self.turns)

    @property
    def answer(self) -> str:
        """Text of the last assistant turn."""
        return self.turns[-1]["content"] if self.turns and self.turns[-1]["role"] == "assistant" else ""


@dataclass(frozen=True, slots=True)
class JournalSpec:
    """Where the finished samples of one step are kept, and which of them are used again.

    `reuse="whole"`: only if all that a worker is asked for is there. Then a resumed run has the bits of one that was never
    stopped. `reuse="each"`: whatever is there; the rest is decoded in other batches, and its log-probabilities may differ in
    their last bits.
    """

    directory: str
    reuse: Literal["whole", "each"]


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples, padded on the right, with as many per-token columns as the step has computed so far.

    `columns` maps a name (`rollout_log_probs`, `old_log_probs`, `ref_log_prob`, `values`, `token_level_rewards`,
    `advantages`, `returns`: verl's) to float32 [B, T].
    """

    uids: tuple[str, ...]  # [B]; samples of one prompt share their uid
    prompt_BP: np.ndarray  # int32
    prompt_len_B: np.ndarray  # int32
    response_BT: np.ndarray  # int32
    response_len_B: np.ndarray  # int32; observations included
    mask_BT: np.ndarray  # bool; True where the policy chose the token, and is trained on it
    adapter_version: int
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def total_len_B(self) -> np.ndarray:
        """Tokens of each sample, prompt and response."""
        return self.prompt_len_B + self.response_len_B

    def with_columns(self, **columns: np.ndarray) -> Batch:
        """The same samples with further columns, each [B, T]."""
        for name, column in columns.items():
            if column.shape != self.response_BT.shape:
                raise ValueError(f"column {name!r} has shape {column.shape}, expected {self.response_BT.shape}")
        return replace(self, columns={**self.columns, **columns})

    def rows(self, index: Sequence[int] | np.ndarray) -> Batch:
        """The samples at `index`, in that order, padding trimmed to the longest of them."""
        rows = np.asarray(index, dtype=np.int64)
        width_p = int(self.prompt_len_B[rows].max(initial=0))
        width_t = int(self.response_len_B[rows].max(initial=0))
        return Batch(
            uids=tuple(self.uids[i] for i in rows),
            prompt_BP=self.prompt_BP[rows, :width_p],
            prompt_len_B=self.prompt_len_B[rows],
            response_BT=self.response_BT[rows, :width_t],
            response_len_B=self.response_len_B[rows],
            mask_BT=self.mask_BT[rows, :width_t],
            adapter_version=self.adapter_version,
            columns={name: column[rows, :width_t] for name, column in self.columns.items()},
        )
