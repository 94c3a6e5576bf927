"""Whether the shapes of a run fit into memory, before the base is loaded and before the first step.

Enters: the sizes of the base and the worker's settings. Leaves: bytes by what they are for, and where they are too many an
error that names the override which helps most. The estimate counts the large tensors of this package's own passes on decoders
of the Llama and Qwen kind (the tests compare it with what autograd keeps); it is rough, so a little too much only warns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentlightning.errors import UserError
from agentlightning.types import MicroBatches
from agentlightning.workers.settings import WorkerSettings

_SURELY_TOO_MUCH = 1.25  # times the memory there is
_LOGITS_AT_ONCE = 1 << 25  # elements: see `models.logprobs`
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Of a decoder, in the words of its config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of each matrix of a layer."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, wide = self.hidden_size, self.intermediate_size
        attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        return [*attention, (hidden, wide), (hidden, wide), (wide, hidden)]

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of all layers."""
        return self.num_hidden_layers * sum(width * height for width, height in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding and the output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one worker. The larger of rollout and update comes on top of what is always there."""

    base: int
    merged_copy: int
    adapters: int  # weights, gradients, moments and shards' sums
    kv_cache: int
    rollout_logits: int
    activations: int
    update_logits: int

    @property
    def always(self) -> int:
        """What no phase can give back."""
        return self.base + self.merged_copy + self.adapters

    @property
    def peak(self) -> int:
        """The most at a time."""
        return self.always + max(self.kv_cache + self.rollout_logits, self.activations + self.update_logits)


def estimate_memory(
    sizes: ModelSizes, settings: WorkerSettings, dtype: torch.dtype, longest: int, merged: bool
) -> MemoryEstimate:
    """For samples of up to `longest` tokens, prompt and response. `merged`: the rollout decodes on a merged copy."""
    width = dtype.itemsize
    base_width = 0.55 if settings.quantization == "4bit" else width
    ranks = settings.lora.rank + (settings.critic.lora.rank if settings.critic and settings.critic.kind == "adapter" else 0)
    lora_parameters = sizes.num_hidden_layers * ranks * sum(sum(pair) for pair in sizes.linears)
    sums = (settings.logical_shards or 1).bit_length()
    tokens = _tokens_at_once(settings.actor.micro_batch, longest)
    sequences = settings.rollout.max_num_seqs
    keys = 2 * sizes.num_key_value_heads * sizes.head_dim * sizes.num_hidden_layers
    return MemoryEstimate(
        base=int(sizes.layer_parameters * base_width) + sizes.embedding_parameters * width,
        merged_copy=sizes.layer_parameters * width if merged else 0,
        adapters=lora_parameters * 4 * (4 + sums),
        kv_cache=int(1.5 * sequences * longest * keys * width),  # the cache grows by half of itself
        rollout_logits=sequences * sizes.vocab_size * (width + 4 + 4 + 8 + 8),
        activations=_activations(sizes, tokens, width, settings.gradient_checkpointing),
        update_logits=4 * min(_LOGITS_AT_ONCE, tokens * sizes.vocab_size) * 4,
    )


def _tokens_at_once(micro: MicroBatches, longest: int) -> int:
    rows = micro.max_rows * longest
    return rows if micro.max_tokens is None else max(micro.max_tokens, longest)


def _activations(sizes: ModelSizes, tokens: int, width: int, checkpointing: bool) -> int:
    """What autograd keeps of `tokens` tokens: of each layer; with checkpointing of one layer, and the inputs of the others."""
    queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    # Norms in float32 and their results; queries, keys and values before and after the rotation, the output; gate, up, product.
    of_layer = 4 * (2 * hidden + queries + keys) + width * (4 * hidden + 4 * queries + 5 * keys + 4 * wide)
    if width < 4:  # each adapter keeps its input in float32
        of_layer += 4 * sum(pair[0] for pair in sizes.linears)
    layers = sizes.num_hidden_layers
    return tokens * (of_layer + layers * hidden * width if checkpointing else layers * of_layer)


def check_memory(estimate: MemoryEstimate, available: int, settings: WorkerSettings) -> str | None:
    """A warning where it will be tight, None where there is room. Raises `UserError` where it cannot fit.

    `available`: bytes of the device, or on a CPU what the host has free.
    """
    if estimate.peak <= available:
        return None
    message = (
        f"a step needs about {estimate.peak / _GIB:.1f} GiB on a worker and there are {available / _GIB:.1f}: base "
        f"{(estimate.base + estimate.merged_copy) / _GIB:.1f}, adapters {estimate.adapters / _GIB:.1f}, rollout "
        f"{(estimate.kv_cache + estimate.rollout_logits) / _GIB:.1f}, activations "
        f"{(estimate.activations + estimate.update_logits) / _GIB:.1f}; mend it with {_what_helps(estimate, settings)}"
    )
    if estimate.peak > _SURELY_TOO_MUCH * available:
        raise UserError(message)
    return message


def _what_helps(estimate: MemoryEstimate, settings: WorkerSettings) -> str:
    """The override that takes most from the largest part."""
    actor = settings.actor.micro_batch
    phases = max(estimate.kv_cache + estimate.rollout_logits, estimate.activations + estimate.update_logits)
    if estimate.always > phases:
        if estimate.merged_copy:
            return "actor_rollout_ref.rollout.merge_lora=false"
        return "a smaller actor_rollout_ref.model.path, or actor_rollout_ref.model.quantization=4bit"
    if estimate.kv_cache + estimate.rollout_logits == phases:
        return f"actor_rollout_ref.rollout.max_num_seqs={max(1, settings.rollout.max_num_seqs // 2)}"
    if not settings.gradient_checkpointing:
        return "actor_rollout_ref.model.enable_gradient_checkpointing=true"
    if actor.max_tokens is not None:
        return f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={max(1, actor.max_tokens // 2)}"
    return f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={max(1, actor.max_rows // 2)}"


def model_sizes(config: dict[str, object]) -> ModelSizes | None:
    """From a model's configuration as a dictionary; None where it is of another kind, for which there is no estimate."""
    names = [name for name in ModelSizes.__slots__ if name not in ("head_dim", "tie_word_embeddings")]
    numbers = {name: value for name in names if isinstance(value := config.get(name), int)}
    if len(numbers) < len(names):
        return None
    head_dim = config.get("head_dim")
    return ModelSizes(
        **numbers,
        head_dim=head_dim if isinstance(head_dim, int) else numbers["hidden_size"] // numbers["num_attention_heads"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def available_memory(device: torch.device) -> int:
    """Bytes: of the GPU in all, or what the host can give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import psutil

    return psutil.virtual_memory().available
