"""The generation engine: prompts in, completions out, on the very weights that train.

Batched decoding over a `RowCache`: a prompt is run once for all its samples, a tool's result extends the context that is
already cached, and a row that ends makes room at once. Works with any `AutoModelForCausalLM` with full attention.
transformers' own `generate` is exact too, but has no turns and keeps ended rows until the last one ends (README, "Speed").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from agentlightning.errors import NumericsError
from agentlightning.models.base import output_head
from agentlightning.models.chat import ChatRenderer
from agentlightning.rollout.cache import RowCache
from agentlightning.rollout.journal import RolloutJournal, SampleId
from agentlightning.rollout.sampling import choose, random_stream
from agentlightning.types import Completion, Prompt, SamplingParams, StopReason

Tool = Callable[[str, Mapping[str, Any]], str | None]
"""A tool: (text of the assistant's turn, the prompt's extra_info) -> its result, or None where the turn calls no tool."""

_RUN_AT_ONCE = 16  # a longer observation is run in one pass of its own instead of token by token beside the other rows


class Engine(Protocol):
    """What the workers need of an engine."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seed: int,
        step: int,
        adapter_version: int,
        journal: RolloutJournal | None = None,
    ) -> list[Completion]:
        """`params.n` completions of each prompt, prompt by prompt.

        With a `journal`, what it gives back is not sampled again, and what finishes is added to it.
        """
        ...


@dataclass(frozen=True)
class DecodeLoop:
    """The engine of this package: one Python loop, one forward pass a token over all rows."""

    model: PreTrainedModel
    renderer: ChatRenderer
    max_num_seqs: int
    tool: Tool | None = None
    check: Callable[[], None] | None = None  # called before each token; what it raises ends the call

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seed: int,
        step: int,
        adapter_version: int,
        journal: RolloutJournal | None = None,
    ) -> list[Completion]:
        """`params.n` completions of each prompt, prompt by prompt; a pure function of its arguments and the weights."""
        samples = Samples(prompts, params, seed, step, adapter_version)
        if journal is not None:
            samples.restore(journal)
        self.generation(samples, journal).run()
        return samples.completions()

    def generation(self, samples: Samples, journal: RolloutJournal | None) -> Generation:
        """The loop over the tokens of one call, for a kind of this engine to change."""
        return Generation(self, samples, journal)


class Samples:
    """The state of all N samples of one call: what each has said, and how far it is.

    Tokens up to `known_N` are decided already (an observation); those up to `count_N` have been passed as input or chosen.
    """

    def __init__(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int, step: int, adapter_version: int) -> None:
        self.prompts, self.params, self.adapter_version = prompts, params, adapter_version
        total, width = len(prompts) * params.n, params.max_tokens
        self.prompt_len_N = np.repeat([len(prompt.token_ids) for prompt in prompts], params.n)
        self.last_token_N = np.repeat([prompt.token_ids[-1] for prompt in prompts], params.n)
        self.token_NT = np.zeros((total, width), dtype=np.int32)
        self.mask_NT = np.zeros((total, width), dtype=bool)
        self.logp_NT = np.zeros((total, width), dtype=np.float32)
        self.count_N = np.zeros(total, dtype=np.int64)
        self.known_N = np.zeros(total, dtype=np.int64)
        self.turn_start_N = np.zeros(total, dtype=np.int64)
        self.turns: list[list[Mapping[str, str]]] = [[] for _ in range(total)]
        self.stop_reason: list[StopReason | None] = [None] * total
        self.restored: Mapping[SampleId, Completion] = {}
        self.uniform_NT = np.zeros((total, width))
        if params.temperature > 0:
            for i in range(total):
                self.uniform_NT[i] = random_stream(seed, step, prompts[i // params.n].uid, i % params.n, width)

    def prompt(self, sample: int) -> Prompt:
        """Whose sample it is."""
        return self.prompts[sample // self.params.n]

    def turn_ids(self, sample: int) -> np.ndarray:
        """Tokens of the turn under way."""
        return self.token_NT[sample, self.turn_start_N[sample] : self.count_N[sample]]

    def append(self, rows: np.ndarray, token_R: np.ndarray, logp_R: np.ndarray) -> np.ndarray:
        """Give each row its next token: the chosen one, or the known one of an observation. Returns which were chosen."""
        at_R = self.count_N[rows]
        chosen_R = at_R >= self.known_N[rows]
        token_R = np.where(chosen_R, token_R, self.token_NT[rows, at_R])
        self.token_NT[rows, at_R] = token_R
        self.mask_NT[rows, at_R] = chosen_R
        self.logp_NT[rows, at_R] = np.where(chosen_R, logp_R, 0.0)
        self.last_token_N[rows] = token_R
        self.count_N[rows] = at_R + 1
        return chosen_R

    def restore(self, journal: RolloutJournal) -> None:
        """Take over the samples that were finished before."""
        ids = [(self.prompt(i).uid, i % self.params.n) for i in range(len(self.turns))]
        self.restored = journal.reusable(ids)
        for i, sample in enumerate(ids):
            if sample in self.restored:
                self.stop_reason[i] = self.restored[sample].stop_reason

    def completions(self) -> list[Completion]:
        """All samples, which have ended."""
        return [self.completion(i) for i in range(len(self.turns))]

    def completion(self, sample: int) -> Completion:
        """A sample that has ended."""
        uid, index = self.prompt(sample).uid, sample % self.params.n
        if (uid, index) in self.restored:
            return self.restored[uid, index]
        reason, length = self.stop_reason[sample], self.count_N[sample]
        assert reason is not None
        return Completion(
            uid=uid,
            sample_index=index,
            token_ids=self.token_NT[sample, :length].copy(),
            mask=self.mask_NT[sample, :length].copy(),
            logprobs=self.logp_NT[sample, :length].copy(),
            turns=tuple(self.turns[sample]),
            stop_reason=reason,
            adapter_version=self.adapter_version,
        )


class Generation:
    """One call of `generate`: which samples are in the cache, and the loop over tokens."""

    def __init__(self, engine: DecodeLoop, samples: Samples, journal: RolloutJournal | None) -> None:
        self.engine, self.samples, self.params, self.journal = engine, samples, samples.params, journal
        self.device = engine.model.device
        self.stop_ids = np.array(_stop_token_ids(engine.model, engine.renderer))
        self.waiting = deque(i for i, reason in enumerate(samples.stop_reason) if reason is None)
        self.rows = np.empty(0, dtype=np.int64)  # the sample in each row of the cache
        self.cache: RowCache | None = None

    def run(self) -> None:
        """Until the last sample has ended."""
        while self.waiting or len(self.rows):
            if self.engine.check is not None:
                self.engine.check()
            self._admit()
            self._read_long_observations()
            self._decode()
            self._leave()

    def _admit(self) -> None:
        """Take samples in while there is room, a whole prompt at a time, and not a few at a time while others run."""
        room = self.engine.max_num_seqs - len(self.rows)
        if not self.waiting or (len(self.rows) and room < max(self.params.n, self.engine.max_num_seqs // 4)):
            return
        if room < len(self.waiting) and room >= self.params.n:
            room -= room % self.params.n
        new = np.array([self.waiting.popleft() for _ in range(min(room, len(self.waiting)))], dtype=np.int64)
        prompt_R = new // self.params.n
        unique = np.unique(prompt_R)
        cache = self._prefill([self.samples.prompts[i] for i in unique])
        cache.take(torch.as_tensor(np.searchsorted(unique, prompt_R), device=self.device))
        if self.cache is None or not len(self.rows):
            self.cache = cache
        else:
            self.cache.join(cache)
        self.rows = np.concatenate([self.rows, new])

    def _prefill(self, prompts: Sequence[Prompt]) -> RowCache:
        """Run each prompt once, but for its last token, which the first decoding step feeds."""
        lengths = np.array([max(len(prompt.token_ids) - 1, 1) for prompt in prompts])
        token_UP = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            token_UP[row, : lengths[row]] = prompt.token_ids[: lengths[row]]
        cache = RowCache(self.engine.model.config.num_hidden_layers)
        positions_UP = np.broadcast_to(np.arange(token_UP.shape[1]), token_UP.shape)
        self._forward(cache, token_UP, positions_UP)
        return cache

    def _read_long_observations(self) -> None:
        """Run the tokens of long observations in one pass; short ones ride along with the other rows, token by token."""
        ahead_R = self.samples.known_N[self.rows] - self.samples.count_N[self.rows]
        long = np.flatnonzero(ahead_R > _RUN_AT_ONCE)
        if not len(long):
            return
        assert self.cache is not None
        ids, ahead = self.rows[long], ahead_R[long]
        start_R = self.samples.prompt_len_N[ids] + self.samples.count_N[ids] - 1
        # The last token so far has not been an input yet; the last known one is left for the decoding step.
        token_RQ = np.zeros((len(long), ahead.max()), dtype=np.int64)
        for row, sample in enumerate(ids):
            count, known = self.samples.count_N[sample], self.samples.known_N[sample]
            token_RQ[row, 0] = self.samples.last_token_N[sample]
            token_RQ[row, 1 : ahead[row]] = self.samples.token_NT[sample, count : known - 1]
        positions_RQ = start_R[:, None] + np.arange(token_RQ.shape[1])
        self._forward(self.cache, token_RQ, positions_RQ, torch.as_tensor(long, device=self.device))
        self.samples.count_N[ids] += ahead
        self.samples.last_token_N[ids] = self.samples.token_NT[ids, self.samples.count_N[ids] - 1]

    def _decode(self) -> None:
        """One token more for every row."""
        assert self.cache is not None
        samples, rows = self.samples, self.rows
        at_R = samples.count_N[rows]
        hidden_R1H = self._forward(
            self.cache, samples.last_token_N[rows][:, None], (samples.prompt_len_N[rows] + at_R - 1)[:, None]
        )
        logits_RV = output_head(self.engine.model)(hidden_R1H[:, 0])
        uniform_R = torch.as_tensor(samples.uniform_NT[rows, at_R], device=self.device)
        token_R, logp_R = choose(logits_RV, uniform_R, self.params)
        log_probs = logp_R.float().cpu().numpy()
        if not np.isfinite(log_probs).all():
            sample = int(rows[int(np.flatnonzero(~np.isfinite(log_probs))[0])])
            raise NumericsError(
                f"NaN or inf in the logits of the rollout, at response token {samples.count_N[sample]} of prompt "
                f"{samples.prompt(sample).uid!r}: the base or the adapter holds it; no weight was changed"
            )
        chosen_R = samples.append(rows, token_R.cpu().numpy(), log_probs)
        self._end_turns(rows[chosen_R])

    def _forward(
        self, cache: RowCache, token_BQ: np.ndarray, position_BQ: np.ndarray, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [B, Q, H] of `token_BQ`, each seeing its row's tokens at positions up to its own."""
        return self._pass(cache, token_BQ, position_BQ, int(position_BQ.max()) + 1, rows)

    def _pass(
        self, cache: RowCache, token_BQ: np.ndarray, position_BQ: np.ndarray, width: int, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """The pass itself, over the first `width` columns of the cache."""
        position = torch.tensor(position_BQ, device=self.device)
        cache.begin(position, width, rows)
        visible_B1QK = (torch.arange(width, device=self.device) <= position[:, :, None])[:, None]
        return self.engine.model.get_decoder()(
            input_ids=torch.as_tensor(token_BQ, device=self.device),
            position_ids=position,
            attention_mask=visible_B1QK,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _end_turns(self, rows: np.ndarray) -> None:
        """Look for ends among samples that just chose a token: end of turn, a stop string, or a limit."""
        samples, params = self.samples, self.params
        ended_R = np.isin(samples.last_token_N[rows], self.stop_ids)
        full_R = samples.count_N[rows] >= params.max_tokens
        if params.max_tokens_per_turn is not None:
            full_R |= samples.count_N[rows] - samples.turn_start_N[rows] >= params.max_tokens_per_turn
        for sample in rows[ended_R]:
            self._take_turn(sample, samples.turn_ids(sample)[:-1], closed=True)
        for sample in rows[~ended_R] if params.stop else ():
            if self._at_stop_string(sample):
                self._take_turn(sample, samples.turn_ids(sample), closed=False)
        for sample in rows[full_R & ~ended_R]:
            if samples.stop_reason[sample] is None and samples.turn_start_N[sample] < samples.count_N[sample]:
                self._say(sample, samples.turn_ids(sample))
                samples.stop_reason[sample] = "length"

    def _at_stop_string(self, sample: int) -> bool:
        longest = max(len(stop.encode()) for stop in self.params.stop)
        # A token holds at least one byte, so the stop string lies within this many tokens.
        tail = self.engine.renderer.text(self.samples.turn_ids(sample)[-longest:].tolist())
        return any(stop in tail for stop in self.params.stop)

    def _say(self, sample: int, token_ids: np.ndarray) -> str:
        text = self.engine.renderer.text(token_ids.tolist())
        self.samples.turns[sample].append({"role": "assistant", "content": text})
        return text

    def _take_turn(self, sample: int, token_ids: np.ndarray, closed: bool) -> None:
        """An assistant's turn has ended: it was the answer, or a tool's result comes next."""
        samples, tool = self.samples, self.engine.tool
        text = self._say(sample, token_ids)
        result = tool(text, samples.prompt(sample).extra_info) if tool is not None else None
        if result is None:
            samples.stop_reason[sample] = "stop"
            return
        turns = sum(turn["role"] == "assistant" for turn in samples.turns[sample])
        if turns >= self.params.max_assistant_turns:
            samples.stop_reason[sample] = "turns"
            return
        observation = self.engine.renderer.observation_ids(result, closed)
        start = samples.count_N[sample]
        end = start + len(observation)
        if end >= self.params.max_tokens:
            samples.stop_reason[sample] = "length"
            return
        samples.turns[sample].append({"role": "tool", "content": result})
        samples.token_NT[sample, start:end] = observation
        samples.known_N[sample] = samples.turn_start_N[sample] = end

    def _leave(self) -> None:
        """Rows whose sample has ended leave the cache."""
        assert self.cache is not None
        stay = np.array(
            [row for row, sample in enumerate(self.rows) if self.samples.stop_reason[sample] is None], dtype=np.int64
        )
        if len(stay) < len(self.rows):
            if self.journal is not None:
                self.journal.add(self.samples.completion(sample) for sample in np.delete(self.rows, stay).tolist())
            self.rows = self.rows[stay]
            self.cache.take(torch.as_tensor(stay, device=self.device))


def _stop_token_ids(model: PreTrainedModel, renderer: ChatRenderer) -> list[int]:
    """The end-of-turn token and whatever else the model's generation config ends on."""
    config = model.generation_config
    eos = config.eos_token_id if config is not None else None
    more = eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else []
    return sorted({renderer.end_of_turn_id, *more})
