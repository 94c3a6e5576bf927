"""With an address the same words go to a server through the `tinker` SDK; here a stand-in for it, which says what it was told.

The real SDK against a real server is tests/conformance's.
"""

import asyncio
import sys
from concurrent.futures import Future as ConcurrentFuture
from types import SimpleNamespace

import numpy as np
import pytest

from agentlightning.errors import ConfigError
from agentlightning.tinker import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData, TrainingClient

URL = "http://127.0.0.1:8000"


class Recorder:
    """Every method writes down its name and arguments, and gives a future of the answer of that name."""

    def __init__(self, **answers):
        self.calls, self.answers = [], answers
        self.model_id = "session:train:0"

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            future = ConcurrentFuture()
            future.set_result(self.answers[name])
            return SimpleNamespace(future=lambda: future)

        return call


def tensor(dtype, data, shape, rows=None, columns=None):
    return SimpleNamespace(dtype=dtype, data=data, shape=shape, sparse_crow_indices=rows, sparse_col_indices=columns)


@pytest.fixture
def sdk(monkeypatch):
    """`tinker`, with types that are dictionaries."""
    sampling = Recorder(
        sample=SimpleNamespace(
            sequences=[SimpleNamespace(stop_reason="stop", tokens=[7], logprobs=[-1.0], topk_logprobs=[[(7, -1.0)]])],
            prompt_logprobs=[None, -0.5],
            topk_prompt_logprobs=None,
            target_prompt_logprobs=tensor("float32", [-2.0], [1, 3], [0, 1], [2]),
            prompt_alt_tokens=SimpleNamespace(tokens=tensor("int64", [4], [1, 1]), logprobs=tensor("float32", [-3.0], [1, 1])),
        ),
        compute_logprobs=[None, -0.5],
    )
    output = SimpleNamespace(
        loss_fn_output_type="x",
        loss_fn_outputs=[{"logprobs": tensor("float32", [-1.0, -2.0], [2])}],
        metrics={"loss:sum": 3.0},
    )
    training = Recorder(
        forward_backward=output,
        forward_backward_custom=output,
        optim_step=SimpleNamespace(metrics={"a:sum": 1.0}),
        save_state=SimpleNamespace(path="tinker://m/weights/a"),
        load_state=None,
        load_state_with_optimizer=None,
        save_weights_and_get_sampling_client=sampling,
    )
    service = Recorder(create_lora_training_client=training, create_training_client_from_state=training, close=None)
    types = SimpleNamespace(
        ModelInput=SimpleNamespace(from_ints=lambda tokens: list(tokens)),
        **dict.fromkeys(("Datum", "TensorData", "AdamParams", "SamplingParams"), dict),
    )
    made = SimpleNamespace(service=service, training=training, sampling=sampling, given=None)

    def service_client(**options):
        made.given = options
        return service

    monkeypatch.setitem(sys.modules, "tinker", SimpleNamespace(ServiceClient=service_client, types=types))
    monkeypatch.setitem(sys.modules, "tinker.types", types)
    return made


def test_the_same_words_reach_the_server_and_its_answers_come_back_as_ours(sdk):
    with ServiceClient(base_url=URL, api_key="tml-x") as service:
        client = service.create_lora_training_client("base", rank=4, train_mlp=False)
        assert isinstance(client, TrainingClient)
        data = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 0.5]})]
        output = client.forward_backward(data, "cross_entropy", {"a": 1.0}).result()
        np.testing.assert_array_equal(output.loss_fn_outputs[0]["logprobs"].to_numpy(), np.float32([-1, -2]))
        assert isinstance(output.loss_fn_outputs[0]["logprobs"], TensorData)
        assert client.optim_step(AdamParams(learning_rate=0.5)).result().metrics == {"a:sum": 1.0}
        assert asyncio.run(_save(client)) == "tinker://m/weights/a"
        client.load_state("tinker://m/weights/a").result()
        client.load_state("tinker://m/weights/a", optimizer=False).result()
        sampler = client.save_weights_and_get_sampling_client()
        assert sampler.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(seed=3)).result().sequences[0].tokens == [7]
        assert sampler.compute_logprobs(ModelInput.from_ints([1, 2])).result() == [None, -0.5]
    assert sdk.given == {"user_metadata": None, "base_url": URL, "api_key": "tml-x"}
    assert [name for name, _, _ in sdk.service.calls] == ["create_lora_training_client", "close"]
    name, (sent, loss_fn, config), _ = sdk.training.calls[0]
    assert (name, loss_fn, config) == ("forward_backward", "cross_entropy", {"a": 1.0})
    assert sent[0]["loss_fn_inputs"]["weights"] == vars(tensor("float32", [1.0, 0.5], [2]))
    assert sent[0]["loss_fn_inputs"]["target_tokens"] == vars(tensor("int64", [2, 3], [2]))
    assert sdk.training.calls[1][1][0]["learning_rate"] == 0.5
    loads = [name for name, _, _ in sdk.training.calls if name.startswith("load_state")]
    assert loads == ["load_state_with_optimizer", "load_state"]
    assert sdk.sampling.calls[0][1][2]["seed"] == 3


def test_what_a_sample_shall_tell_of_beside_its_tokens(sdk):
    sampler = ServiceClient(base_url=URL).create_lora_training_client("base").save_weights_and_get_sampling_client()
    named = TensorData([9], "int64", [1, 3], [0, 1], [2])
    answer = sampler.sample(
        ModelInput.from_ints([1, 2]),
        1,
        SamplingParams(),
        topk_sample_logprobs=1,
        target_prompt_logprobs=named,
        prompt_alt_tokens_k=1,
    ).result()
    assert sdk.sampling.calls[0][1][3:] == (False, 0, 1, vars(tensor("int64", [9], [1, 3], [0, 1], [2])), 1)
    assert answer.sequences[0].topk_logprobs == [[(7, -1.0)]]
    assert answer.target_prompt_logprobs.tolist(pad_value=5) == [[5, 5, -2]]
    assert (answer.prompt_alt_tokens.tokens.tolist(), answer.prompt_alt_tokens.logprobs.tolist()) == ([[4]], [[-3.0]])


async def _save(client):
    future = await client.save_state_async("a", ttl_seconds=60)
    return (await future.result_async()).path


def test_a_custom_loss_sees_our_data(sdk):
    client = ServiceClient(base_url=URL).create_lora_training_client("base")
    data = [Datum(ModelInput.from_ints([1]), {"target_tokens": [2]})]
    seen = []
    client.forward_backward_custom(data, lambda given, logprobs: seen.append((given, logprobs))).result()
    sdk.training.calls[0][1][1]("the SDK's data", ["logprobs"])
    assert seen == [(data, ["logprobs"])]


def test_the_address_may_come_from_the_environment_but_not_over_a_backend(sdk, monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", URL)
    ServiceClient()
    assert sdk.given["base_url"] == URL
    assert type(ServiceClient(backend="inprocess")) is ServiceClient
    with pytest.raises(ConfigError, match=r"address .* and num_threads, backend"):
        ServiceClient(base_url=URL, num_threads=1, backend="ray")


def test_without_the_sdk_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(ConfigError, match="pip install tinker"):
        ServiceClient(base_url=URL)
