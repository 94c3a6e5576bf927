"""Make the calculator agent's base, tokenizer and data again: `python scripts/make_tiny_base.py --seed 1`, two minutes on a CPU.

The base must know the format (calls, answers, copying a number from the problem or the tool's result) but act badly, so that
reinforcement learning has something to teach. Hence two stages of supervised training, on problems drawn as it goes:

1. clean: demonstrations that call the tool with the right operator for every step and answer with its last result.
2. sloppy: a few steps on a demonstrator that often guesses, picks an operator at random, or stops early.

The clean stage decides how high a run ends (what the adapter re-awakens is learnt there), the sloppy one how low it starts.
The same seed, threads and torch give the same bytes.

Left out, because a model this small does without: a validation set (problems are drawn fresh, and those of the two data
files never), dropout, mixed precision, packing, checkpoints, and arithmetic without the tool (275 k parameters do not learn it).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agentlightning.calculator.task import (
    CLOSE_TAG,
    DATA_SOURCE,
    OPEN_TAG,
    OPERATORS,
    Problem,
    calculate,
    compute_score,
    make_problem,
)

HOME = Path(__file__).parents[1] / "agentlightning" / "calculator"
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|user|>", "<|assistant|>", "<|tool|>")
TRAIN_ROWS, VAL_ROWS, DATA_SEED = 2048, 256, 0
MAX_TURNS, MAX_TURN_TOKENS = 4, 16
BATCH = 32

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['user', 'assistant', 'tool'] -%}
{{- raise_exception('the calculator base knows the roles user, assistant and tool, not ' ~ message['role']) -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

Messages = list[dict[str, str]]
Demonstrator = Callable[[Problem, random.Random], Messages]


@dataclass(frozen=True, slots=True)
class Sloppiness:
    """How the demonstrator of the second stage fails; each is a probability."""

    uses_tool: float = 0.7
    right_operator: float = 0.34
    goes_on: float = 0.4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the five tokens of the chat template, and the two tags (not special: decoding keeps them)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, END, *ROLES)])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (OPEN_TAG, CLOSE_TAG)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of 275 k parameters; weights start three times larger than the default, or learning to copy takes far longer."""
    config = Qwen3Config(
        vocab_size=264,  # 263 tokens, rounded up to a multiple of 8
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=192,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def clean_demonstration(problem: Problem, rng: random.Random) -> Messages:
    """The turns after the question of an agent that always does the right thing."""
    return _demonstration(problem, problem.operators)


def sloppy_demonstration(problem: Problem, rng: random.Random, sloppiness: Sloppiness = Sloppiness()) -> Messages:
    """The turns after the question of an agent that knows the format and little else."""
    if rng.random() >= sloppiness.uses_tool:
        return [{"role": "assistant", "content": str(rng.randint(2, 999))}]
    operators = []
    for right in problem.operators:
        if operators and rng.random() >= sloppiness.goes_on:
            break
        wrong = rng.choice([operator for operator in OPERATORS if operator != right])
        operators.append(right if rng.random() < sloppiness.right_operator else wrong)
    return _demonstration(problem, tuple(operators))


def _demonstration(problem: Problem, operators: tuple[str, ...]) -> Messages:
    """One call for each operator on the result so far and the next number, then that result as the answer."""
    turns, value = [], str(problem.numbers[0])
    for operator, number in zip(operators, problem.numbers[1:], strict=False):
        call = f"{OPEN_TAG}{value}{operator}{number}{CLOSE_TAG}"
        result = calculate(call)
        assert result is not None
        value = result
        turns += [{"role": "assistant", "content": call}, {"role": "tool", "content": value}]
    return [*turns, {"role": "assistant", "content": value}]


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem, turns: Messages) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; labels are -100 outside the assistant's turns (whose end token is its own)."""
    ids = tokenizer.encode(f"<|user|>{problem.question}{END}")
    labels = [-100] * len(ids)
    for turn in turns:
        own = tokenizer.encode(turn["content"] + END)
        ids += [tokenizer.convert_tokens_to_ids(f"<|{turn['role']}|>"), *own]
        labels += [-100, *(own if turn["role"] == "assistant" else [-100] * len(own))]
    return ids, labels


def fresh_problems(rng: random.Random, known: set[str]) -> Iterator[Problem]:
    """Problems whose question is not in `known`."""
    while True:
        problem = make_problem(rng)
        if problem.question not in known:
            yield problem


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Iterator[Problem],
    rng: random.Random,
    demonstrate: Demonstrator,
    *,
    steps: int,
    lr: float,
    warmup: int,
) -> None:
    """Supervised training in place: AdamW, linear warm-up over `warmup` steps, then a straight fall to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - 0.9 * max(0, step - warmup) / (steps - warmup))
    )
    model.train()
    for step in range(1, steps + 1):
        rows = [encode(tokenizer, problem, demonstrate(problem, rng)) for problem, _ in zip(problems, range(BATCH), strict=False)]
        width = max(len(ids) for ids, _ in rows)
        ids_BT = torch.tensor([ids + [model.config.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        labels_BT = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        # Padding is on the right, so a causal model needs no attention mask.
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"  step {step:4d}  loss {loss.item():.4f}")


@torch.no_grad()
def measure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], *, greedy: bool = False) -> dict[str, float]:
    """Play the task with the tool: `success`, and `format`, the share of turns that end and are a valid call or an integer."""
    model.eval()
    chats: list[Messages] = [[{"role": "user", "content": problem.question}] for problem in problems]
    playing, turns, well_formed = list(range(len(chats))), 0, 0
    for _ in range(MAX_TURNS):
        if not playing:
            break
        prompts = tokenizer.apply_chat_template(
            [chats[i] for i in playing], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**prompts, do_sample=not greedy, max_new_tokens=MAX_TURN_TOKENS)
        still = []
        for i, row in zip(playing, tokens[:, prompts["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            result = calculate(text)
            ended = tokenizer.eos_token_id in row
            turns += 1
            well_formed += ended and (text.lstrip("-").isdigit() if result is None else result != "error")
            chats[i].append({"role": "assistant", "content": text})
            if result is not None:
                chats[i].append({"role": "tool", "content": result})
                still.append(i)
        playing = still
    scores = [
        compute_score(DATA_SOURCE, chat[-1]["content"] if chat[-1]["role"] == "assistant" else "", str(problem.answer))
        for chat, problem in zip(chats, problems, strict=True)
    ]
    return {"success": sum(scores) / len(scores), "format": well_formed / turns}


def write_data(home: Path) -> set[str]:
    """train.jsonl and val.jsonl in verl's columns, no question twice; returns all their questions."""
    rng, known = random.Random(DATA_SEED), set[str]()
    for split, rows in (("train", TRAIN_ROWS), ("val", VAL_ROWS)):
        with (home / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for index, problem in zip(range(rows), fresh_problems(rng, known), strict=False):
                known.add(problem.question)
                row = {
                    "data_source": DATA_SOURCE,
                    "prompt": [{"role": "user", "content": problem.question}],
                    "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
                    "extra_info": {"split": split, "index": index, "steps": len(problem.operators)},
                }
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
    return known


def make_base(seed: int, clean_steps: int, sloppy_steps: int, known: set[str], out: Path) -> dict[str, float]:
    """Train one base from `seed`, save it in bf16 under `out`, and return what it does after each stage."""
    torch.manual_seed(seed)
    rng, began = random.Random(seed), time.perf_counter()
    problems, held_out = fresh_problems(rng, known), random.Random(seed + 1)
    examination = [problem for problem, _ in zip(fresh_problems(held_out, known), range(1024), strict=False)]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"seed {seed}: {sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokenizer, problems, rng, clean_demonstration, steps=clean_steps, lr=4e-3, warmup=20)
    report = {f"clean_{name}": value for name, value in measure(model, tokenizer, examination).items()}
    train(model, tokenizer, problems, rng, sloppy_demonstration, steps=sloppy_steps, lr=1e-3, warmup=1)
    # What is shipped is measured: rounded to bf16 first.
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    report |= measure(model.float(), tokenizer, examination)
    report["greedy_success"] = measure(model, tokenizer, examination, greedy=True)["success"]
    report["seconds"] = time.perf_counter() - began
    return report


def main() -> None:
    """Write the data, then make the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clean-steps", type=int, default=900)
    parser.add_argument("--sloppy-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HOME / "base")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would be other bytes
    known = write_data(HOME)
    shutil.rmtree(args.out, ignore_errors=True)
    report = make_base(args.seed, args.clean_steps, args.sloppy_steps, known, args.out)
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in report.items()))


if __name__ == "__main__":
    main()
