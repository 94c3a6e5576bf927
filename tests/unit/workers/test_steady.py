"""Samples decoded alone, in fours and all together have the same bits; with the plain loop they have not."""

from dataclasses import replace

import pytest
import torch
from test_worker import worker_settings

from agentlightning.rollout.engine import DecodeLoop
from agentlightning.rollout.steady import SteadyLoop
from agentlightning.types import SamplingParams
from agentlightning.workers.worker import Worker

SAMPLING = SamplingParams(n=3, max_tokens=48, max_assistant_turns=3, max_tokens_per_turn=12)


def answer_at_length(text, extra_info):
    """A tool whose results are read in a pass of their own, or token by token."""
    return "a long result of the tool " + "9" * (len(text) % 7) if len(text) % 2 else "7"


@pytest.fixture(scope="module", params=[True, False], ids=["merged", "apart"])
def worker(base_path, request):
    settings = worker_settings(base_path)
    worker = Worker(replace(settings, rollout=replace(settings.rollout, merge_lora=request.param)))
    with torch.no_grad():
        for i, parameter in enumerate(worker.actor.parameters.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.02)
    worker.update_weights(0)
    return worker


def samples(worker: Worker, kind: type[DecodeLoop], prompts, together: int, max_num_seqs: int = 64) -> dict:
    model = worker.merged.model if worker.merged is not None else worker.adapters.base
    loop = kind(model, worker.engine.renderer, max_num_seqs, answer_at_length)  # pyright: ignore[reportAttributeAccessIssue]
    worker.adapters.use("actor")
    parts = [prompts[i : i + together] for i in range(0, len(prompts), together)]
    completions = [completion for part in parts for completion in loop.generate(part, SAMPLING, 1, 1, 0)]
    return {(c.uid, c.sample_index): (c.token_ids.tobytes(), c.mask.tobytes(), c.logprobs.tobytes()) for c in completions}


def test_company_changes_no_bit(worker, prompts):
    alone = samples(worker, SteadyLoop, prompts[:6], together=1)
    assert samples(worker, SteadyLoop, prompts[:6], together=6) == alone
    assert samples(worker, SteadyLoop, prompts[:6], together=4) == alone
    assert samples(worker, SteadyLoop, prompts[:6], together=6, max_num_seqs=7) == alone, "rows join those that run"


def test_the_samples_are_those_of_the_plain_loop(worker, prompts):
    steady, plain = (samples(worker, kind, prompts[:6], together=6) for kind in (SteadyLoop, DecodeLoop))
    assert {key: bits[:2] for key, bits in steady.items()} == {key: bits[:2] for key, bits in plain.items()}
    assert samples(worker, DecodeLoop, prompts[:6], together=1) != plain, "what this is for"
