"""The words of a custom loop: what goes into a `TrainingClient` or `SamplingClient`, and what its futures give.

Names, fields and defaults are those of the `tinker` SDK's types, so that a loop written for it runs on ours by changing an
import. Plain dataclasses over numpy: importing this needs neither torch nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["int64", "float32"]
StopReason = Literal["stop", "length"]
_NUMPY: Mapping[str, type[np.generic]] = {"int64": np.int64, "float32": np.float32}


@dataclass(frozen=True, slots=True)
class EncodedTextChunk:
    """Token ids."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What a model reads, in chunks. Example: `ModelInput.from_ints([258, 20, 21])`."""

    chunks: Sequence[EncodedTextChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """One chunk of token ids."""
        return cls([EncodedTextChunk(list(tokens))])

    @classmethod
    def empty(cls) -> ModelInput:
        """No chunk."""
        return cls([])

    @property
    def length(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.length for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """The token ids of all chunks."""
        return [int(token) for chunk in self.chunks for token in chunk.tokens]

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """Another one with `chunk` behind."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """Another one with `token` behind."""
        return self.append(EncodedTextChunk([token]))


@dataclass(frozen=True, eq=False)
class TensorData:
    """A tensor, int64 or float32: dense and of any shape, or a matrix of which some cells are listed, row by row (CSR)."""

    array: np.ndarray  # of a sparse one the listed values, flat
    shape: list[int]  # as torch's
    sparse_crow_indices: list[int] | None  # where each row's values begin, and their count
    sparse_col_indices: list[int] | None  # the column of each value

    def __init__(
        self,
        data: Sequence[int] | Sequence[float] | np.ndarray,
        dtype: TensorDtype,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        """ValueError if `dtype` is another one, `data` does not fill `shape`, or the indices of a sparse one do not fit it."""
        if dtype not in _NUMPY:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(_NUMPY)}")
        array = np.asarray(data, dtype=_NUMPY[dtype])
        if sparse_crow_indices is None and sparse_col_indices is None:
            array = array if shape is None else array.reshape(tuple(shape))
            rows = columns = None
        else:
            rows, columns = _csr_indices(array, shape, sparse_crow_indices, sparse_col_indices)
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "shape", list(array.shape if shape is None or rows is None else shape))
        object.__setattr__(self, "sparse_crow_indices", rows)
        object.__setattr__(self, "sparse_col_indices", columns)

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """Floats become float32, integers int64."""
        return cls(array, "float32" if array.dtype.kind == "f" else "int64")

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Floats become float32, integers int64."""
        return cls.from_numpy(tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.detach().numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """A matrix without its cells that are `pad_value`, if that makes it smaller; anything else dense."""
        dense = cls.from_torch(tensor)
        if dense.array.ndim != 2:
            return dense
        row, column = np.nonzero(dense.array != pad_value)
        begin = np.searchsorted(row, np.arange(len(dense.array) + 1))
        if begin.size + 2 * row.size >= dense.array.size:
            return dense
        return cls(dense.array[row, column], dense.dtype, dense.shape, begin.tolist(), column.tolist())

    @property
    def dtype(self) -> TensorDtype:
        """`int64` or `float32`."""
        return "float32" if self.array.dtype == np.float32 else "int64"

    @property
    def data(self) -> list[Any]:
        """All values, flat; of a sparse one those that are listed."""
        return self.array.ravel().tolist()

    def to_numpy(self, pad_value: int = 0) -> np.ndarray:
        """The array itself; a sparse one made dense, with `pad_value` in the cells that are not listed."""
        if self.sparse_crow_indices is None:
            return self.array
        dense = np.full(self.shape, pad_value, self.array.dtype)
        dense[np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices)), self.sparse_col_indices] = self.array
        return dense

    def to_torch(self, pad_value: int = 0) -> torch.Tensor:
        """`to_numpy` as a tensor; a copy."""
        import torch

        return torch.tensor(self.to_numpy(pad_value))

    def tolist(self, pad_value: int = 0) -> list[Any]:
        """`to_numpy` as lists, nested as `shape` says."""
        return self.to_numpy(pad_value).tolist()


def _csr_indices(
    values: np.ndarray, shape: Sequence[int] | None, rows: Sequence[int] | None, columns: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """The indices of a sparse matrix, checked: each cell at most once, in order."""
    if shape is None or len(shape) != 2 or min(shape) < 0 or rows is None or columns is None or values.ndim != 1:
        raise ValueError(
            f"a sparse tensor of shape {shape}; expected flat data, a shape of two numbers, sparse_crow_indices and "
            "sparse_col_indices"
        )
    begin, column = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    fits = begin.shape == (shape[0] + 1,) and column.shape == values.shape and begin[0] == 0 and begin[-1] == values.size
    if not fits or (np.diff(begin) < 0).any() or ((column < 0) | (column >= shape[1])).any():
        raise ValueError(f"sparse indices that do not fit {values.size} values in the shape {list(shape)}; expected CSR's")
    row = np.repeat(np.arange(shape[0]), np.diff(begin))
    if ((np.diff(row) == 0) & (np.diff(column) <= 0)).any():
        raise ValueError("sparse_col_indices that do not rise within a row; expected each column once, in order")
    return begin.tolist(), column.tolist()


@dataclass(frozen=True)
class Datum:
    """One sequence to train on.

    `loss_fn_inputs` holds one value a position of `model_input` by name; inputs are shifted already: `target_tokens[i]` is what
    position i predicts. cross_entropy: `target_tokens`, `weights` (optional: ones). The policy losses: `target_tokens`,
    `logprobs` (of the sampler), `advantages`. Lists, numpy arrays and torch tensors become `TensorData`.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_fn_inputs", {name: _tensor(name, value) for name, value in self.loss_fn_inputs.items()})


def _tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if not isinstance(value, list | tuple | np.ndarray):
        return TensorData.from_torch(value)
    dtype = "int64" if name == "target_tokens" else "float32"
    return TensorData(np.asarray(value), dtype)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapter of a new model. `seed` draws its weights; None: 0."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True, slots=True)
class AdamParams:
    """One step of AdamW with decoupled weight decay. `grad_clip_norm=0`: no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a completion is drawn. `max_tokens=None`: up to the model's context.

    `stop`: strings or token ids that end it; None is the end-of-turn token alone, an empty list nothing but `max_tokens`.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One completion: its tokens, and the log-probability of each under the sampler at the sampling temperature.

    `topk_logprobs[i]` are the likeliest tokens at position i, the likeliest first, in the same distribution.
    """

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float] | None = None
    topk_logprobs: list[list[tuple[int, float]] | None] | None = None


@dataclass(frozen=True, slots=True)
class PromptAltTokens:
    """Draws that could have stood in a prompt's place. Both tensors: [len(prompt) - 1, k]; row i is of prompt token i + 1."""

    tokens: TensorData  # int64, drawn at the request's temperature, with replacement
    logprobs: TensorData  # float32, the model's own, like prompt_logprobs


@dataclass(frozen=True, slots=True)
class SampleResponse:
    """`num_samples` completions of one prompt; `prompt_logprobs[i]` is that of prompt token i given those before, [0] None.

    `target_prompt_logprobs` has the layout of what the request named: [i, j] is of id [i, j] at prompt position i + 1.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    type: Literal["sample"] = "sample"


@dataclass(frozen=True, slots=True)
class ForwardBackwardOutput:
    """Per datum what the loss gives (`logprobs` float32 [positions]), and sums over all data as `<name>:sum` metrics."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class OptimStepResponse:
    """Metrics of one optimizer step."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class SaveWeightsResponse:
    """Where a resumable state lies."""

    path: str
    type: Literal["save_weights"] = "save_weights"


@dataclass(frozen=True, slots=True)
class SaveWeightsForSamplerResponse:
    """Where weights to sample from lie."""

    path: str | None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


@dataclass(frozen=True, slots=True)
class LoadWeightsResponse:
    """What was loaded."""

    path: str | None = None
    type: Literal["load_weights"] = "load_weights"


@dataclass(frozen=True, slots=True)
class ModelData:
    """The base of a model. `tokenizer_id` is a hub name or a directory."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True, slots=True)
class GetInfoResponse:
    """What a training client says of its model."""

    model_id: str
    model_data: ModelData
    is_lora: bool = True
    lora_rank: int | None = None
    model_name: str | None = None
    type: Literal["get_info"] = "get_info"
