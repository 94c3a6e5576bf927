"""The shipped base: a real small Qwen3, a real tokenizer, and a policy that has something to learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from agentlightning.calculator.task import calculate, compute_score
from agentlightning.models.chat import ChatRenderer
from agentlightning.rollout.engine import DecodeLoop
from agentlightning.types import Completion, Prompt, SamplingParams

CONVERSATION = [
    {"role": "user", "content": "23 boxes of 17 pens, 40 lost. How many left?"},
    {"role": "assistant", "content": "<calc>23*17</calc>"},
    {"role": "tool", "content": "391"},
    {"role": "assistant", "content": "<calc>391-40</calc>"},
    {"role": "tool", "content": "351"},
    {"role": "assistant", "content": "351"},
]


@pytest.fixture(scope="module")
def tokenizer(base_path: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture(scope="module")
def model(base_path: str) -> Qwen3ForCausalLM:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def val_prompts(base_path: str, renderer: ChatRenderer) -> list[Prompt]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (Path(base_path).parent / "val.jsonl").read_text().splitlines()]
    return [
        Prompt(f"val:{i}", tuple(row["prompt"]), tuple(renderer.prompt_ids(row["prompt"])), "calculator", row["reward_model"])
        for i, row in enumerate(rows)
    ]


def play(model: Any, renderer: ChatRenderer, prompts: list[Prompt], temperature: float, n: int) -> list[Completion]:
    sampling = SamplingParams(n=n, temperature=temperature, max_tokens=96, max_assistant_turns=4, max_tokens_per_turn=16)
    return DecodeLoop(model, renderer, 256, calculate).generate(prompts, sampling, seed=1, step=1, adapter_version=0)


def success(prompts: list[Prompt], completions: list[Completion], n: int) -> float:
    scores = [
        compute_score("calculator", completion.answer, prompts[i // n].ground_truth["ground_truth"])
        for i, completion in enumerate(completions)
    ]
    return sum(scores) / len(scores)


def test_the_base_is_a_qwen3_of_a_few_hundred_thousand_parameters(model: Any, base_path: str) -> None:
    assert type(model) is Qwen3ForCausalLM
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 600_000
    with safe_open(Path(base_path) / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_ids_agree_between_tokenizer_and_model(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    ["", " ", "23 boxes of 17 pens", " two  spaces ", "\ttab\nline\r\n", "héllo, ñandú", "日本語 🧮", "\x00\x7f", "a'b don't"],
)
def test_any_text_survives_the_tokenizer_a_token_a_byte(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_tags_are_one_token_and_survive_decoding_while_the_frame_does_not(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("<calc>2*3</calc><|end|>")
    assert len(ids) == 6
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<calc>2*3</calc>"


def test_the_template_only_ever_appends(tokenizer: PreTrainedTokenizerFast) -> None:
    def rendered(count: int, prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            CONVERSATION[:count], add_generation_prompt=prompt, tokenize=True, return_dict=False
        )  # pyright: ignore[reportReturnType]

    for count in range(1, len(CONVERSATION)):
        longer = rendered(count + 1, prompt=False)
        assert longer[: len(rendered(count, prompt=False))] == rendered(count, prompt=False)
        if CONVERSATION[count]["role"] == "assistant":
            prompt = rendered(count, prompt=True)
            own = [*tokenizer.encode(CONVERSATION[count]["content"]), tokenizer.eos_token_id]
            assert longer == prompt + own


def test_the_template_refuses_a_role_the_base_has_never_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="roles user, assistant and tool, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be good."}], tokenize=False)


def test_at_temperature_one_it_knows_the_format_and_is_seldom_right(
    model: Any, renderer: ChatRenderer, val_prompts: list[Prompt]
) -> None:
    completions = play(model, renderer, val_prompts, temperature=1.0, n=2)
    assert 0.1 < success(val_prompts, completions, n=2) < 0.22  # 512 samples: 0.16 give or take 0.016
    turns = [turn["content"] for completion in completions for turn in completion.turns if turn["role"] == "assistant"]
    formed = [calculate(turn) not in (None, "error") or turn.lstrip("-").isdigit() for turn in turns]
    assert sum(formed) / len(formed) > 0.95
    assert sum(completion.stop_reason == "stop" for completion in completions) / len(completions) > 0.95
    assert {completion.num_turns for completion in completions} >= {1, 2, 3}


def test_greedy_leaves_room_to_learn_too(model: Any, renderer: ChatRenderer, val_prompts: list[Prompt]) -> None:
    assert 0.1 < success(val_prompts, play(model, renderer, val_prompts, temperature=0.0, n=1), n=1) < 0.6


def test_generate_of_transformers_plays_it_as_well(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = tokenizer.apply_chat_template(
        [CONVERSATION[:1], CONVERSATION[:3]], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    tokens_BL = model.generate(**inputs, do_sample=False, max_new_tokens=16)  # pyright: ignore[reportCallIssue]
    texts = tokenizer.batch_decode(tokens_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for text in texts:
        assert calculate(text) not in (None, "error") or text.lstrip("-").isdigit()
