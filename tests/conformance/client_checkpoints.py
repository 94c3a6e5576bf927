"""Checkpoints, the REST client and what goes wrong, through the SDK: what it gave, as JSON.

python client_checkpoints.py OUT
"""

import json
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import tinker
from tinker import types

ADAM = types.AdamParams(learning_rate=1e-2)


def datum(start: int, weight: float = 1.0, targets: int | None = None) -> types.Datum:
    tokens = [40 + (start + i) % 60 for i in range(9)]
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1 : 1 + (targets or 8)], dtype="int64"),
        "weights": types.TensorData(data=[weight] * (targets or 8), dtype="float32"),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def step(training: tinker.TrainingClient, start: int) -> None:
    gradient = training.forward_backward([datum(start), datum(start + 3)], "cross_entropy")
    update = training.optim_step(ADAM)
    gradient.result(), update.result()


def loss(training: tinker.TrainingClient) -> str:
    return training.forward([datum(1), datum(5)], "cross_entropy").result().metrics["loss:sum"].hex()


def model(service: tinker.ServiceClient, **options: Any) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=5, **options).result()


def states(service: tinker.ServiceClient) -> dict[str, Any]:
    """One step, a save, another step: as it went on, resumed, with a cold optimizer, and loaded onto a model."""
    training = model(service, user_metadata={"renderer_name": "role_colon"})
    step(training, 0)
    path = training.save_state(name="one", ttl_seconds=7200).result().path
    saved = loss(training)
    step(training, 2)
    whole = loss(training)
    warm = service.create_training_client_from_state_with_optimizer(path).result()
    cold = service.create_training_client_from_state(path).result()
    onto = model(service)
    onto.load_state_with_optimizer(path).result()
    loaded = [loss(client) for client in (warm, cold, onto)]
    for client in (warm, cold, onto):
        step(client, 2)
    stepped = [loss(client) for client in (warm, cold, onto)]
    return {
        "path": path,
        "saved": saved,
        "whole": whole,
        "loaded": loaded,
        "stepped": stepped,
        "rank": warm.get_info().lora_rank,
    }


def samplers(service: tinker.ServiceClient) -> dict[str, Any]:
    """A snapshot does not change while training goes on; a named one is the same weights."""
    training = model(service)
    step(training, 0)
    unnamed = training.save_weights_and_get_sampling_client()
    named = training.save_weights_for_sampler(name="one").result().path
    training.save_state(name="one").result()  # the same name, another kind
    prompt = types.ModelInput.from_ints([40, 41, 42, 43])
    before = unnamed.compute_logprobs(prompt).result()
    step(training, 2)
    opened = service.create_sampling_client(model_path=named).result()
    after = {"unnamed": unnamed, "named": opened, "later": training.save_weights_and_get_sampling_client()}
    seen = {name: client.compute_logprobs(prompt).result() for name, client in after.items()}
    return {"path": named, "before": before, **seen, "base": opened.get_base_model()}


def rest(service: tinker.ServiceClient, path: str, sampler_path: str) -> dict[str, Any]:
    """What is looked at and looked after."""
    client = service.create_rest_client()
    run = client.get_training_run_by_tinker_path(path).result()
    seen: dict[str, Any] = {
        "run": [run.training_run_id, run.base_model, run.lora_rank, run.user_metadata, run.last_checkpoint.checkpoint_id],
        "runs": client.list_training_runs(limit=2).result().cursor.model_dump(),
        "info": client.get_weights_info_by_tinker_path(path).result().model_dump(),
    }

    def mine() -> dict[str, Any]:
        found = client.list_checkpoints(run.training_run_id).result().checkpoints
        return {c.checkpoint_id: [c.checkpoint_type, c.public, c.expires_at is not None, c.size_bytes > 1000] for c in found}

    seen["first"] = mine()
    client.set_checkpoint_ttl_from_tinker_path(path, None).result()
    client.publish_checkpoint_from_tinker_path(path).result()
    seen["kept and public"] = mine()
    client.unpublish_checkpoint_from_tinker_path(path).result()
    client.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    seen["as before"] = mine()
    client.delete_checkpoint_from_tinker_path(sampler_path).result()
    seen["deleted"] = fails(lambda: client.get_weights_info_by_tinker_path(sampler_path).result())
    seen["sessions"] = len(client.list_sessions().result().sessions)
    everything = client.list_user_checkpoints().result()
    seen["user"] = len(everything.checkpoints) == everything.cursor.total_count
    return seen


def download(service: tinker.ServiceClient, path: str) -> dict[str, int]:
    """An export and the sizes of its files, fetched without a key."""
    training = service.create_training_client_from_state(path).result()
    external = training.save_weights_external(name="export").result().path
    urls = service.create_rest_client().get_external_weights_urls(external).result().urls
    return {file: len(urllib.request.urlopen(url).read()) for file, url in urls.items()}


def fails(call: Callable[[], Any]) -> list[Any]:
    """The error's name and words, and how long it took to come."""
    began = time.monotonic()
    try:
        given = call()
    except Exception as error:  # noqa: BLE001 - whatever the SDK makes of it is what a user sees
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", repr(given), time.monotonic() - began]


def errors(service: tinker.ServiceClient) -> dict[str, Any]:
    """Everything that a user may do wrong; the model must go on working behind each."""
    training, other = model(service), model(service)  # the SDK gives up the client whose own loss fails
    base = service.create_sampling_client(base_model="tiny").result()
    prompt = types.ModelInput.from_ints([40, 41])
    far = f"tinker://{'0' * 32}:train:0/weights/none"

    def gradient(data: list[types.Datum], name: Any = "cross_entropy", **options: Any) -> Any:
        return training.forward_backward(data, name, **options).result()

    def other_key() -> Any:
        stranger = tinker.ServiceClient(api_key="tml-" + "x" * 32)
        return stranger.create_lora_training_client(base_model="tiny", rank=4).result()

    nan = types.AdamParams(learning_rate=float("inf"))
    training.save_state(name="taken").result()
    seen = {
        "key": fails(other_key),
        "base model": fails(lambda: service.create_lora_training_client(base_model="gpt-9", rank=4).result()),
        "rank": fails(lambda: service.create_lora_training_client(base_model="tiny", rank=4000).result()),
        "name": fails(lambda: training.save_state(name="../../etc").result()),
        "absolute": fails(lambda: training.save_weights_for_sampler(name="/tmp/x").result()),
        "taken": fails(lambda: training.save_state(name="taken").result()),
        "no checkpoint": fails(lambda: training.load_state(far).result()),
        "no state": fails(lambda: service.create_training_client_from_state(far).result()),
        "no path": fails(lambda: service.create_sampling_client(model_path="/etc/passwd").result()),
        "loss": fails(lambda: gradient([datum(0)], "no_such_loss")),
        "shape": fails(lambda: gradient([datum(0, targets=5)])),
        "infinite": fails(lambda: gradient([datum(0, weight=float("nan"))])),
        "token": fails(lambda: gradient([far_token()])),
        "config": fails(lambda: gradient([datum(0)], loss_fn_config={"no_such_key": 1.0})),
        "step": fails(lambda: training.optim_step(nan).result()),
        "long prompt": fails(
            lambda: base.sample(types.ModelInput.from_ints([40] * 100_000), 1, types.SamplingParams()).result()
        ),
        "sampling": fails(lambda: base.sample(prompt, 1, types.SamplingParams(temperature=-1.0)).result()),
        "weights": fails(lambda: overflowing(service)),
        "own loss": fails(lambda: other.forward_backward_custom([datum(0)], broken).result()),
    }
    step(training, 0)
    return {"seen": seen, "behind": np.isfinite(float.fromhex(loss(training))).item()}


def far_token() -> types.Datum:
    target = types.TensorData(data=[40], dtype="int64")
    return types.Datum(model_input=types.ModelInput.from_ints([10**6]), loss_fn_inputs={"target_tokens": target})


def overflowing(service: tinker.ServiceClient) -> Any:
    """Weights of 1e30 make log-probabilities that are no numbers."""
    training = model(service)
    training.forward_backward([datum(0)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e30)).result()
    return training.forward([datum(0)], "cross_entropy").result()


def broken(data: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    raise ValueError("the loss of one's own fails")


def main(out: str) -> None:
    with tinker.ServiceClient(user_metadata={"program": "conformance"}) as service:
        seen: dict[str, Any] = {"states": states(service), "samplers": samplers(service)}
        path, sampler = seen["states"]["path"], seen["samplers"]["path"]
        seen["download"] = download(service, path)
        seen["rest"] = rest(service, path, sampler)
        seen["errors"] = errors(service)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main(sys.argv[1])
