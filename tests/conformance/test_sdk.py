"""What the SDK's clients give is what independent arithmetic says it should be, and what goes wrong is said at once."""

import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agentlightning.calculator import __file__ as calculator

BASE = os.path.join(os.path.dirname(calculator), "base")
AT_ONCE_S = 10.0  # the SDK would send again for minutes what it takes for a passing trouble


@pytest.fixture(scope="module")
def training(client):
    return client("client_training.py")


@pytest.fixture(scope="module")
def kept(client):
    return client("client_checkpoints.py")


@pytest.fixture(scope="module")
def base():
    """In float64, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).eval()


@torch.no_grad()
def exact_logprobs(base, tokens, targets):
    logits_TV = base(torch.tensor([tokens])).logits[0]
    return logits_TV.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None])[:, 0].numpy()


def exact_loss(loss, p, q, w, A, config):
    """The sum over positions, by hand, in float64."""
    ratio = np.exp(np.where(A != 0, p - q, 0.0))
    low, high = config.get("clip_low_threshold"), config.get("clip_high_threshold")
    if loss == "cross_entropy":
        return -(w * p).sum()
    if loss == "importance_sampling":
        return -(ratio * A).sum()
    if loss == "ppo":
        return -np.minimum(ratio * A, np.clip(ratio, low or 0.8, high or 1.2) * A).sum()
    if loss == "cispo":
        return -(np.clip(ratio, 0.0, 4.0) * p * A).sum()
    if loss == "dro":
        return -(p * A - 0.5 * config["beta"] * (p - q) ** 2).sum()
    ratio = np.exp((p - q)[A != 0].mean())
    return -np.minimum(ratio * A, np.clip(ratio, 1 - 3e-4, 1 + 4e-4) * A).sum()


# ---- training


def test_the_server_says_what_it_is(training):
    assert training["capabilities"] == ["tiny"]
    assert training["info"] == {"rank": 4, "name": "tiny", "is_lora": True}


def test_logprobs_are_those_of_the_base(training, base):
    """A new adapter changes nothing."""
    for row, given in zip(training["losses"]["rows"], training["losses"]["losses"]["ppo"]["logprobs"], strict=True):
        np.testing.assert_allclose(given, exact_logprobs(base, row["tokens"], row["targets"]), atol=2e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_each_loss_is_the_sum_that_its_formula_gives(training, loss):
    seen = training["losses"]
    given = seen["losses"][loss]
    config = seen["config"].get(loss, {})
    arrays = [
        [np.array(x, np.float64) for x in (p, q, row["weights"], row["advantages"])]
        for row, p, q in zip(seen["rows"], given["logprobs"], seen["sampler"], strict=True)
    ]
    expected = sum(exact_loss(loss, *columns, config) for columns in arrays)
    assert given["metrics"]["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert given["step"]["grad_norm:mean"] > 0


def test_a_loss_of_ones_own_trains_as_the_built_in_one(training):
    seen = training["custom"]
    built_in, own = seen["metrics"]
    assert own["loss:sum"] == pytest.approx(built_in["loss:sum"], rel=1e-6)
    assert own["seen"] == 3
    np.testing.assert_allclose(np.concatenate(seen["behind"][0]), np.concatenate(seen["behind"][1]), atol=1e-3)
    assert np.concatenate(seen["behind"][0]).mean() > np.concatenate(seen["before"]).mean() + 1


def test_chunks_that_come_in_any_order_are_one_batch(training):
    seen = training["chunked"]
    assert seen["count"] == 1100
    assert seen["sum"] == pytest.approx(sum(seen["parts"]), rel=1e-6)
    whole, halves = seen["norms"]
    assert whole["grad_norm:mean"] == pytest.approx(halves["grad_norm:mean"], rel=1e-5)


# ---- sampling


def test_greedy_tokens_are_the_likeliest_ones(training, base):
    seen = training["sampling"]
    prompt, (sequence,) = seen["prompt tokens"], seen["greedy"]["sequences"]
    whole = prompt + sequence["tokens"]
    with torch.no_grad():
        logp_TV = base(torch.tensor([whole])).logits[0].log_softmax(-1)
    own = logp_TV[len(prompt) - 1 : -1]
    assert own.argmax(-1).tolist() == sequence["tokens"]
    np.testing.assert_allclose(sequence["logprobs"], own.max(-1).values, atol=2e-4)
    of_prompt = logp_TV[: len(prompt) - 1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert seen["greedy"]["prompt"][0] is None
    np.testing.assert_allclose(seen["greedy"]["prompt"][1:], of_prompt, atol=2e-4)
    np.testing.assert_allclose(seen["computed"][1:], of_prompt, atol=2e-4)
    best = logp_TV[: len(prompt) - 1].topk(2, dim=-1)
    assert [[token for token, _ in row] for row in seen["greedy"]["top"][1:]] == best.indices.tolist()


def test_stops_end_a_completion(training):
    seen = training["sampling"]
    (greedy,), (no_stop,) = seen["greedy"]["sequences"], seen["no stop"]["sequences"]
    assert (len(no_stop["tokens"]), no_stop["why"]) == (6, "length")
    second = greedy["tokens"].index(greedy["tokens"][1]) + 1
    for name in ("stop id", "stop text"):
        (stopped,) = seen[name]["sequences"]
        assert (stopped["tokens"], stopped["why"]) == (greedy["tokens"][:second], "stop")


def test_samples_of_one_request_differ_and_a_seed_brings_them_back(training):
    seen = training["sampling"]
    assert len({tuple(s["tokens"]) for s in seen["several"]["sequences"]}) > 1
    assert [s["tokens"] for s in seen["seeded"]["sequences"]] == [s["tokens"] for s in seen["seeded again"]["sequences"]]
    assert all(1 <= count <= 4 for count in seen["together"])
    assert len(seen["together"]) == 40


# ---- checkpoints


def test_resumed_equals_uninterrupted_and_not_cold(kept):
    seen = kept["states"]
    assert set(seen["loaded"]) == {seen["saved"]}
    warm, cold, onto = seen["stepped"]
    assert warm == onto == seen["whole"] != cold
    assert seen["rank"] == 4


def test_a_snapshot_stays_while_training_goes_on(kept):
    seen = kept["samplers"]
    assert seen["before"] == seen["unnamed"] == seen["named"]
    assert seen["later"] != seen["unnamed"]
    assert seen["base"] == "tiny"


def test_the_rest_client_sees_and_keeps_checkpoints(kept):
    seen, path = kept["rest"], kept["states"]["path"]
    assert seen["run"] == [path.split("/")[2], "tiny", 4, {"renderer_name": "role_colon"}, "weights/one"]
    assert seen["runs"]["total_count"] >= 6
    assert (seen["info"]["base_model"], seen["info"]["lora_rank"]) == ("tiny", 4)
    assert seen["first"] == seen["as before"] == {"weights/one": ["training", False, True, True]}
    assert seen["kept and public"] == {"weights/one": ["training", True, False, True]}
    assert seen["deleted"][0] == "NotFoundError"
    assert seen["sessions"] >= 1
    assert seen["user"]


def test_an_export_is_downloaded_in_pefts_layout(kept):
    assert kept["download"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert kept["download"]["adapter_model.safetensors"] > 10_000


# ---- errors


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("key", "AuthenticationError", "X-API-Key"),
        ("base model", "NotFoundError", "expected 'tiny'"),
        ("rank", "RequestFailedError", "expected 1 to 1024"),
        ("name", "RequestFailedError", "expected one segment"),
        ("absolute", "RequestFailedError", "expected one segment"),
        ("taken", "RequestFailedError", "is there already"),
        ("no checkpoint", "RequestFailedError", "there is no checkpoint"),
        ("no state", "NotFoundError", "there is no checkpoint"),
        ("no path", "ValueError", "tinker://"),
        ("loss", "RequestFailedError", "expected one of cross_entropy"),
        ("shape", "RequestFailedError", "datum 0, target_tokens: given shape [5], expected [8]"),
        ("infinite", "RequestFailedError", "given nan at position 0"),
        ("token", "RequestFailedError", "given token id 1000000"),
        ("config", "RequestFailedError", "no_such_key"),
        ("step", "RequestFailedError", "learning_rate"),
        ("weights", "RequestFailedError", "NaN or inf"),
        ("long prompt", "BadRequestError", "100000 tokens"),
        ("sampling", "UnprocessableEntityError", "temperature"),
        ("own loss", "ValueError", "of one's own"),
    ],
)
def test_what_a_user_does_wrong_is_said_at_once(kept, case, kind, words):
    given_kind, given_words, seconds = kept["errors"]["seen"][case]
    assert given_kind == kind, given_words
    assert words in given_words
    assert seconds < AT_ONCE_S


def test_a_model_goes_on_behind_errors(kept):
    assert kept["errors"]["behind"]


# ---- the `tinker` command


def test_the_tinker_command_lists_shows_and_deletes(client, kept):
    path = kept["states"]["path"]
    run = path.split("/")[2]
    listing = ["-f", "json", "checkpoint", "list", "--run-id", run]
    commands = [
        listing,
        ["-f", "json", "checkpoint", "info", path],
        ["checkpoint", "publish", path],
        ["checkpoint", "set-ttl", path, "--ttl", "7200"],
        ["-f", "json", "run", "list"],
        ["checkpoint", "delete", path, "--yes"],
        listing,
        ["checkpoint", "info", path],
    ]
    said = client("client_commands.py", json.dumps(commands))
    assert [code for code, _ in said[:-1]] == [0] * (len(commands) - 1)
    before, info, _, _, runs, _, after, gone = (text for _, text in said)
    assert path in before
    assert json.loads(info)["checkpoint_id"] == "weights/one"
    assert run in runs
    assert path not in after
    assert said[-1][0] != 0, gone
