"""Training and sampling through the SDK: what it gave, as JSON.

python client_training.py OUT
"""

import json
import sys
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")
CONFIG = {"ppo": {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}, "dro": {"beta": 0.2}}
MANY = 1100  # the SDK sends more than 1,024 in chunks, and the first chunk last
LENGTHS = (5, 9, 7)


def client(service: tinker.ServiceClient, seed: int = 3) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=seed).result()


def rows() -> list[dict[str, Any]]:
    """Three sequences with all that any loss reads. Ratios lie around 1, some outside of the clips."""
    rng = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        tokens = rng.integers(32, 127, length + 1).tolist()
        signs = rng.choice([-1.0, 1.0], length)
        advantages = np.where(np.arange(length) < 2, 0.0, signs * rng.uniform(0.5, 1.5, length))
        made.append({
            "tokens": tokens[:-1], "targets": tokens[1:], "weights": rng.uniform(0, 1, length).astype(np.float32).tolist(),
            "advantages": advantages.astype(np.float32).tolist(), "drift": rng.normal(0, 0.2, length).tolist(),
        })  # fmt: skip
    return made


def datum(row: dict[str, Any], loss: str, logprobs: list[float]) -> types.Datum:
    columns: dict[str, Any] = {"target_tokens": types.TensorData(data=row["targets"], dtype="int64")}
    if loss == "cross_entropy":
        columns["weights"] = types.TensorData(data=row["weights"], dtype="float32")
    else:
        columns["logprobs"] = types.TensorData(data=logprobs, dtype="float32")
        columns["advantages"] = types.TensorData(data=row["advantages"], dtype="float32")
    return types.Datum(model_input=types.ModelInput.from_ints(row["tokens"]), loss_fn_inputs=columns)


def logprobs_of(output: types.ForwardBackwardOutput) -> list[list[float]]:
    return [fields["logprobs"].tolist() for fields in output.loss_fn_outputs]


def losses(training: tinker.TrainingClient) -> dict[str, Any]:
    """Each built-in loss on the same data; the sampler's log-probabilities are the model's own, moved a little."""
    data = rows()
    plain = training.forward([datum(row, "cross_entropy", []) for row in data], "cross_entropy").result()
    own = logprobs_of(plain)
    moved = [np.float32(np.array(p) + np.array(row["drift"])).tolist() for p, row in zip(own, data, strict=True)]
    seen: dict[str, Any] = {"rows": data, "sampler": moved, "config": CONFIG, "losses": {}}
    for loss in LOSSES:
        batch = [datum(row, loss, p) for row, p in zip(data, moved, strict=True)]
        future = training.forward_backward(batch, loss, loss_fn_config=CONFIG.get(loss))
        step = training.optim_step(types.AdamParams(learning_rate=0.0))  # only to learn the gradient's norm, and drop it
        output = future.result()
        seen["losses"][loss] = {"logprobs": logprobs_of(output), "metrics": output.metrics, "step": step.result().metrics}
    return seen


def custom(service: tinker.ServiceClient) -> dict[str, Any]:
    """Cross-entropy as a loss of one's own, beside the built-in one: the same model before, and so behind the step."""
    data, adam = [datum(row, "cross_entropy", []) for row in rows()], types.AdamParams(learning_rate=1e-2)
    weights = [torch.tensor(row["weights"]) for row in rows()]

    def own(batch: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = -sum((p * w).sum() for p, w in zip(logprobs, weights, strict=True))
        return total, {"seen": float(len(batch))}

    built_in, by_hand = client(service), client(service)
    first = built_in.forward_backward(data, "cross_entropy").result()
    built_in.optim_step(adam).result()
    second = by_hand.forward_backward_custom(data, own).result()
    by_hand.optim_step(adam).result()
    behind = [logprobs_of(model.forward(data, "cross_entropy").result()) for model in (built_in, by_hand)]
    return {"metrics": [first.metrics, second.metrics], "before": logprobs_of(first), "behind": behind}


def chunked(service: tinker.ServiceClient) -> dict[str, Any]:
    """So many data that the SDK sends chunks; the same in two calls that it does not cut."""
    one = rows()[0]
    data = [datum({**one, "weights": [i / MANY] * len(one["tokens"])}, "cross_entropy", []) for i in range(MANY)]
    adam = types.AdamParams(learning_rate=1e-2)
    whole, halves = client(service), client(service)
    output = whole.forward_backward(data, "cross_entropy").result()
    parts = [halves.forward_backward(part, "cross_entropy") for part in (data[: MANY // 2], data[MANY // 2 :])]
    sums = [part.result().metrics["loss:sum"] for part in parts]
    norms = [model.optim_step(adam).result().metrics for model in (whole, halves)]
    return {"count": len(output.loss_fn_outputs), "sum": output.metrics["loss:sum"], "parts": sums, "norms": norms}


def sampling(service: tinker.ServiceClient, training: tinker.TrainingClient) -> dict[str, Any]:
    """Many ways to ask."""
    base = service.create_sampling_client(base_model="tiny").result()
    tuned = training.save_weights_and_get_sampling_client()
    tokenizer = training.get_tokenizer()
    question = [{"role": "user", "content": "12 hats and 34 more. How many now?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prompt = types.ModelInput.from_ints(tokenizer.encode(text, add_special_tokens=False))

    def ask(client: tinker.SamplingClient, count: int = 1, scores: bool = False, top: int = 0, **params: Any) -> Any:
        params = {"max_tokens": 6, "temperature": 0.0, **params}
        return client.sample(
            prompt, count, types.SamplingParams(**params), include_prompt_logprobs=scores, topk_prompt_logprobs=top
        )

    futures = {
        "greedy": ask(base, scores=True, top=2),
        "no stop": ask(base, stop=[]),
        "several": ask(base, 3, temperature=1.0),
        "seeded": ask(base, 2, temperature=1.0, seed=11),
        "seeded again": ask(base, 2, temperature=1.0, seed=11),
        "tuned": ask(tuned, scores=True),
    }
    answers = {name: sample_of(future.result()) for name, future in futures.items()}
    second = answers["greedy"]["sequences"][0]["tokens"][1]
    answers["stop id"] = sample_of(ask(base, stop=[second]).result())
    answers["stop text"] = sample_of(ask(base, stop=[tokenizer.decode([second])]).result())
    answers["prompt tokens"] = prompt.to_ints()
    together = [ask(base, temperature=1.0, max_tokens=4) for _ in range(40)]
    answers["together"] = [len(future.result().sequences[0].tokens) for future in together]
    answers["computed"] = base.compute_logprobs(prompt).result()
    return answers


def sample_of(answer: types.SampleResponse) -> dict[str, Any]:
    sequences = [{"tokens": list(s.tokens), "logprobs": list(s.logprobs or ()), "why": s.stop_reason} for s in answer.sequences]
    return {"sequences": sequences, "prompt": answer.prompt_logprobs, "top": answer.topk_prompt_logprobs}


def main(out: str) -> None:
    with tinker.ServiceClient(user_metadata={"program": "conformance"}) as service:
        rest = service.create_rest_client()
        capabilities = [model.model_name for model in rest.get_server_capabilities().result().supported_models]
        training = client(service)
        info = training.get_info()
        seen = {
            "capabilities": capabilities,
            "info": {"rank": info.lora_rank, "name": info.model_data.model_name, "is_lora": info.is_lora},
            "losses": losses(training),
            "custom": custom(service),
            "chunked": chunked(service),
            "sampling": sampling(service, training),
        }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main(sys.argv[1])
