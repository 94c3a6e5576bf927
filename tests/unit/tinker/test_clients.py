"""What the clients promise whatever the engine: the order, the batches, the futures, the places, the errors, the end."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from client_engine import WritingEngine

from agentlightning import checkpoint_utils
from agentlightning.errors import CheckpointError, ConfigError, UserError
from agentlightning.tinker import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, dispatch, engine, service_client
from agentlightning.tinker.dispatch import ClosedError, EngineThread
from agentlightning.tinker.places import Places

ADAM = AdamParams(learning_rate=0.5)


def datum(*tokens, **inputs):
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": list(tokens), **inputs})


@pytest.fixture
def toy(monkeypatch):
    made = WritingEngine()
    monkeypatch.setattr(engine, "open_engine", lambda name, **options: made)
    return made


@pytest.fixture
def service(toy, tmp_path):
    with ServiceClient(backend="inprocess", root=tmp_path) as client:
        yield client


@pytest.fixture
def client(service):
    return service.create_lora_training_client("toy", rank=4)


def held(client):
    """A call that holds the engine's thread until `go_on` is set."""
    return client.forward_backward([], "wait")


# -- order and errors ---------------------------------------------------------------------------------------------------


def test_calls_are_done_in_the_order_they_were_asked_for_whoever_waits_for_which(toy, client):
    first = held(client)
    later = [client.optim_step(AdamParams(learning_rate=float(i))) for i in range(20)]
    assert not any(future.done() for future in later)
    toy.go_on.set()
    assert later[-1].result(30).metrics == {"grad_norm:mean": 0.0}
    assert first.done()
    assert [call[1] for call in toy.calls if call[0] == "optim_step"] == [float(i) for i in range(20)]


def test_an_error_comes_out_of_result_as_it_is_and_the_calls_behind_it_are_done(toy, client):
    failed, behind = client.forward_backward([datum(1)], "unknown"), client.optim_step(ADAM)
    with pytest.raises(UserError, match="loss_fn='unknown'"):
        failed.result(30)
    with pytest.raises(UserError, match="loss_fn='unknown'"):
        asyncio.run(failed.result_async())
    assert behind.result(30).metrics is not None


def test_data_are_taken_as_they_are_when_the_call_is_made(toy, client):
    data = [datum(1)]
    holding = held(client)
    future = client.forward_backward(data, "cross_entropy")
    data.append(datum(2))
    toy.go_on.set()
    assert len(future.result(30).loss_fn_outputs) == 1
    assert holding.result(30).loss_fn_outputs == []


def test_a_base_that_cannot_be_opened_is_tried_again_by_the_next_call(monkeypatch, tmp_path):
    attempts = [UserError("no model at 'toy'"), WritingEngine()]

    def open_engine(name, **options):
        attempt = attempts.pop(0)
        if isinstance(attempt, Exception):
            raise attempt
        return attempt

    monkeypatch.setattr(engine, "open_engine", open_engine)
    with ServiceClient(backend="inprocess", root=tmp_path) as service:
        with pytest.raises(UserError, match="no model at 'toy'"):
            service.create_lora_training_client("toy")
        assert service.create_lora_training_client("toy").get_info().lora_rank == 32


# -- futures ------------------------------------------------------------------------------------------------------------


def test_giving_up_waiting_takes_nothing_back(toy, client):
    holding, step = held(client), client.optim_step(ADAM)
    with pytest.raises(TimeoutError):
        step.result(0.01)

    async def give_up():
        with pytest.raises(TimeoutError):
            await step.result_async(0.01)
        task = asyncio.create_task(step.coroutine())
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(give_up())
    toy.go_on.set()
    assert step.result(30).metrics is not None
    assert holding.future().done()


def test_async_methods_give_futures_that_can_be_awaited_in_both_ways(toy, service):
    async def loop():
        client = await service.create_lora_training_client_async("toy", rank=8)
        backward = await client.forward_backward_async([datum(1, 2)], "cross_entropy")
        step = await client.optim_step_async(ADAM)
        assert (await backward.result_async()).metrics == {"loss:sum": 1.0}
        assert (await step).metrics == {"grad_norm:mean": 0.0}
        assert (await client.get_info_async()).lora_rank == 8
        sampler = await client.save_weights_and_get_sampling_client_async()
        answer = await sampler.sample_async(ModelInput.from_ints([5, 6]), 2, SamplingParams())
        assert [sequence.tokens for sequence in answer.sequences] == [[5, 6], [5, 6]]
        assert await sampler.compute_logprobs_async(ModelInput.from_ints([5, 6])) == [None, -0.5]

    asyncio.run(loop())


def test_a_client_may_be_asked_for_as_a_future_as_the_newest_sdk_does(service):
    client = service.create_lora_training_client("toy").result()
    assert client.save_weights_and_get_sampling_client().result().get_base_model() == "toy"

    async def loop():
        return await service.create_sampling_client(base_model="toy")

    assert asyncio.run(loop()).get_base_model() == "toy"


# -- sampling -----------------------------------------------------------------------------------------------------------


def ask(sampler, *tokens, **params):
    return sampler.sample(ModelInput.from_ints(tokens), 1, SamplingParams(**params))


def test_what_is_asked_for_before_anybody_waits_is_one_batch(toy, client):
    sampler = client.save_weights_and_get_sampling_client()
    futures = [ask(sampler, i + 20) for i in range(15)]
    time.sleep(0.05)  # the engine's thread could begin, and must not
    futures += [ask(sampler, i + 20) for i in range(15, 30)]
    assert futures[7].result(30).sequences[0].tokens == [27]
    assert [future.result(30).sequences[0].tokens for future in futures] == [[i + 20] for i in range(30)]
    assert [len(call[1]) for call in toy.calls] == [30]


def test_tasks_of_an_event_loop_are_sampled_together(toy, client, monkeypatch):
    sampler = client.save_weights_and_get_sampling_client()
    sample_now, waiting = EngineThread._sample_now, []

    def note(thread):
        waiting.append(len(thread._samples))
        sample_now(thread)

    monkeypatch.setattr(EngineThread, "_sample_now", note)

    async def loop():
        await asyncio.gather(*(sampler.sample_async(ModelInput.from_ints([i + 20]), 1, SamplingParams()) for i in range(30)))

    asyncio.run(loop())
    assert waiting[0] == 30  # when the first one began to wait
    assert [len(call[1]) for call in toy.calls] == [30]


def test_a_batch_begins_although_nobody_waits(client, monkeypatch):
    monkeypatch.setattr(dispatch, "_QUIET_S", 0.01)
    finished = threading.Event()
    ask(client.save_weights_and_get_sampling_client(), 1)._inner.add_done_callback(lambda _: finished.set())
    assert finished.wait(30)


def test_whoever_polls_is_waiting(client):
    future = ask(client.save_weights_and_get_sampling_client(), 1)
    assert wait([future.future()], 30).not_done == set()
    assert future.done()


def test_a_request_that_is_refused_fails_alone(client):
    sampler = client.save_weights_and_get_sampling_client()
    good, bad, other = ask(sampler, 1), ask(sampler, 13), ask(sampler, 2)
    assert (good.result(30).sequences[0].tokens, other.result(30).sequences[0].tokens) == ([1], [2])
    with pytest.raises(UserError, match="unlucky"):
        bad.result(30)


def test_streams_do_not_repeat_but_come_again_after_a_resume_and_with_a_seed(toy, client):
    def streams(of):
        sampler = of.save_weights_and_get_sampling_client()
        futures = [ask(sampler, 1), ask(sampler, 1), ask(sampler, 2), ask(sampler, 1, seed=3), ask(sampler, 1, seed=3)]
        futures[0].result(30)
        return toy.calls[-1][1]

    client.forward_backward([datum(1)], "cross_entropy")
    client.optim_step(ADAM)
    saved = client.save_state("a").result(30).path
    first = streams(client)
    assert len(set(first)) == 4  # the seeded ones are the same
    assert first[3] == first[4]
    client.optim_step(ADAM)
    second = streams(client)
    assert not set(first[:3]) & set(second[:3])
    client.load_state(saved)
    assert streams(client) == first


def test_samplers_that_nobody_holds_are_dropped_but_not_before_their_answers(toy, client):
    holding = held(client)
    future = ask(asyncio.run(_sampler_behind(toy, client)), 1)
    gc.collect()
    assert future.result(30).sequences[0].tokens == [1]
    del future
    assert holding.done()
    deadline = time.monotonic() + 30
    while toy.samplers and time.monotonic() < deadline:  # the thread lets go of a request just behind its answer
        gc.collect()
        client.optim_step(ADAM).result(30)
    assert toy.samplers == {}


async def _sampler_behind(toy, client):
    toy.go_on.set()
    return await client.save_weights_and_get_sampling_client_async()


@pytest.mark.parametrize(("tokens", "number", "words"), [([], 1, "no token"), ([1], 0, "num_samples=0")])
def test_impossible_requests_are_refused_at_once(client, tokens, number, words):
    sampler = client.save_weights_and_get_sampling_client()
    with pytest.raises(UserError, match=words):
        sampler.sample(ModelInput.from_ints(tokens), number, SamplingParams())


# -- a loss of one's own ------------------------------------------------------------------------------------------------


def test_a_custom_loss_becomes_weights_that_are_its_derivatives(toy, client):
    def loss_fn(data, logprobs):
        assert [len(d.loss_fn_inputs["target_tokens"].data) for d in data] == [2, 1]
        return (logprobs[0] ** 3).sum() + logprobs[0].sum() * 2, {"mine:mean": 7.0}

    future = client.forward_backward_custom([datum(1, 2), datum(3)], loss_fn)
    step = client.optim_step(ADAM)
    metrics = future.result(30).metrics
    assert step.result(30)
    assert toy.names == ["forward", "forward_backward", "optim_step"]
    weights = [d.loss_fn_inputs["weights"].tolist() for d in toy.calls[1][2]]
    assert weights == [[-5.0, -5.0], [0.0]]  # -(3 logp^2 + 2) at logp = -1; the second datum has no part in it
    assert metrics == {"loss:sum": -6.0, "surrogate_loss:sum": 2.0, "mine:mean": 7.0}


def test_a_custom_loss_that_cannot_be_differentiated_or_raises_trains_nothing(toy, client):
    with pytest.raises(UserError, match="does not depend"):
        client.forward_backward_custom([datum(1)], lambda data, logprobs: (torch.tensor(1.0), {})).result(30)
    with pytest.raises(ZeroDivisionError):
        client.forward_backward_custom([datum(1)], lambda data, logprobs: 1 / 0).result(30)
    with pytest.raises(UserError, match=r"data\[0\].* target_tokens"):
        client.forward_backward_custom([Datum(ModelInput.from_ints([1]))], lambda data, logprobs: None).result(30)
    assert toy.names == ["forward", "forward"]


# -- saves --------------------------------------------------------------------------------------------------------------


def test_a_name_saved_again_leaves_what_a_record_names_as_it_is(toy, client, service, tmp_path):
    checkpoint_utils.save_checkpoint(client, "last", tmp_path / "log", {"batch": 1}, kind="both")
    client.optim_step(ADAM)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    saved = client.save_state("last").result(30).path  # killed here: the record is the old one
    assert all(path.read_bytes() == data for path, data in before.items())
    record = checkpoint_utils.get_last_checkpoint(tmp_path / "log")
    assert record is not None
    assert (record.batch, Path(record.state_path).name, Path(saved).name) == (1, "last", "last-2")
    other = service.create_lora_training_client("toy")  # the resumed loop saves the same name
    checkpoint_utils.save_checkpoint(other, "last", tmp_path / "log", {"batch": 1}, kind="both")
    assert Path(record.state_path).exists()


def test_what_is_saved_says_what_it_is_of(service, tmp_path):
    client = service.create_lora_training_client("toy", rank=4, user_metadata={"who": "me"})
    path = Path(client.save_state("a").result(30).path)
    about = json.loads((path.parents[1] / "run.json").read_text())
    assert (about["model_id"], about["user_metadata"], about["lora"]["rank"]) == (client.model_id, {"who": "me"}, 4)


def test_a_client_from_a_state_has_its_base_and_shape(toy, service):
    path = service.create_lora_training_client("toy", rank=3, train_mlp=False).save_state("a").result(30).path
    warm = service.create_training_client_from_state_with_optimizer(path)
    cold = service.create_training_client_from_state(path)
    assert [client.get_info().lora_rank for client in (warm, cold)] == [3, 3]
    assert [call[2] for call in toy.calls if call[0] == "load_state"] == [True, False]
    assert toy.models[warm.model_id][0].train_mlp is False


def test_load_state_is_with_the_optimizer_unless_told_otherwise(toy, client):
    path = client.save_state("a").result(30).path
    client.load_state(path)
    client.load_state_with_optimizer(path)
    client.load_state(path, optimizer=False).result(30)
    assert [call[1:] for call in toy.calls] == [(path, True), (path, True), (path, False)]


def test_a_tinker_url_leads_below_the_root_and_nowhere_else(client, service):
    client.save_state("a").result(30)
    client.load_state(f"tinker://{client.model_id}/weights/a").result(30)
    for url in (f"tinker://{client.model_id}/weights/..", "tinker://../weights/a", "tinker://a/b/c", "s3://bucket/a"):
        with pytest.raises(UserError):
            client.load_state(url).result(30)
    with pytest.raises(UserError, match="is no directory"):
        service.create_training_client_from_state("nowhere")
    with pytest.raises(CheckpointError, match="no saved model"):
        service.create_sampling_client(model_path=str(Path(__file__).parent))


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", ".a", "a\n", "a.pt", "a.expires", "x" * 129, 7])
def test_odd_names_are_refused_before_anything_is_saved(client, name, tmp_path):
    with pytest.raises(UserError, match="cannot be named"):
        client.save_state(name)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_has_expired_goes_but_never_the_newest_state(client, tmp_path):
    with pytest.raises(UserError, match="ttl_seconds=0"):
        client.save_state("a", ttl_seconds=0)
    old, sampler = client.save_state("old", ttl_seconds=5), client.save_weights_for_sampler("old", ttl_seconds=5)
    kept = client.save_state("kept", ttl_seconds=5)
    paths = [Path(future.result(30).path) for future in (old, sampler, kept)]
    for path in paths:
        path.with_name(f"{path.name}.expires").write_text("1\n")
    os.utime(paths[0], (1, 1))
    Places(tmp_path).expire(paths[0], None)
    assert [path.exists() for path in paths] == [False, False, True]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["kept", "kept.expires", "kept.pt"]


# -- the service client and its end -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [({"backend": "gpu"}, "backend='gpu'"), ({"backend": "ray", "api_key": "tml-x"}, "no address")],
)
def test_options_that_cannot_be_are_refused_before_the_engine_starts(options, words):
    with pytest.raises(ConfigError, match=words):
        ServiceClient(**options)


def test_a_base_or_weights_are_sampled_not_both(service):
    for given in ({}, {"base_model": "toy", "model_path": "somewhere"}):
        with pytest.raises(UserError, match="create_sampling_client was given"):
            service.create_sampling_client(**given)


def test_capabilities_name_what_is_open(service):
    assert [model.model_name for model in service.get_server_capabilities().supported_models] == ["tiny"]
    service.create_sampling_client(base_model="toy")
    models = asyncio.run(service.get_server_capabilities_async()).supported_models
    assert [(model.model_name, model.max_context_length) for model in models] == [("tiny", None), ("toy", 64)]


def test_the_end_finishes_what_was_asked_for(toy, tmp_path):
    with ServiceClient(backend="inprocess", root=tmp_path) as service:
        client = service.create_lora_training_client("toy")
        holding, step = held(client), client.optim_step(ADAM)
        toy.go_on.set()
    assert holding.done()
    assert step.result(0).metrics
    assert toy.closed
    with pytest.raises(ClosedError):
        client.optim_step(ADAM)
    with pytest.raises(UserError, match="closed"):
        service.create_lora_training_client("toy")
    service.close().result(30)


def test_an_error_on_its_way_out_does_not_wait_for_what_has_not_begun(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(service_client, "_IMPATIENT_S", 0.01)
    futures = []

    def loop():
        with ServiceClient(backend="inprocess", root=tmp_path) as service:
            client = service.create_lora_training_client("toy")
            held(client)
            assert toy.entered.wait(30)
            futures.extend([client.optim_step(ADAM), client.forward([datum(1)], "cross_entropy")])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    for future in futures:
        with pytest.raises(ClosedError):
            future.result(0)
    toy.go_on.set()


def test_closing_an_engine_that_was_never_opened_opens_none():
    thread = EngineThread(lambda: pytest.fail("opened"))
    thread.close().result(30)
    with pytest.raises(ClosedError):
        thread.submit(lambda engine: None)


HANGING = """
import sys, types
from agentlightning.tinker import ServiceClient
sys.path.insert(0, {here!r})
from client_engine import WritingEngine
toy = WritingEngine()
engine = types.SimpleNamespace(open_engine=lambda name, **options: toy)
sys.modules["agentlightning.tinker.engine"] = engine  # without torch, whose import takes longer than all the rest
client = ServiceClient(backend="inprocess", root={root!r}).create_lora_training_client("toy")
holding = client.forward_backward([], "wait")
toy.entered.wait()
sys.stdout.write("waiting\\n"), sys.stdout.flush()
{then}
"""


@pytest.mark.parametrize("then", ["holding.result()", "__import__('asyncio').run(holding.result_async())"])
def test_ctrl_c_ends_a_loop_that_waits_and_no_thread_keeps_the_process(then, tmp_path):
    code = "import agentlightning.tinker.dispatch as d; d._LEAVING_S = 0.1" + HANGING
    code = code.format(here=str(Path(__file__).parent), root=str(tmp_path), then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_importing_the_names_is_light():
    code = (
        "import sys; from agentlightning.tinker import ServiceClient, TrainingClient, SamplingClient, APIFuture, types, Datum"
    )
    heavy = "sys.stdout.write(' '.join({'torch', 'ray', 'transformers', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
