"""A client that does nothing for a while, and goes on with what it holds.

python client_idle.py OUT        says "idle" when it begins to wait, and goes on at the next line of its input
"""

import json
import sys
from typing import Any

import tinker
from tinker import types


def datum() -> types.Datum:
    tokens = list(range(40, 50))
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64"),
        "weights": types.TensorData(data=[1.0] * 9, dtype="float32"),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def look(training: tinker.TrainingClient, sampler: tinker.SamplingClient) -> dict[str, Any]:
    prompt = types.ModelInput.from_ints([40, 41, 42, 43])
    loss = training.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
    return {"loss": loss.hex(), "logprobs": sampler.compute_logprobs(prompt).result()}


def main(out: str) -> None:
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=5).result()
    training.forward_backward([datum()], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    sampler = training.save_weights_and_get_sampling_client()
    training.forward_backward([datum()], "cross_entropy").result()  # a gradient that waits for its step
    before = look(training, sampler)
    sys.stdout.write("idle\n")
    sys.stdout.flush()
    sys.stdin.readline()
    after = look(training, sampler)
    norm = training.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics
    stepped = look(training, sampler)
    saved = training.save_state(name="behind").result().path
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"before": before, "after": after, "norm": norm, "stepped": stepped, "saved": saved}, file)


if __name__ == "__main__":
    main(sys.argv[1])
