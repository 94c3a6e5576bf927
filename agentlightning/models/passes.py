"""The training pass: rows of a batch go in; the hidden states before their trained tokens come out, a micro-batch at a time.

A prompt is run once for all its samples: its keys and values are kept, and the responses, sorted by length, attend to them.
With eight samples a prompt that is half of the work or less. Gradients are exact: what the responses' losses leave on the
keys and values is carried back through the prompts at the end. Where gradient checkpointing is on, which cannot keep keys and
values, whole rows are run instead.

Where the base is sharded over several workers, a pass is something that all of them do together: who has no rows left runs a
stand-in for as long as another one has some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from agentlightning.types import Batch, MicroBatches

_PASS_SHARE = 8  # a pass without any token costs about as much as this part of the tokens that fit into a full one
_PROMPTS_SHARE = 1  # prompts that are run apart have their responses run apart too: as few passes as can be


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch that has been run. N counts its trained tokens, in row order.

    `x_BT[row_N, column_N] = x_N` puts a result back into the micro-batch, `rows` says which rows of the batch those are.
    """

    rows: np.ndarray
    micro: Batch
    row_N: torch.Tensor
    column_N: torch.Tensor
    target_N: torch.Tensor  # the tokens themselves
    hidden_NH: torch.Tensor  # the last hidden state before each

    def scatter(self, x_N: torch.Tensor) -> torch.Tensor:
        """Per-token values at their places [B, T], zero elsewhere; gradients flow."""
        return x_N.new_zeros(self.micro.mask_BT.shape).index_put((self.row_N, self.column_N), x_N)


def training_passes(
    model: PreTrainedModel,
    batch: Batch,
    rows: np.ndarray,
    sizes: MicroBatches,
    any_worker: Callable[[bool], bool] | None = None,
) -> Iterator[Pass]:
    """Run `rows` of `batch`. Where gradients are on, call `backward` on each pass's loss before asking for the next one.

    The largest pass comes first, so that memory runs out at once or never. `any_worker` is given where the base is sharded:
    whether something is true on any of the workers. A stand-in's pass has no rows; its loss must be carried back too.
    """
    together = any_worker is not None
    any_worker = any_worker or bool
    if model.training:  # only where activations are checkpointed: see `Adapters.use`
        for part in _in_step(micro_batches(batch.total_len_B[rows], sizes), any_worker):
            yield _whole_rows(model, batch, rows[part]) if part is not None else _stand_in(model, batch)
        return
    first_row = {batch.uids[row]: row for row in reversed(rows.tolist())}
    unique_U = np.array(list(first_row.values()), dtype=np.int64)
    for prompt_rows_U in _in_step(micro_batches(batch.prompt_len_B[unique_U], sizes, _PROMPTS_SHARE), any_worker):
        mine_U = unique_U[prompt_rows_U] if prompt_rows_U is not None else unique_U[:0]
        prompts = _Prompts.run(model, batch.rows(mine_U) if len(mine_U) else _one_token(batch))
        place = {batch.uids[row]: place for place, row in enumerate(mine_U)}
        mine = np.array([row for row in rows if batch.uids[row] in place], dtype=np.int64)
        for part in _in_step(micro_batches(batch.response_len_B[mine], sizes), any_worker):
            if part is None:
                states_BTH = _response_states(model, prompts, torch.zeros(1, dtype=torch.long), _one_token(batch), together)
                yield make_pass(mine[:0], batch.rows([]), states_BTH.flatten(0, 1)[:0])
                continue
            micro = batch.rows(mine[part])
            group_B = torch.tensor([place[uid] for uid in micro.uids], device=model.device)
            yield make_pass(mine[part], micro, _trained(_response_states(model, prompts, group_B, micro, together), micro))
        prompts.backward()


def _in_step(parts: Iterable[np.ndarray], any_worker: Callable[[bool], bool]) -> Iterator[np.ndarray | None]:
    """The parts, then None for as long as another worker still has some."""
    mine = iter(parts)
    while True:
        part = next(mine, None)
        if not any_worker(part is not None):
            return
        yield part


def _one_token(batch: Batch) -> Batch:
    """A sample with a prompt and a response of one token each, of which none is trained."""
    one = np.ones(1, dtype=np.int32)
    token = np.zeros((1, 1), dtype=np.int32)
    return Batch(("",), token, one, token, one, np.zeros((1, 1), dtype=np.bool_), batch.adapter_version)


def _stand_in(model: PreTrainedModel, batch: Batch) -> Pass:
    """A pass of the model without rows."""
    hidden_1LH = _decoder_pass(model, torch.zeros(1, 1, dtype=torch.long, device=model.device), None)
    return make_pass(np.empty(0, dtype=np.int64), batch.rows([]), hidden_1LH.flatten(0, 1)[:0])


def micro_batches(length_B: np.ndarray, sizes: MicroBatches, pass_share: int = _PASS_SHARE) -> list[np.ndarray]:
    """Places of each micro-batch, largest first: `max_rows` of them, or as many as fit into `max_tokens` padded tokens.

    Rows of about the same length go together. With `max_tokens` a micro-batch ends early where the padding that this saves is
    worth a further pass, which costs as much as 1 / `pass_share` of `max_tokens`.
    """
    order = np.argsort(-length_B, kind="stable")
    if sizes.max_tokens is None:
        return [order[start : start + sizes.max_rows] for start in range(0, len(order), sizes.max_rows)]
    sorted_B = np.maximum(length_B[order], 1)
    spans = _cheapest_spans(sorted_B, sizes.max_tokens, sizes.max_tokens // pass_share)
    spans.sort(key=lambda span: (span.start - span.stop) * int(sorted_B[span.start]))
    return [order[span.start : span.stop] for span in spans]


def _cheapest_spans(length_B: np.ndarray, max_tokens: int, pass_tokens: int) -> list[range]:
    """Rows of falling lengths cut into micro-batches, so that passes and padded tokens together cost least.

    From the last row to the first: the cheapest way from a row on is its micro-batch and the cheapest way from that one's end.
    """
    rows = len(length_B)
    cost_B = np.zeros(rows + 1, dtype=np.int64)
    end_B = np.arange(1, rows + 1)
    count_B = np.arange(1, rows + 1)
    for start in range(rows - 1, -1, -1):
        longest = int(length_B[start])
        fitting = min(max(1, max_tokens // longest), rows - start)
        cost_of_end = longest * count_B[:fitting] + cost_B[start + 1 : start + fitting + 1]
        best = int(cost_of_end.argmin())
        end_B[start] += best
        cost_B[start] = cost_of_end[best] + pass_tokens
    spans: list[range] = []
    start = 0
    while start < rows:
        spans.append(range(start, int(end_B[start])))
        start = spans[-1].stop
    return spans


@dataclass(frozen=True, slots=True)
class _Prompts:
    """U prompts that have been run: leaves that collect gradients, and the graph behind them."""

    computed: list[torch.Tensor]  # keys and values [U, heads, P, D] of each layer in turn, then the last hidden states [U, H]
    leaves: list[torch.Tensor]
    prompt_len_U: torch.Tensor

    @classmethod
    def run(cls, model: PreTrainedModel, batch: Batch) -> _Prompts:
        input_UP = torch.from_numpy(batch.prompt_BP.astype(np.int64)).to(model.device)
        length_U = torch.from_numpy(batch.prompt_len_B.astype(np.int64)).to(model.device)
        layers = [_Keep() for _ in range(model.config.num_hidden_layers)]
        hidden_UPH = _decoder_pass(model, input_UP, Cache(layers=list(layers)))
        last_UH = hidden_UPH[torch.arange(len(batch), device=model.device), length_U - 1]
        computed = [tensor for layer in layers for tensor in layer.kept] + [last_UH]
        grad = torch.is_grad_enabled() and last_UH.requires_grad
        return cls(computed, [tensor.detach().requires_grad_(grad) for tensor in computed], length_U)

    def backward(self) -> None:
        """Carry what the responses left on the leaves back through the prompts."""
        with_graph = [(c, leaf.grad) for c, leaf in zip(self.computed, self.leaves, strict=True) if leaf.grad is not None]
        # The keys and values of the first layers depend on no adapter where none is before them.
        pairs = [(c, grad) for c, grad in with_graph if c.requires_grad]
        if pairs:
            torch.autograd.backward([c for c, _ in pairs], [grad for _, grad in pairs])


class _Keep(CacheLayerMixin):
    """Keeps the keys and values of the pass."""

    kept: tuple[torch.Tensor, torch.Tensor]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.kept = (key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _Continue(_Keep):
    """Puts the prompts' keys and values, each row its own prompt's, before those of the pass."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, group_B: torch.Tensor) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values, self.group_B = keys, values, group_B

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.cat([_of_rows(self.prompt_keys, self.group_B), key_states], dim=2)
        return keys, torch.cat([_of_rows(self.prompt_values, self.group_B), value_states], dim=2)


def _of_rows(prompts_U: torch.Tensor, group_B: torch.Tensor) -> torch.Tensor:
    """What each row's prompt has. The way back is a sum over a prompt's rows; on CUDA only indexing has a fixed order."""
    return prompts_U[group_B] if prompts_U.is_cuda else prompts_U.index_select(0, group_B)


def _response_states(
    model: PreTrainedModel, prompts: _Prompts, group_B: torch.Tensor, micro: Batch, together: bool
) -> torch.Tensor:
    """Hidden states [B, T, H]: that at t is the one before response token t. `together`: the pass is run in any case."""
    *states, last_UH = prompts.leaves
    group_B = group_B.to(last_UH.device)
    first_B1H = _of_rows(last_UH, group_B)[:, None]
    longest = micro.response_BT.shape[1]
    width = max(longest - 1, 1) if together else longest - 1
    if width == 0:
        return first_B1H
    layers = [_Continue(keys, values, group_B) for keys, values in zip(states[::2], states[1::2], strict=True)]
    prompt_width = states[0].shape[2]
    length_B1 = prompts.prompt_len_U[group_B][:, None]
    column_P, step_T = torch.arange(prompt_width, device=model.device), torch.arange(width, device=model.device)
    in_prompt_BTP = (column_P < length_B1)[:, None].expand(-1, width, -1)
    so_far_BTT = (step_T[None, :] <= step_T[:, None]).expand(len(micro), -1, -1)
    hidden_BTH = _decoder_pass(
        model,
        torch.from_numpy(micro.response_BT[:, :width].astype(np.int64)).to(model.device),
        Cache(layers=list(layers)),
        position_ids=length_B1 + step_T,
        attention_mask=torch.cat([in_prompt_BTP, so_far_BTT], dim=-1)[:, None],
    )
    return torch.cat([first_B1H, hidden_BTH], dim=1)


def _whole_rows(model: PreTrainedModel, batch: Batch, rows: np.ndarray) -> Pass:
    """Prompt and response in one row, padded on the right: the causal mask alone keeps padding out."""
    micro = batch.rows(rows)
    width = int(micro.total_len_B.max())
    input_BL = np.zeros((len(micro), width), dtype=np.int64)
    for row in range(len(micro)):
        prompt_len, response_len = micro.prompt_len_B[row], micro.response_len_B[row]
        input_BL[row, :prompt_len] = micro.prompt_BP[row, :prompt_len]
        input_BL[row, prompt_len : prompt_len + response_len] = micro.response_BT[row, :response_len]
    hidden_BLH = _decoder_pass(model, torch.from_numpy(input_BL).to(model.device), None)
    state_BT = micro.prompt_len_B[:, None] - 1 + np.arange(micro.response_BT.shape[1])
    state_BT = torch.from_numpy(np.minimum(state_BT, width - 1).astype(np.int64)).to(model.device)
    hidden_BTH = hidden_BLH.gather(1, state_BT[..., None].expand(-1, -1, hidden_BLH.shape[-1]))
    return make_pass(rows, micro, _trained(hidden_BTH, micro))


def _decoder_pass(model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache | None, **kwargs: torch.Tensor) -> torch.Tensor:
    decoder = model.get_decoder()
    return decoder(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, **kwargs).last_hidden_state


def _trained(hidden_BTH: torch.Tensor, micro: Batch) -> torch.Tensor:
    """The states before trained tokens, [N, H]."""
    mask_BT = torch.from_numpy(micro.mask_BT).to(hidden_BTH.device)
    width = mask_BT.shape[1]
    trained_NH = hidden_BTH[:, :width][mask_BT]
    if hidden_BTH.shape[1] == width:
        return trained_NH
    # None of the states behind, but the way back to them: all workers must go it.
    return torch.cat([trained_NH, hidden_BTH[:, width:].flatten(0, 1)[:0]])


def make_pass(rows: np.ndarray, micro: Batch, hidden_NH: torch.Tensor) -> Pass:
    """A pass from the states [N, H] before the trained tokens of `micro`, in row order."""
    row_N, column_N = (torch.from_numpy(index).to(hidden_NH.device) for index in np.nonzero(micro.mask_BT))
    target_N = torch.from_numpy(micro.response_BT[micro.mask_BT].astype(np.int64)).to(hidden_NH.device)
    return Pass(rows, micro, row_N, column_N, target_N, hidden_NH)
