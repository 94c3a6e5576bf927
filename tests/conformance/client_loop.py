"""A policy-gradient loop in the words of the tinker SDK, which never hears of a server that is killed under it.

    python client_loop.py STEPS OUT        with TINKER_BASE_URL and TINKER_API_KEY

Each step: snapshot the weights, sample several prompts at a time, score, forward_backward and optim_step (sent before the first
is answered), save the state, and a line in OUT with all that was seen, floats to the last bit. The lines are the same in every
run if the server is `--reproducible`: else the company in a batch changes a log-probability by its last bits.
"""

import json
import sys

import tinker
from tinker import types

PROMPTS = 2
GROUP = 4
DIGITS = "0123456789"


def main(steps: int, out: str) -> None:
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    tokenizer = training.get_tokenizer()
    with open(out, "w", encoding="utf-8") as lines:
        for step in range(steps):
            sampler = training.save_weights_and_get_sampling_client()
            seen, data = [], []
            texts = [f"{step + 3} hats and {number + 2} more. How many now?" for number in range(PROMPTS)]
            prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            answers = [sample(sampler, prompt) for prompt in prompts]
            for prompt, answer in zip(prompts, answers, strict=True):
                samples = list(answer.result().sequences)
                seen.append([(s.tokens, [p.hex() for p in s.logprobs]) for s in samples])
                data += scored(prompt, samples, tokenizer)
            gradient = training.forward_backward(data, loss_fn="importance_sampling")
            update = training.optim_step(types.AdamParams(learning_rate=1e-2))
            losses = {name: value.hex() for name, value in gradient.result().metrics.items()}
            norms = {name: value.hex() for name, value in (update.result().metrics or {}).items()}
            saved = training.save_state(name=f"{step:06d}").result()
            line = {"step": step, "samples": seen, "metrics": {**losses, **norms}, "saved": saved.path.partition(":train:")[2]}
            lines.write(json.dumps(line) + "\n")
            lines.flush()


def sample(sampler: tinker.SamplingClient, prompt: list[int]):
    params = types.SamplingParams(max_tokens=8, temperature=1.0)
    return sampler.sample(types.ModelInput.from_ints(prompt), num_samples=GROUP, sampling_params=params)


def scored(prompt: list[int], samples: list[types.SampledSequence], tokenizer) -> list[types.Datum]:
    """Digits are good; the advantage is what is above the group's mean."""
    texts = [tokenizer.decode(s.tokens) for s in samples]
    rewards = [sum(c in DIGITS for c in text) / max(len(text), 1) for text in texts]
    mean = sum(rewards) / len(rewards)
    return [datum(prompt, s, reward - mean) for s, reward in zip(samples, rewards, strict=True)]


def datum(prompt: list[int], sampled: types.SampledSequence, advantage: float) -> types.Datum:
    tokens, before = [*prompt, *sampled.tokens], len(prompt) - 1
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64"),
        "logprobs": types.TensorData(data=[0.0] * before + list(sampled.logprobs), dtype="float32"),
        "advantages": types.TensorData(data=[0.0] * before + [advantage] * len(sampled.tokens), dtype="float32"),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
