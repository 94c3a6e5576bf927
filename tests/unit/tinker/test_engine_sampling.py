"""Sampling for several samplers at once against a PEFT model run by itself; and that nobody's neighbours matter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from agentlightning.errors import UserError
from agentlightning.models.base import load_base
from agentlightning.rollout.sampling import random_stream
from agentlightning.tinker.engine import EngineSettings, InProcessLoraEngine
from agentlightning.tinker.engine_api import SampleRequest
from agentlightning.tinker.engine_sampling import Stops
from agentlightning.tinker.types import LoraConfig, ModelInput, SamplingParams

PROMPTS = ((258, 20, 21, 9, 30), (258, 22), (258,), (258, 40, 41, 42, 43, 44, 45))
FREE = SamplingParams(max_tokens=16, stop=[])


@pytest.fixture(scope="module")
def engine() -> InProcessLoraEngine:
    """Samplers `s0` to `s15` of ranks 1 to 8, some without the head, and `base`."""
    engine = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1, seed=11))
    engine.add_sampler("base", None)
    for i in range(16):
        engine.create_model(f"m{i}", LoraConfig(rank=1 + i % 8, seed=i, train_unembed=i % 3 != 0))
        disturb(engine, f"m{i}", seed=i)
        engine.add_sampler(f"s{i}", f"m{i}")
    return engine


def disturb(engine: InProcessLoraEngine, model: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in engine.models[model].parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))


def request(sampler: str, prompt: Sequence[int] = PROMPTS[0], params: SamplingParams = FREE, **more) -> SampleRequest:
    fields = {"num_samples": 1, "stream": f"stream of {sampler}", **more}
    return SampleRequest(sampler_id=sampler, prompt=ModelInput.from_ints(list(prompt)), sampling_params=params, **fields)


def tokens(response) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


def assert_equal(one, other) -> None:
    """The same tokens, and log-probabilities but for rounding."""
    assert tokens(one) == tokens(other)
    assert [s.stop_reason for s in one.sequences] == [s.stop_reason for s in other.sequences]
    for a, b in zip(one.sequences, other.sequences, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=3e-5)
    np.testing.assert_allclose(
        [np.nan if x is None else x for x in one.prompt_logprobs or []],
        [np.nan if x is None else x for x in other.prompt_logprobs or []],
        atol=3e-5,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_samples_are_those_of_the_peft_model_alone(engine, tmp_path: Path, temperature):
    """By the definition: the whole context anew for each token, in float64."""
    engine.save_state("m5", tmp_path / "a")
    base = load_base(engine.settings.path, "float32", torch.device("cpu"), gradient_checkpointing=False).double()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        peft = PeftModel.from_pretrained(base, tmp_path / "a/actor").double()
    params = SamplingParams(max_tokens=8, stop=[], temperature=temperature)
    given = engine.sample([request("s5", params=params, num_samples=2), request("s2", params=params)])[0]
    for index, sequence in enumerate(given.sequences):
        context, uniform = list(PROMPTS[0]), random_stream(11, 0, "stream of s5", index, 8)
        for position, (token, logp) in enumerate(zip(sequence.tokens, sequence.logprobs, strict=True)):
            with torch.no_grad():
                log_p = (peft(torch.tensor([context])).logits[0, -1] / (temperature or 1.0)).log_softmax(-1)
            cumulative = log_p.exp().cumsum(-1)
            drawn = int(torch.searchsorted(cumulative, uniform[position] * cumulative[-1], right=True))
            assert token == (drawn if temperature else int(log_p.argmax()))
            assert logp == pytest.approx(float(log_p[token]), abs=3e-5)
            context.append(token)


def test_four_samplers_together_are_each_alone(engine):
    requests = [
        request("s1", PROMPTS[0], num_samples=2, prompt_logprobs=True),
        request("s2", PROMPTS[1], SamplingParams(max_tokens=9, stop=[], temperature=0.0)),
        request("base", PROMPTS[2], SamplingParams(max_tokens=17, stop=[], temperature=1.3, top_k=5)),
        request("s3", PROMPTS[3], SamplingParams(max_tokens=30, stop=[], top_p=0.8), prompt_logprobs=True),
    ]
    for one, other in zip(engine.sample(requests), [engine.sample([r])[0] for r in requests], strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize(("rows", "tokens_at_once", "adapters"), [(3, 8, 2), (1, 1, 1), (256, 10_000, 16)])
def test_how_much_runs_at_once_changes_nothing(engine, rows, tokens_at_once, adapters):
    requests = [request(f"s{i}", PROMPTS[i % 4], num_samples=1 + i % 3, prompt_logprobs=True) for i in range(5)]
    requests += [request("s0", PROMPTS[0], num_samples=9, stream="unbalanced")]
    expected = engine.sample(requests)
    narrow = EngineSettings(
        "tiny", "cpu", num_threads=1, seed=11, max_num_seqs=rows, max_batch_tokens=tokens_at_once, max_resident_models=adapters
    )
    other = InProcessLoraEngine(narrow)
    other.samplers = engine.samplers
    for one, another in zip(other.sample(requests), expected, strict=True):
        assert_equal(one, another)


def test_seed_stream_and_index_decide_the_draws(engine):
    def drawn(**more) -> list[list[int]]:
        return tokens(engine.sample([request("s1", num_samples=2, **more)])[0])

    first = drawn()
    assert first == drawn()
    assert first[0] != first[1]
    assert first != drawn(stream="another")
    seeded = SamplingParams(max_tokens=16, stop=[], seed=5)
    assert first != drawn(params=seeded)
    assert drawn(params=seeded) == drawn(params=SamplingParams(max_tokens=16, stop=[], seed=5))
    assert first == drawn(params=SamplingParams(max_tokens=16, stop=[], seed=11)), "the engine's own seed is 11"
    assert [row[:6] for row in first] == drawn(params=SamplingParams(max_tokens=6, stop=[]))


def test_prompt_log_probabilities_and_the_likeliest_tokens(engine):
    (response,) = engine.sample([request("s4", PROMPTS[3], prompt_logprobs=True, topk_prompt_logprobs=3)])
    datum_logp = []
    with torch.no_grad():
        engine.lora.use(engine.models["m4"].adapter)
        log_p = engine.model(torch.tensor([PROMPTS[3]])).logits[0].log_softmax(-1)
        engine.lora.off()
    for position, token in enumerate(PROMPTS[3][1:]):
        datum_logp.append(float(log_p[position, token]))
    assert response.prompt_logprobs[0] is None
    np.testing.assert_allclose(response.prompt_logprobs[1:], datum_logp, atol=3e-5)
    assert response.topk_prompt_logprobs[0] is None
    for position, row in enumerate(response.topk_prompt_logprobs[1:]):
        best = log_p[position].topk(3)
        assert [token for token, _ in row] == best.indices.tolist()
        np.testing.assert_allclose([logp for _, logp in row], best.values, atol=3e-5)
    (plain,) = engine.sample([request("s4", PROMPTS[3])])
    assert (plain.prompt_logprobs, plain.topk_prompt_logprobs) == (None, None)


def test_a_prompt_is_run_once_for_all_its_samples_and_requests(engine, monkeypatch):
    rows: list[int] = []
    decoder = engine.model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda *a, input_ids, **k: rows.append(len(input_ids)) or forward(*a, input_ids=input_ids, **k)
    )
    params = SamplingParams(max_tokens=1)
    engine.sample(
        [request("s1", params=params, num_samples=3), request("s1", params=params, stream="x"), request("s2", params=params)]
    )
    assert rows == [2, 5]


def test_what_ends_a_completion(engine):
    long = SamplingParams(max_tokens=40, stop=[])
    (free,) = tokens(engine.sample([request("base", params=long)])[0])
    text = engine.sampler.tokenizer.decode(free, skip_special_tokens=False)
    token, place = free[5], free.index(free[5])

    def ended(stop) -> tuple[str, list[int]]:
        (sequence,) = engine.sample([request("base", params=SamplingParams(max_tokens=40, stop=stop))])[0].sequences
        return sequence.stop_reason, sequence.tokens

    assert ended([]) == ("length", free)
    assert ended([token]) == ("stop", free[: place + 1])
    string = text[3:5]
    reason, until = ended(string)
    decoded = engine.sampler.tokenizer.decode(until, skip_special_tokens=False)
    assert reason == "stop"
    assert string in decoded
    assert string not in engine.sampler.tokenizer.decode(until[:-1], skip_special_tokens=False)
    assert ended([string, "never said"]) == (reason, until)


def test_the_end_of_turn_token_ends_it_unless_nothing_shall(engine):
    end = engine.sampler.tokenizer.eos_token_id
    assert Stops.of(None, [end]) == Stops(frozenset({end}), ())
    assert Stops.of([], [end]) == Stops(frozenset(), ())
    assert Stops.of([7], [end]) == Stops(frozenset({7, end}), ())
    assert Stops.of("\n", [end]) == Stops(frozenset({end}), ("\n",))


def test_the_context_is_the_limit(engine):
    prompt = [258] + [20] * (engine.limits.context - 3)
    (sequence,) = engine.sample([request("base", prompt, SamplingParams(max_tokens=None, stop=[]))])[0].sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (3, "length")
    (last,) = engine.sample([request("base", [20] * engine.limits.context, SamplingParams(max_tokens=9))])[0].sequences
    assert len(last.tokens) == 1


def test_a_sampler_does_not_change_when_its_model_does(engine, tmp_path):
    engine.save_sampler("m7", tmp_path / "s7")
    before = engine.sample([request("s7")])[0]
    engine.add_sampler("saved", tmp_path / "s7")
    engine.add_sampler("saved folder", tmp_path / "s7" / "actor")
    disturb(engine, "m7", seed=77)
    engine.add_sampler("changed", "m7")
    names = ("s7", "saved", "saved folder", "changed")
    after = [tokens(r) for r in engine.sample([request(name, stream="stream of s7") for name in names])]
    assert after[:3] == [tokens(before)] * 3
    assert after[3] != tokens(before)
    engine.unload_model("m7")
    assert tokens(engine.sample([request("s7")])[0]) == tokens(before)
    engine.drop_sampler("s7")
    with pytest.raises(UserError, match="no sampler 's7'"):
        engine.sample([request("s7")])


def test_weights_with_nan_never_become_a_sampler(engine):
    engine.create_model("nan", LoraConfig(rank=1))
    with torch.no_grad():
        next(iter(engine.models["nan"].parameters.values()))[0, 0] = torch.nan
    with pytest.raises(UserError, match="holds NaN or inf"):
        engine.add_sampler("nan", "nan")
    with pytest.raises(UserError, match="no sampler 'nan'"):
        engine.sample([request("nan")])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request("s1", ()), "prompt: given 0 tokens, expected 1 to 512"),
        (request("s1", (1,) * 513), "prompt: given 513 tokens"),
        (request("s1", (264,)), "prompt: given token id 264"),
        (request("s1", num_samples=0), "num_samples: given 0"),
        (request("s1", params=SamplingParams(max_tokens=0)), "max_tokens: given 0"),
        (request("s1", params=SamplingParams(temperature=-0.1)), "temperature: given -0.1"),
        (request("s1", params=SamplingParams(temperature=float("nan"))), "temperature: given nan"),
        (request("s1", params=SamplingParams(top_p=0.0)), "top_p: given 0.0"),
        (request("s1", params=SamplingParams(top_k=0)), "top_k: given 0"),
        (request("s1", params=SamplingParams(stop=["a", ""])), "stop: given"),
        (request("s1", topk_prompt_logprobs=-1), "topk_prompt_logprobs: given -1"),
    ],
)
def test_a_bad_request_is_named(engine, bad, words):
    with pytest.raises(UserError, match=words):
        engine.sample([bad])


def test_sixteen_samplers_together_are_at_least_twice_as_fast(engine):
    params = SamplingParams(max_tokens=20, stop=[])
    requests = [request(f"s{i}", params=params) for i in (*range(7), *range(8, 16), 0)]

    def seconds(batches: list[list[SampleRequest]]) -> float:
        began = time.perf_counter()
        for batch in batches:
            engine.sample(batch)
        return time.perf_counter() - began

    apart, together = ([[one] for one in requests], [requests])
    seconds(together)
    assert seconds(apart) > 2 * min(seconds(together) for _ in range(3))
