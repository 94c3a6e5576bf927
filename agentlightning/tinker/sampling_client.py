"""Completions for a loop of one's own. Prompts enter, futures of `SampleResponse` leave.

The weights behind a `SamplingClient` never change. A sample is a pure function of (weights, seed, stream, index of the sample),
where the stream is the prompt and, without a seed in the `SamplingParams`, how often this client was asked for it and how far
its model was trained. So a loop that makes a sampling client for each batch, as RL loops do, draws the same samples when it is
killed and resumed.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from agentlightning.errors import UserError
from agentlightning.tinker.dispatch import EngineThread
from agentlightning.tinker.engine_api import BaseModelInfo, SampleRequest
from agentlightning.tinker.futures import Future, Ready
from agentlightning.tinker.types import ModelInput, SampleResponse, SamplingParams, TensorData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SamplingClient(Ready):
    """Made by a `ServiceClient` or a `TrainingClient`."""

    def __init__(self, engine: EngineThread, sampler_id: str, base: BaseModelInfo, stream: str) -> None:
        """`stream` tells samples without a seed apart from those of other clients on the same engine."""
        self._engine, self._base, self._stream = engine, base, stream
        self.sampler_id = sampler_id
        self._asked: Counter[str] = Counter()
        weakref.finalize(self, engine.drop_sampler, sampler_id).atexit = False

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
    ) -> Future[SampleResponse]:
        """`num_samples` completions of `prompt`. Ask for many before you wait for one: they are sampled together.

        The same prompt with the same `sampling_params.seed` gives the same completions again. `topk_*_logprobs`: that many
        likeliest tokens at each position. `target_prompt_logprobs`: token ids, int64 [len(prompt) - 1, K], to look up at each
        prompt position but the first; -1 is none. `prompt_alt_tokens_k`: that many draws at each of those positions.
        """
        if type(num_samples) is not int or num_samples < 1:
            raise UserError(f"num_samples={num_samples!r}; expected a whole number from 1")
        if prompt.length == 0:
            raise UserError("prompt has no token; expected at least one")
        request = SampleRequest(
            sampler_id=self.sampler_id,
            prompt=prompt,
            num_samples=num_samples,
            sampling_params=sampling_params,
            stream=self._stream_of(prompt, sampling_params),
            prompt_logprobs=include_prompt_logprobs or topk_prompt_logprobs > 0,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
        )
        return self._engine.sample(request, self)

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
    ) -> SampleResponse:
        """`sample`, waited for. Many at once: `asyncio.gather`."""
        return await self.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
        )

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        """The log-probability of each token of `prompt` given those before it, in nats; of the first one None."""
        response = self.sample(prompt, 1, SamplingParams(max_tokens=1, seed=0), include_prompt_logprobs=True)
        return response.then(_prompt_logprobs)

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        """`compute_logprobs`, waited for."""
        return await self.compute_logprobs(prompt)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        from agentlightning.models.chat import load_tokenizer

        return load_tokenizer(self._base.tokenizer_path)

    def get_base_model(self) -> str:
        """The name of the base."""
        return self._base.name

    async def get_base_model_async(self) -> str:
        """The name of the base."""
        return self._base.name

    def _stream_of(self, prompt: ModelInput, params: SamplingParams) -> str:
        digest = hashlib.sha256(np.asarray(prompt.to_ints(), dtype=np.int64).tobytes()).hexdigest()[:32]
        if params.seed is not None:
            return f"prompt {digest}"
        self._asked[digest] += 1
        return f"{self._stream}, prompt {digest}, time {self._asked[digest]}"


def _prompt_logprobs(response: SampleResponse) -> list[float | None]:
    assert response.prompt_logprobs is not None, "the engine was asked for them"
    return response.prompt_logprobs
