"""What a sample tells of beside its tokens, against the plain model run by itself in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from agentlightning.errors import UserError
from agentlightning.models.base import load_base, output_head
from agentlightning.rollout.sampling import random_stream
from agentlightning.tinker import engine_sampling
from agentlightning.tinker.engine import EngineSettings, InProcessLoraEngine
from agentlightning.tinker.engine_api import SampleRequest
from agentlightning.tinker.engine_prompt_scores import likeliest
from agentlightning.tinker.types import LoraConfig, ModelInput, SampleResponse, SamplingParams, TensorData

PROMPT = (258, 40, 41, 42, 43, 44, 45)
ROWS = len(PROMPT) - 1
SEED = 11
NEAR = 3e-5  # float32 against float64


@pytest.fixture(scope="module")
def engine() -> InProcessLoraEngine:
    """The base, and an adapter that moves it."""
    engine = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1, seed=SEED))
    engine.add_sampler("base", None)
    engine.create_model("m", LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.models["m"].parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
    engine.add_sampler("tuned", "m")
    return engine


@pytest.fixture(scope="module")
def plain(engine):
    return load_base(engine.settings.path, "float32", torch.device("cpu"), gradient_checkpointing=False).double()


@torch.no_grad()
def exact(plain, tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Row q: the log-probabilities of token q + 1."""
    return (plain(torch.tensor([list(tokens)])).logits[0] / temperature).log_softmax(-1)


def request(sampler: str = "base", prompt: Sequence[int] = PROMPT, params: dict[str, Any] | None = None, **more: Any):
    fields = {"num_samples": 1, "stream": "a stream", **more}
    chosen = SamplingParams(**{"max_tokens": 2, "stop": [], **(params or {})})
    return SampleRequest(sampler_id=sampler, prompt=ModelInput.from_ints(list(prompt)), sampling_params=chosen, **fields)


def ask(engine, *arguments: Any, **more: Any) -> SampleResponse:
    return engine.sample([request(*arguments, **more)])[0]


def ids(*cells: tuple[int, int, int], width: int = 4) -> torch.Tensor:
    """[ROWS, width] with these (row, column, id), and -1."""
    matrix = torch.full((ROWS, width), -1)
    for row, column, token in cells:
        matrix[row, column] = token
    return matrix


# ---- topk_sample_logprobs


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.4, "top_k": 2, "top_p": 0.5}, {}]
)
def test_the_likeliest_tokens_are_those_of_the_samples_own_distribution(engine, plain, params):
    response = ask(engine, params={"max_tokens": 5, **params}, num_samples=2, topk_sample_logprobs=3)
    for sequence in response.sequences:
        assert len(sequence.topk_logprobs) == len(sequence.tokens) == 5
        log_p = exact(plain, [*PROMPT, *sequence.tokens], params.get("temperature", 1.0) or 1.0)[ROWS:-1]
        best = log_p.topk(3)
        for position, row in enumerate(sequence.topk_logprobs):
            assert [token for token, _ in row] == best.indices[position].tolist()
            np.testing.assert_allclose([logp for _, logp in row], best.values[position], atol=NEAR)
            own = dict(row).get(sequence.tokens[position])
            assert own in (None, sequence.logprobs[position]), "to the bit"
        if params.get("temperature") == 0.0:
            firsts = [row[0] for row in sequence.topk_logprobs]
            assert firsts == list(zip(sequence.tokens, sequence.logprobs, strict=True))


def test_samples_side_by_side_tell_each_as_many_as_was_asked(engine):
    warm = {"temperature": 0.6}
    requests = [
        request(topk_sample_logprobs=4, params=warm),
        request(params=warm),
        request("tuned", params=warm, topk_sample_logprobs=1),
        request(params={"temperature": 0.0, "max_tokens": 6}, topk_sample_logprobs=2),
    ]
    together = engine.sample(requests)
    assert together[1].sequences[0].topk_logprobs is None
    for one, k, alone in ((0, 4, requests[0]), (2, 1, requests[2]), (3, 2, requests[3])):
        rows = together[one].sequences[0].topk_logprobs
        assert [len(row) for row in rows] == [k] * len(together[one].sequences[0].tokens)
        (other,) = engine.sample([alone])[0].sequences
        assert [[token for token, _ in row] for row in rows] == [[token for token, _ in row] for row in other.topk_logprobs]


def test_of_tokens_exactly_as_likely_the_chosen_one_is_the_first():
    log_p = torch.tensor([[0.0, 2, 2, 2, 1]]).log_softmax(-1)
    for chosen in (1, 2, 3):
        ((first, second),) = likeliest(log_p, 2, torch.tensor([chosen]))
        assert first == (chosen, float(log_p[0, chosen]))
        assert second[0] in {1, 2, 3} - {chosen}
        assert [token for token, _ in likeliest(log_p, 1, torch.tensor([chosen]))[0]] == [chosen]


# ---- target_prompt_logprobs


def test_ids_are_looked_up_where_they_are_named_dense_or_sparse(engine, plain):
    named = ids((0, 0, 5), (0, 3, 263), (2, 1, 42), (5, 0, 45), (5, 2, 45))
    log_p = exact(plain, PROMPT)
    expected = np.zeros(named.shape)
    for row, column in named.ge(0).nonzero().tolist():
        expected[row, column] = log_p[row, named[row, column]]
    dense = ask(engine, target_prompt_logprobs=TensorData.from_torch(named)).target_prompt_logprobs
    assert (dense.dtype, dense.shape, dense.sparse_crow_indices) == ("float32", [ROWS, 4], None)
    np.testing.assert_allclose(dense.to_numpy(), expected, atol=NEAR)
    assert (dense.to_numpy()[named.numpy() == -1] == 0).all()

    asked = TensorData.from_torch_sparse(named, pad_value=-1)
    assert asked.sparse_crow_indices is not None
    response = ask(engine, target_prompt_logprobs=asked, prompt_logprobs=True)
    sparse = response.target_prompt_logprobs
    assert (sparse.shape, sparse.sparse_crow_indices) == (asked.shape, asked.sparse_crow_indices)
    assert sparse.sparse_col_indices == asked.sparse_col_indices
    assert sparse.dtype == "float32"
    np.testing.assert_array_equal(sparse.to_numpy(), dense.to_numpy())
    assert response.prompt_logprobs[3] == sparse.to_numpy()[2, 1], "of the prompt's own token"


def test_a_listed_cell_of_a_sparse_tensor_may_name_none(engine, plain):
    asked = TensorData([7, -1, 9], "int64", [ROWS, 2], [0, 1, 1, 1, 1, 2, 3], [0, 1, 0])
    given = ask(engine, target_prompt_logprobs=asked).target_prompt_logprobs
    log_p = exact(plain, PROMPT)
    np.testing.assert_allclose(given.data, [log_p[0, 7], 0.0, log_p[5, 9]], atol=NEAR)


def test_rows_before_the_first_that_names_an_id_are_not_computed(engine, plain, monkeypatch):
    prompt = [258] + [20 + i % 90 for i in range(299)]
    shapes: list[int] = []
    head = output_head(engine.model)
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: shapes.append(len(hidden)) or forward(hidden))
    named = torch.full((299, 3), -1)
    named[280, 0] = 33
    asked = TensorData.from_torch_sparse(named, pad_value=-1)
    given = ask(engine, "base", prompt, {"max_tokens": 1}, target_prompt_logprobs=asked)
    assert given.target_prompt_logprobs.data == pytest.approx([float(exact(plain, prompt)[280, 33])], abs=NEAR)
    assert shapes == [299 - 256, 1]
    # Beside a request for the same prompt that wants every row, neither loses any.
    both = engine.sample(
        [request(prompt=prompt, target_prompt_logprobs=asked), request(prompt=prompt, prompt_logprobs=True, stream="b")]
    )
    assert both[0].target_prompt_logprobs.data == given.target_prompt_logprobs.data
    assert len(both[1].prompt_logprobs) == 300


# ---- prompt_alt_tokens_k


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_draws_are_those_of_the_exact_distribution_and_the_same_numbers(engine, plain, temperature):
    """At the temperature, whatever top_k and top_p say; their log-probabilities are the model's own."""
    params = {"temperature": temperature, "top_k": 1, "top_p": 0.1}
    drawn = ask(engine, params=params, prompt_alt_tokens_k=50).prompt_alt_tokens
    assert (drawn.tokens.dtype, drawn.tokens.shape) == ("int64", [ROWS, 50])
    assert (drawn.logprobs.dtype, drawn.logprobs.shape) == ("float32", [ROWS, 50])
    cumulative, log_p = exact(plain, PROMPT, temperature).exp().cumsum(-1).numpy(), exact(plain, PROMPT)
    for j in range(50):
        uniform = random_stream(SEED, 1, "a stream", j, ROWS)
        expected = [int(np.searchsorted(cumulative[row], uniform[row], side="right")) for row in range(ROWS)]
        assert drawn.tokens.to_numpy()[:, j].tolist() == expected
        own = [float(log_p[row, token]) for row, token in enumerate(expected)]
        np.testing.assert_allclose(drawn.logprobs.to_numpy()[:, j], own, atol=NEAR)
    assert len(np.unique(drawn.tokens.to_numpy()[0])) > 1


def test_many_draws_have_the_models_frequencies(engine, plain):
    """A chi-square over tokens and rows, cells of at least five expected draws."""
    requests = [request(params={"max_tokens": 1}, stream=f"s{i}", prompt_alt_tokens_k=200) for i in range(20)]
    draws = np.concatenate([r.prompt_alt_tokens.tokens.to_numpy() for r in engine.sample(requests)], axis=1)
    p = exact(plain, PROMPT)[:ROWS].exp().numpy()
    statistic, cells = 0.0, 0
    for row in range(ROWS):
        expected, seen = p[row] * draws.shape[1], np.bincount(draws[row], minlength=p.shape[1])
        kept = expected >= 5
        pairs = [*zip(seen[kept], expected[kept], strict=True), (seen[~kept].sum(), expected[~kept].sum())]
        statistic += sum((s - e) ** 2 / e for s, e in pairs if e >= 5)
        cells += sum(e >= 5 for _, e in pairs) - 1
    assert cells > ROWS
    assert statistic < cells + 5 * np.sqrt(2 * cells)


def test_greedy_draws_are_all_the_likeliest_token(engine, plain):
    drawn = ask(engine, params={"temperature": 0.0}, prompt_alt_tokens_k=3).prompt_alt_tokens
    best = exact(plain, PROMPT)[:ROWS].max(-1)
    assert drawn.tokens.tolist() == best.indices[:, None].expand(-1, 3).tolist()
    np.testing.assert_allclose(drawn.logprobs.to_numpy(), best.values[:, None].expand(-1, 3), atol=NEAR)


def test_seed_stream_position_and_number_decide_a_draw(engine):
    def drawn(k: int = 4, prompt: Sequence[int] = PROMPT, **more: Any) -> np.ndarray:
        return ask(engine, "base", prompt, prompt_alt_tokens_k=k, **more).prompt_alt_tokens.tokens.to_numpy()

    first = drawn()
    np.testing.assert_array_equal(drawn(k=9, num_samples=3)[:, :4], first)
    np.testing.assert_array_equal(drawn(prompt=PROMPT[:4]), first[:3])
    np.testing.assert_array_equal(drawn(params={"seed": SEED}), first)
    assert (drawn(params={"seed": 5}) != first).any()
    assert (drawn(stream="another") != first).any()
    assert ask(engine, prompt_alt_tokens_k=4).sequences[0].tokens == ask(engine).sequences[0].tokens


# ---- together


def test_all_of_them_do_not_depend_on_who_is_sampled_beside(engine):
    named = TensorData.from_torch(ids((0, 0, 5), (4, 1, 6)))
    everything = {"topk_sample_logprobs": 2, "prompt_alt_tokens_k": 3, "target_prompt_logprobs": named}
    requests = [request("tuned", stream="x", **everything), request("base", stream="y", **everything)]
    requests += [request("tuned", stream=f"z{i}", num_samples=2) for i in range(3)]
    narrow = InProcessLoraEngine(
        EngineSettings("tiny", "cpu", num_threads=1, seed=SEED, max_num_seqs=2, max_batch_tokens=8, max_resident_models=1)
    )
    narrow.samplers = engine.samplers
    together = engine.sample(requests)
    assert (together[0].target_prompt_logprobs.to_numpy() != together[1].target_prompt_logprobs.to_numpy()).any()
    for i in range(2):
        for other in (engine.sample([requests[i]])[0], narrow.sample(requests)[i]):
            one = together[i]
            assert other.prompt_alt_tokens.tokens.tolist() == one.prompt_alt_tokens.tokens.tolist()
            np.testing.assert_allclose(
                other.target_prompt_logprobs.to_numpy(), one.target_prompt_logprobs.to_numpy(), atol=NEAR
            )
            assert likeliest_ids(other) == likeliest_ids(one)


@pytest.mark.parametrize(("columns", "rows"), [(3, 2), (4, 256), (1024, 1)])
def test_how_a_prompts_rows_are_cut_changes_nothing(engine, monkeypatch, columns, rows):
    named = TensorData.from_torch_sparse(ids((0, 0, 5), (3, 2, 8), (5, 1, 6)), pad_value=-1)
    options = {"prompt_alt_tokens_k": 3, "target_prompt_logprobs": named, "topk_prompt_logprobs": 2}
    whole = ask(engine, **options)
    monkeypatch.setattr(engine_sampling, "_PREFILL_COLUMNS", columns)
    monkeypatch.setattr(engine_sampling, "_LOGIT_ROWS", rows)
    cut = ask(engine, **options)
    assert cut.prompt_alt_tokens.tokens.tolist() == whole.prompt_alt_tokens.tokens.tolist()
    for one, other in (
        (cut.prompt_alt_tokens.logprobs, whole.prompt_alt_tokens.logprobs),
        (cut.target_prompt_logprobs, whole.target_prompt_logprobs),
    ):
        np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), atol=NEAR)
    assert len(cut.topk_prompt_logprobs) == len(PROMPT)


def likeliest_ids(response: SampleResponse) -> list[list[int]]:
    return [[token for token, _ in row] for row in response.sequences[0].topk_logprobs]


def test_a_prompt_of_one_token_has_no_draws(engine):
    drawn = ask(engine, "base", PROMPT[:1], prompt_alt_tokens_k=3).prompt_alt_tokens
    assert drawn.tokens.shape == drawn.logprobs.shape == [0, 3]
    response = ask(engine)
    assert (response.target_prompt_logprobs, response.prompt_alt_tokens) == (None, None)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request(topk_sample_logprobs=-1), "topk_sample_logprobs: given -1, expected 0 to 264"),
        (request(topk_sample_logprobs=265), "topk_sample_logprobs: given 265"),
        (request(prompt_alt_tokens_k=-1), "prompt_alt_tokens_k: given -1, expected 0 to 264"),
        (request(prompt_alt_tokens_k=265), "prompt_alt_tokens_k: given 265"),
        (
            request(target_prompt_logprobs=TensorData(np.zeros((ROWS, 1)), "float32")),
            "target_prompt_logprobs: given float32, expected int64",
        ),
        (
            request(target_prompt_logprobs=TensorData(np.zeros(ROWS), "int64")),
            r"target_prompt_logprobs: given shape \[6\], expected \[6, k\]",
        ),
        (
            request(target_prompt_logprobs=TensorData(np.zeros((ROWS + 1, 2)), "int64")),
            r"target_prompt_logprobs: given shape \[7, 2\], expected \[6, k\]",
        ),
        (request(target_prompt_logprobs=TensorData.from_torch(ids((1, 1, 264)))), "given token id 264, expected 0 to 263"),
        (request(target_prompt_logprobs=TensorData.from_torch(ids((1, 1, -2)))), "given token id -2, expected 0 to 263, or -1"),
        (request(target_prompt_logprobs=TensorData.from_torch(ids())), "given no token id, expected at least one"),
        (
            request(target_prompt_logprobs=TensorData([], "int64", [ROWS, 2], [0] * (ROWS + 1), [])),
            "given no token id, expected at least one",
        ),
        (request("base", PROMPT[:1], target_prompt_logprobs=TensorData([[]], "int64", [0, 2])), "given no token id"),
    ],
)
def test_a_bad_request_is_named(engine, bad, words):
    with pytest.raises(UserError, match=words):
        engine.sample([bad])
