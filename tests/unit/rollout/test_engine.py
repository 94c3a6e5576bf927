"""The decoding loop against transformers' own `generate` and against one whole forward pass in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agentlightning.calculator.task import calculate
from agentlightning.errors import NumericsError
from agentlightning.rollout.engine import DecodeLoop
from agentlightning.types import Prompt, SamplingParams

AGENT = SamplingParams(n=4, max_tokens=96, max_assistant_turns=4, max_tokens_per_turn=16)


@pytest.fixture
def engine(base_model, renderer):
    return DecodeLoop(base_model, renderer, max_num_seqs=64, tool=calculate)


def whole_pass_log_probs(model, prompt: Prompt, completion) -> np.ndarray:
    """Log-probabilities of the response tokens from one pass over everything, float64."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
    log_probs = model.double()(ids).logits.log_softmax(-1)[0]
    model.float()
    start = len(prompt.token_ids)
    return np.array([float(log_probs[start + t - 1, token]) for t, token in enumerate(completion.token_ids)])


def test_greedy_equals_generate(base_model, renderer, prompts):
    engine = DecodeLoop(base_model, renderer, max_num_seqs=64)
    params = SamplingParams(temperature=0, max_tokens=20)
    for prompt, completion in zip(prompts, engine.generate(prompts, params, 0, 1, 0), strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = base_model.generate(ids, do_sample=False, max_new_tokens=20, attention_mask=torch.ones_like(ids))[
            0, ids.shape[1] :
        ]
        assert completion.token_ids.tolist() == expected.tolist()


def test_log_probs_equal_those_of_a_whole_pass_over_all_turns(engine, base_model, prompts):
    completions = engine.generate(prompts[:4], AGENT, 0, 1, 0)
    assert any(len(completion.turns) > 2 for completion in completions), "the case needs tool turns"
    for i, completion in enumerate(completions):
        expected = whole_pass_log_probs(base_model, prompts[i // AGENT.n], completion)
        assert completion.logprobs[completion.mask] == pytest.approx(expected[completion.mask], abs=1e-4)
        assert not completion.logprobs[~completion.mask].any()


def test_turns_are_what_the_template_renders(engine, renderer, prompts):
    for i, completion in enumerate(engine.generate(prompts[:4], AGENT, 0, 1, 0)):
        if completion.stop_reason != "stop":
            continue
        messages = [*prompts[i // AGENT.n].messages, *completion.turns]
        rendered = renderer.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        ids = [*prompts[i // AGENT.n].token_ids, *completion.token_ids.tolist()]
        assert ids == rendered[: len(ids)]


def test_only_tokens_of_the_policy_are_in_the_mask(engine, renderer, prompts):
    for completion in engine.generate(prompts[:4], AGENT, 0, 1, 0):
        said = renderer.text(completion.token_ids[completion.mask].tolist())
        assert said == "".join(turn["content"] for turn in completion.turns if turn["role"] == "assistant")


def test_samples_do_not_depend_on_who_else_is_in_the_batch(engine, prompts):
    together = engine.generate(prompts, AGENT, 7, 3, 0)
    crowded = replace(engine, max_num_seqs=6).generate(prompts, AGENT, 7, 3, 0)
    alone = [completion for prompt in prompts for completion in engine.generate([prompt], AGENT, 7, 3, 0)]
    for a, b, c in zip(together, crowded, alone, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()
        assert a.turns == b.turns == c.turns


def test_another_step_or_seed_gives_other_samples(engine, prompts):
    first = [c.token_ids.tolist() for c in engine.generate(prompts, AGENT, 7, 3, 0)]
    for seed, step in ((8, 3), (7, 4)):
        assert [c.token_ids.tolist() for c in engine.generate(prompts, AGENT, seed, step, 0)] != first


@pytest.mark.parametrize("result", ["7", "x" * 40], ids=["short", "long"])
def test_an_observation_is_read_whether_token_by_token_or_at_once(base_model, renderer, prompts, result):
    engine = DecodeLoop(base_model, renderer, max_num_seqs=64, tool=lambda text, _: result if "<calc>" in text else None)
    params = SamplingParams(n=4, max_tokens=160, max_assistant_turns=3, max_tokens_per_turn=16)
    completions = engine.generate(prompts[:3], params, 0, 1, 0)
    observed = [c for c in completions if any(turn["role"] == "tool" for turn in c.turns)]
    assert observed
    for completion in observed:
        prompt = next(prompt for prompt in prompts if prompt.uid == completion.uid)
        expected = whole_pass_log_probs(base_model, prompt, completion)
        assert completion.logprobs[completion.mask] == pytest.approx(expected[completion.mask], abs=1e-4)
        assert int((~completion.mask).sum()) >= len(result)


def test_limits(engine, renderer, prompts):
    short = engine.generate(prompts, replace(AGENT, max_tokens=3), 0, 1, 0)
    assert {c.stop_reason for c in short} <= {"length", "stop"}
    assert max(len(c.token_ids) for c in short) <= 3
    always = replace(engine, tool=lambda text, _: "error")
    one = always.generate(prompts[:4], replace(AGENT, max_assistant_turns=2), 0, 1, 0)
    assert {c.stop_reason for c in one if c.num_turns == 2} == {"turns"}
    assert all(c.num_turns <= 2 for c in one)
    turn = engine.generate(prompts[:4], replace(AGENT, max_tokens_per_turn=2), 0, 1, 0)
    assert any(c.stop_reason == "length" and len(c.token_ids) == 2 for c in turn)


def test_a_stop_string_ends_the_turn_and_the_result_follows_after_the_end_token(engine, renderer, prompts):
    completions = engine.generate(prompts[:4], replace(AGENT, stop=("</calc>",)), 0, 1, 0)
    called = [c for c in completions if len(c.turns) > 1]
    assert called
    for completion in called:
        calls = [turn["content"] for turn in completion.turns if turn["role"] == "assistant" and "<calc>" in turn["content"]]
        assert all(call.endswith("</calc>") for call in calls)
        first = completion.token_ids[~completion.mask][0]
        assert first == renderer.end_of_turn_id, "the template's end token comes as part of the observation"


def test_no_prompts_no_completions(engine):
    assert engine.generate([], AGENT, 0, 1, 0) == []


def test_weights_that_are_not_numbers_are_named_with_the_prompt(engine, base_model, prompts):
    with torch.no_grad():
        base_model.model.norm.weight[3] = torch.nan
    for params in (AGENT, replace(AGENT, temperature=0)):
        with pytest.raises(NumericsError, match=r"response token 0 of prompt 'train:0'"):
            engine.generate(prompts[:2], params, 0, 1, 0)
