"""Sampling for several samplers at once: requests go in, each with its adapter and its parameters; responses come out.

The decode loop of the service. Unlike the rollout's (`rollout/engine.py`) it has no turns and no tools, but another adapter and
other sampling parameters for each row; cache, choice of tokens and random streams are the same. A prompt is run once for all
samples of it that are admitted together, whichever requests they come from.

A sample's draws depend on (seed, stream of its request, index, position) alone. What else is in the batch changes the logits by
rounding only, about 1e-6: that turns a token only where two are that close.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentlightning.errors import NumericsError, UserError
from agentlightning.models.base import output_head
from agentlightning.models.multi_lora import Adapter, AdapterStack, MultiLora, RowGroups
from agentlightning.rollout.cache import RowCache
from agentlightning.rollout.sampling import choose, random_stream
from agentlightning.tinker.engine_api import SampleRequest
from agentlightning.tinker.engine_data import Limits
from agentlightning.tinker.engine_prompt_scores import PromptScores, add_rows, check_targets, likeliest, wants_scores
from agentlightning.tinker.types import SampledSequence, SampleResponse, SamplingParams, StopReason
from agentlightning.types import SamplingParams as TokenChoice

_PREFILL_COLUMNS = 1024  # of a prompt at a time: the mask grows with their product by the context
_LOGIT_ROWS = 256  # prompt positions whose logits exist at a time
_BASE_ALONE = Adapter({}, 1.0)


@dataclass(frozen=True, slots=True)
class SamplingLimits:
    """How much is run at once."""

    max_rows: int  # completions under way
    max_tokens: int  # prompt tokens run together, padded
    max_adapters: int  # samplers on the device


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends a completion."""

    ids: frozenset[int]
    strings: tuple[str, ...]

    @classmethod
    def of(cls, stop: str | Sequence[str] | Sequence[int] | None, end_ids: Sequence[int]) -> Stops:
        """An empty list is nothing at all; otherwise the base's own end tokens end it too, as servers of models have it."""
        given: list[str | int] = [stop] if isinstance(stop, str) else list(stop or ())
        if stop is not None and not given:
            return cls(frozenset(), ())
        strings = tuple(item for item in given if isinstance(item, str))
        return cls(frozenset(end_ids) | {int(item) for item in given if not isinstance(item, str)}, strings)


@dataclass(eq=False, slots=True)
class _Sequence:
    """One completion under way."""

    request: int
    adapter: int  # place in the stack
    prompt: tuple[int, ...]
    limit: int  # tokens
    choice: TokenChoice
    topk: int  # likeliest tokens to tell of at each position
    stops: Stops
    uniform_T: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]] | None] = field(default_factory=list)
    ended: StopReason | None = None

    @property
    def last(self) -> tuple[int, int]:
        """The next input: token and position."""
        token = self.tokens[-1] if self.tokens else self.prompt[-1]
        return token, len(self.prompt) + len(self.tokens) - 1


def check_request(request: SampleRequest, limits: Limits) -> None:
    """Raise `UserError` for a request that cannot be sampled."""
    params, tokens = request.sampling_params, request.prompt.to_ints()
    ranges: list[tuple[str, object, str, bool]] = [
        ("num_samples", request.num_samples, "at least 1", request.num_samples >= 1),
        ("max_tokens", params.max_tokens, "at least 1, or None", params.max_tokens is None or params.max_tokens >= 1),
        ("temperature", params.temperature, "at least 0", 0 <= params.temperature < float("inf")),
        ("top_p", params.top_p, "above 0 and at most 1", 0 < params.top_p <= 1),
        ("top_k", params.top_k, "at least 1, or -1 for no limit", params.top_k == -1 or params.top_k >= 1),
    ]
    counts = {
        "topk_prompt_logprobs": request.topk_prompt_logprobs,
        "topk_sample_logprobs": request.topk_sample_logprobs,
        "prompt_alt_tokens_k": request.prompt_alt_tokens_k,
    }
    for name, count in counts.items():
        ranges.append((name, count, f"0 to {limits.vocabulary}", 0 <= count <= limits.vocabulary))
    for name, value, words, holds in ranges:
        if not holds:
            raise UserError(f"sample, {name}: given {value!r}, expected {words}")
    if not 0 < len(tokens) <= limits.context:
        raise UserError(f"sample, prompt: given {len(tokens)} tokens, expected 1 to {limits.context}, the base's context")
    odd = [token for token in tokens if not 0 <= token < limits.vocabulary]
    if odd:
        raise UserError(f"sample, prompt: given token id {odd[0]}, expected 0 to {limits.vocabulary - 1}")
    if request.target_prompt_logprobs is not None:
        check_targets(request.target_prompt_logprobs, len(tokens), limits.vocabulary)
    stop = params.stop
    if isinstance(stop, str):
        stop = [stop]
    if any(item == "" or not isinstance(item, str | int | np.integer) for item in stop or ()):
        raise UserError(f"sample, stop: given {params.stop!r}, expected strings that are not empty, or token ids")


class Sampler:
    """The decode loop over one base."""

    def __init__(
        self, lora: MultiLora, tokenizer: PreTrainedTokenizerBase, limits: Limits, sizes: SamplingLimits, seed: int
    ) -> None:
        self.lora, self.model, self.tokenizer = lora, lora.base, tokenizer
        self.limits, self.sizes, self.seed = limits, sizes, seed
        self.end_ids = _end_ids(self.model, tokenizer)
        self.stack: AdapterStack | None = None
        self.stacked: list[Adapter] = []

    @torch.no_grad()
    def sample(self, requests: Sequence[SampleRequest], adapters: Mapping[str, Adapter | None]) -> list[SampleResponse]:
        """One response a request, in order. `adapters` holds the weights of every sampler that is named; None: the base."""
        for request in requests:
            check_request(request, self.limits)
        names = sorted({request.sampler_id for request in requests})
        responses: dict[int, SampleResponse] = {}
        try:
            for start in range(0, len(names), self.sizes.max_adapters):
                part = names[start : start + self.sizes.max_adapters]
                places = [i for i, request in enumerate(requests) if request.sampler_id in part]
                stack = self._stack([adapters[name] or _BASE_ALONE for name in part])
                done = _Decoding(self, [requests[i] for i in places], part, stack).run()
                responses.update(zip(places, done, strict=True))
        finally:
            self.lora.off()
        return [responses[i] for i in range(len(requests))]

    def _stack(self, adapters: list[Adapter]) -> AdapterStack:
        """The adapters on the device. Those of the last call stay there: a client asks many times for the same ones."""
        if len(adapters) != len(self.stacked) or any(a is not b for a, b in zip(adapters, self.stacked, strict=True)):
            self.stack = None  # the old one first: two of them at once may be what does not fit
            self.stack, self.stacked = AdapterStack(self.lora, adapters), adapters
        assert self.stack is not None
        return self.stack

    def max_tokens(self, prompt_length: int, params: SamplingParams) -> int:
        """What the context leaves: the last token is chosen but never read."""
        room = self.limits.context - prompt_length + 1
        return room if params.max_tokens is None else min(room, params.max_tokens)


class _Decoding:
    """One batch of requests, the cache, and the loop over tokens."""

    def __init__(self, sampler: Sampler, requests: Sequence[SampleRequest], names: Sequence[str], stack: AdapterStack) -> None:
        self.sampler, self.requests, self.names, self.stack = sampler, requests, names, stack
        self.device = sampler.model.device
        self.sequences = [sequence for i, request in enumerate(requests) for sequence in self._sequences(i, request)]
        self.waiting = deque(self.sequences)
        self.rows: list[_Sequence] = []
        self.cache: RowCache | None = None
        self.scores: dict[int, PromptScores] = {}

    def run(self) -> list[SampleResponse]:
        while self.waiting or self.rows:
            self._admit()
            self._decode()
            self._leave()
        return [self._response(i) for i in range(len(self.requests))]

    def _sequences(self, place: int, request: SampleRequest) -> list[_Sequence]:
        params, prompt = request.sampling_params, tuple(request.prompt.to_ints())
        limit = self.sampler.max_tokens(len(prompt), params)
        seed = self._seed(request)
        choice = TokenChoice(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
        stops = Stops.of(params.stop, self.sampler.end_ids)
        return [
            _Sequence(
                request=place,
                adapter=self.names.index(request.sampler_id),
                prompt=prompt,
                limit=limit,
                choice=choice,
                topk=request.topk_sample_logprobs,
                stops=stops,
                uniform_T=random_stream(seed, 0, request.stream, index, limit),
            )
            for index in range(request.num_samples)
        ]

    def _seed(self, request: SampleRequest) -> int:
        return self.sampler.seed if request.sampling_params.seed is None else request.sampling_params.seed

    def _admit(self) -> None:
        """Take sequences in while there is room, and not a few at a time while others run."""
        room = self.sampler.sizes.max_rows - len(self.rows)
        if not self.waiting or (self.rows and room < max(1, self.sampler.sizes.max_rows // 4)):
            return
        new = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        of_key: dict[tuple[int, tuple[int, ...]], list[_Sequence]] = {}
        for sequence in new:
            of_key.setdefault((sequence.adapter, sequence.prompt), []).append(sequence)
        groups = sorted(of_key.values(), key=lambda group: -len(group[0].prompt))
        while groups:
            fitting = max(1, self.sampler.sizes.max_tokens // len(groups[0][0].prompt))
            self._prefill(groups[:fitting])
            groups = groups[fitting:]
        self._place_rows()

    def _prefill(self, groups: list[list[_Sequence]]) -> None:
        """Run one prompt for each group, but for its last token, which the first decoding step feeds."""
        firsts = [group[0] for group in groups]
        length = max(max(len(first.prompt) - 1, 1) for first in firsts)
        token_UP = np.zeros((len(firsts), length), dtype=np.int64)
        for row, first in enumerate(firsts):
            own = first.prompt[: max(len(first.prompt) - 1, 1)]
            token_UP[row, : len(own)] = own
        self._use([first.adapter for first in firsts])
        cache = RowCache(self.sampler.model.config.num_hidden_layers)
        wanted = [self._scored_requests(group) for group in groups]
        for start in range(0, length, _PREFILL_COLUMNS):
            part_UQ = token_UP[:, start : start + _PREFILL_COLUMNS]
            position_UQ = np.broadcast_to(start + np.arange(part_UQ.shape[1]), part_UQ.shape)
            hidden_UQH = self._forward(cache, part_UQ, position_UQ)
            for row, requests in enumerate(wanted):
                if requests:
                    self._score(firsts[row], requests, hidden_UQH[row], start)
        taken = [row for row, group in enumerate(groups) for _ in group]
        cache.take(torch.tensor(taken, device=self.device))
        if self.cache is None or not self.rows:
            self.cache = cache
        else:
            self.cache.join(cache)
        self.rows += [sequence for group in groups for sequence in group]

    def _scored_requests(self, group: list[_Sequence]) -> list[int]:
        """The requests of these sequences that want to know of their prompt and do not yet."""
        places = dict.fromkeys(sequence.request for sequence in group)
        new = [i for i in places if wants_scores(self.requests[i]) and i not in self.scores]
        for i in new:
            self.scores[i] = PromptScores(self.requests[i], self._seed(self.requests[i]))
        return new

    def _score(self, first: _Sequence, requests: list[int], hidden_QH: torch.Tensor, start: int) -> None:
        """What the prompt's states from position `start` on tell: the state at q speaks of token q + 1."""
        following = first.prompt[start + 1 : start + 1 + len(hidden_QH)]
        scores = [self.scores[i] for i in requests]
        needed_from = min(one.first_row for one in scores)
        for at in range(0, len(following), _LOGIT_ROWS):
            target_N = torch.tensor(following[at : at + _LOGIT_ROWS], device=self.device)
            if start + at + len(target_N) > needed_from:
                self._use([first.adapter] * len(target_N))
                logits_NV = output_head(self.sampler.model)(hidden_QH[at : at + len(target_N)])
                add_rows(scores, start + at, target_N, logits_NV)

    def _decode(self) -> None:
        """One token more for every row."""
        assert self.cache is not None
        rows = self.rows
        inputs = np.array([row.last for row in rows], dtype=np.int64)
        hidden_R1H = self._forward(self.cache, inputs[:, :1], inputs[:, 1:])
        logits_RV = output_head(self.sampler.model)(hidden_R1H[:, 0])
        uniform_R = torch.tensor([row.uniform_T[len(row.tokens)] for row in rows], device=self.device, dtype=torch.float64)
        token_R, logp_R = self._choose(logits_RV, uniform_R)
        self._add_likeliest(logits_RV, token_R)
        for row, token, logp in zip(rows, token_R.tolist(), logp_R.tolist(), strict=True):
            if not np.isfinite(logp):
                raise NumericsError(
                    f"NaN or inf in the logits of sampler {self.names[row.adapter]!r}, at token {len(row.tokens)} of a "
                    "completion: the base or the adapter holds it"
                )
            row.tokens.append(token)
            row.logprobs.append(logp)
            if token in row.stops.ids or (row.stops.strings and self._at_stop_string(row)):
                row.ended = "stop"
            elif len(row.tokens) >= row.limit:
                row.ended = "length"

    def _choose(self, logits_RV: torch.Tensor, uniform_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probabilities; rows that are drawn in the same way together."""
        ways = self._ways(range(len(self.rows)))
        if len(ways) == 1:
            return choose(logits_RV, uniform_R, self.rows[0].choice)
        token_R = torch.empty(len(self.rows), dtype=torch.int64, device=self.device)
        logp_R = torch.empty(len(self.rows), device=self.device)
        for choice, places in ways.items():
            index = torch.tensor(places, device=self.device)
            token_R[index], logp_R[index] = choose(logits_RV[index], uniform_R[index], choice)
        return token_R, logp_R

    def _ways(self, places: Iterable[int]) -> dict[TokenChoice, list[int]]:
        ways: dict[TokenChoice, list[int]] = {}
        for place in places:
            ways.setdefault(self.rows[place].choice, []).append(place)
        return ways

    def _add_likeliest(self, logits_RV: torch.Tensor, token_R: torch.Tensor) -> None:
        """For rows that want to know; in the distribution that `choose` gives the log-probabilities of, to the same bit."""
        for choice, places in self._ways(place for place, row in enumerate(self.rows) if row.topk).items():
            index = torch.tensor(places, device=self.device)
            greedy = choice.temperature == 0
            log_p_NV = (logits_RV[index].float() / (1.0 if greedy else choice.temperature)).log_softmax(-1)
            most = max(self.rows[place].topk for place in places)
            pairs = likeliest(log_p_NV, most, token_R[index] if greedy else None)
            for place, row in zip(places, pairs, strict=True):
                self.rows[place].top.append(row[: self.rows[place].topk])

    def _at_stop_string(self, row: _Sequence) -> bool:
        longest = max(len(stop.encode()) for stop in row.stops.strings)
        # A token holds at least one byte, so the stop string lies within this many tokens. A special token may be meant.
        tail = str(self.sampler.tokenizer.decode(row.tokens[-longest:], skip_special_tokens=False))
        return any(stop in tail for stop in row.stops.strings)

    def _leave(self) -> None:
        """Rows whose sequence has ended leave the cache."""
        assert self.cache is not None
        stay = [place for place, row in enumerate(self.rows) if row.ended is None]
        if len(stay) < len(self.rows):
            self.rows = [self.rows[place] for place in stay]
            self.cache.take(torch.tensor(stay, dtype=torch.int64, device=self.device))
            if self.rows:
                self._place_rows()

    def _place_rows(self) -> None:
        self._use([row.adapter for row in self.rows])

    def _use(self, adapters: Sequence[int]) -> None:
        """The adapter of each row of the next pass."""
        self.sampler.lora.use_rows(self.stack, RowGroups.of(adapters, self.stack.size, self.device))

    def _forward(self, cache: RowCache, token_BQ: np.ndarray, position_BQ: np.ndarray) -> torch.Tensor:
        """Hidden states [B, Q, H] of `token_BQ`, each seeing its row's tokens at positions up to its own."""
        position = torch.tensor(position_BQ, device=self.device)
        width = int(position_BQ.max()) + 1
        cache.begin(position, width)
        visible_B1QK = (torch.arange(width, device=self.device) <= position[:, :, None])[:, None]
        return self.sampler.model.get_decoder()(
            input_ids=torch.tensor(token_BQ, device=self.device),
            position_ids=position,
            attention_mask=visible_B1QK,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _response(self, place: int) -> SampleResponse:
        request = self.requests[place]
        own = [sequence for sequence in self.sequences if sequence.request == place]
        sequences = []
        for sequence in own:
            assert sequence.ended is not None
            top = sequence.top if request.topk_sample_logprobs else None
            sequences.append(SampledSequence(sequence.ended, sequence.tokens, sequence.logprobs, top))
        if place not in self.scores:
            return SampleResponse(sequences)
        scores = self.scores[place]
        return SampleResponse(
            sequences,
            scores.logprobs if request.prompt_logprobs else None,
            scores.top if request.topk_prompt_logprobs else None,
            scores.targets.answer() if scores.targets is not None else None,
            scores.draws.answer() if scores.draws is not None else None,
        )


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end-of-turn token and whatever else the model's generation config ends on."""
    config = model.generation_config
    eos = config.eos_token_id if config is not None else None
    more = eos if isinstance(eos, list) else [eos]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *more) if isinstance(token, int)})
