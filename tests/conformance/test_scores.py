"""What a sample tells of beside its tokens, through the real SDK: against the base alone in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agentlightning.calculator import __file__ as calculator

AT_ONCE_S = 10.0
NEAR = 2e-4


@pytest.fixture(scope="module")
def seen(client):
    return client("client_scores.py", str(Path(__file__).parents[2]))


@pytest.fixture(scope="module")
def log_p(seen):
    """A function of tokens: row q is the distribution of token q + 1."""
    base = AutoModelForCausalLM.from_pretrained(Path(calculator).parent / "base", dtype=torch.float64).eval()

    def of(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return base(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()

    return of


@pytest.mark.parametrize("name", ["dense", "sparse", "ours", "greedy"])
def test_all_three_are_those_of_the_base(seen, log_p, name):
    answer, prompt = seen["answers"][name], seen["prompt"]
    rows = len(prompt) - 1
    log_p_QV = log_p(prompt)

    expected = np.zeros((rows, 4))
    for row, column, token in seen["named"]:
        expected[row, column] = log_p_QV[row, token]
    np.testing.assert_allclose(answer["targets"], expected, atol=NEAR)
    dense = name in ("dense", "greedy")
    indices = [None, None] if dense else [[0, 2, 2, 2, 2, 3, 3, 4], [0, 3, 1, 2]]
    assert answer["layout"] == ["float32", [rows, 4], *indices]

    tokens, logprobs, *types = answer["drawn"]
    assert types == ["int64", "float32"]
    assert np.shape(tokens) == (rows, 8)
    np.testing.assert_allclose(logprobs, np.take_along_axis(log_p_QV[:rows], np.array(tokens), axis=1), atol=NEAR)
    if name == "greedy":
        assert (np.array(tokens) == log_p_QV[:rows].argmax(-1)[:, None]).all()

    for sequence in answer["sequences"]:
        own_TV = log_p([*prompt, *sequence["tokens"]])[rows:-1]
        assert [len(row) for row in sequence["top"]] == [3] * len(sequence["tokens"])
        for position, row in enumerate(sequence["top"]):
            best = np.argsort(-own_TV[position])[:3]
            assert [token for token, _ in row] == best.tolist()
            np.testing.assert_allclose([logp for _, logp in row], own_TV[position][best], atol=NEAR)
        if name == "greedy":
            chosen = zip(sequence["tokens"], sequence["logprobs"], strict=True)
            assert [tuple(row[0]) for row in sequence["top"]] == list(chosen), "to the bit"


def test_a_seed_brings_the_draws_back_whoever_asks(seen):
    answers = seen["answers"]
    for name in ("sparse", "ours"):
        assert answers[name]["drawn"][0] == answers["dense"]["drawn"][0]
        assert [s["tokens"] for s in answers[name]["sequences"]] == [s["tokens"] for s in answers["dense"]["sequences"]]
    assert np.unique(np.array(answers["dense"]["drawn"][0])[0]).size > 1


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("width", "UnprocessableEntityError", "topk_sample_logprobs"),
        ("draws", "UnprocessableEntityError", "prompt_alt_tokens_k"),
        ("rows", "RequestFailedError", "given shape [6, 4], expected [7, k]"),
        ("id", "RequestFailedError", "given token id 264, expected 0 to 263"),
        ("none", "RequestFailedError", "expected at least one"),
    ],
)
def test_what_cannot_be_told_is_refused_at_once(seen, case, kind, words):
    given_kind, given_words, seconds = seen["errors"][case]
    assert given_kind == kind, given_words
    assert words in given_words
    assert seconds < AT_ONCE_S
