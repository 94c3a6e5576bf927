"""All that a sample can tell of beside its tokens, through the SDK and through our client over it: what it gave, as JSON.

python client_scores.py OUT REPOSITORY
"""

import json
import sys
import time
from typing import Any

import tinker
import torch
from tinker import types

PROMPT = (258, 40, 41, 42, 43, 44, 45, 46)
ROWS, DRAWS = len(PROMPT) - 1, 8
NAMED = ((0, 0, 41), (0, 3, 263), (4, 1, 45), (6, 2, 7))


def named() -> torch.Tensor:
    ids = torch.full((ROWS, 4), -1)
    for row, column, token in NAMED:
        ids[row, column] = token
    return ids


def asked(words: Any, client: Any, layout: str, **params: Any) -> Any:
    ids = words.TensorData.from_torch(named())
    if layout == "sparse":
        ids = words.TensorData.from_torch_sparse(named(), pad_value=-1)
    return client.sample(
        words.ModelInput.from_ints(list(PROMPT)),
        2,
        words.SamplingParams(**{"max_tokens": 5, "seed": 3, **params}),
        topk_sample_logprobs=3,
        target_prompt_logprobs=ids,
        prompt_alt_tokens_k=DRAWS,
    ).result()


def seen(answer: Any) -> dict[str, Any]:
    targets, drawn = answer.target_prompt_logprobs, answer.prompt_alt_tokens
    return {
        "sequences": [{"tokens": s.tokens, "logprobs": s.logprobs, "top": s.topk_logprobs} for s in answer.sequences],
        "targets": targets.to_torch().tolist(),
        "layout": [targets.dtype, targets.shape, targets.sparse_crow_indices, targets.sparse_col_indices],
        "drawn": [drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.tokens.dtype, drawn.logprobs.dtype],
    }


def refused(client: tinker.SamplingClient, **options: Any) -> tuple[str, str, float]:
    began = time.monotonic()
    try:
        client.sample(types.ModelInput.from_ints(list(PROMPT)), 1, types.SamplingParams(max_tokens=1), **options).result()
    except tinker.TinkerError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", 0.0


def main(out: str, repository: str) -> None:
    sys.path.append(repository)
    from agentlightning import tinker as ours

    answers = {}
    with tinker.ServiceClient() as service:
        client = service.create_sampling_client(base_model="tiny").result()
        for layout in ("dense", "sparse"):
            answers[layout] = seen(asked(types, client, layout))
        answers["greedy"] = seen(asked(types, client, "dense", temperature=0.0))
        ids = named()
        outside = torch.where(ids == 263, 264, ids)
        errors = {
            "width": refused(client, topk_sample_logprobs=101),
            "draws": refused(client, prompt_alt_tokens_k=101),
            "rows": refused(client, target_prompt_logprobs=types.TensorData.from_torch(ids[1:])),
            "id": refused(client, target_prompt_logprobs=types.TensorData.from_torch(outside)),
            "none": refused(client, target_prompt_logprobs=types.TensorData.from_torch(torch.full((ROWS, 1), -1))),
        }
    with ours.ServiceClient() as service:
        answers["ours"] = seen(asked(ours, service.create_sampling_client(base_model="tiny"), "sparse"))
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"prompt": PROMPT, "named": NAMED, "answers": answers, "errors": errors}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
