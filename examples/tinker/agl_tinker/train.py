"""A whole RL loop of one's own on the clients: GRPO on the embedded calculator, with its tool. No trainer is imported.

    python examples/tinker/agl_tinker/train.py

Kill it at any instant, `kill -9` included, and give the same command again: it goes on from the last save, and ends with the
same adapter, bit for bit, as if nothing had happened. With `--base_url http://host:8000` it runs on a server (`agl serve`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import agentlightning
from agentlightning import checkpoint_utils
from agentlightning.calculator.task import calculate, compute_score
from agentlightning.models.chat import ChatRenderer
from agentlightning.tinker import AdamParams, Datum, ModelInput, SamplingClient, SamplingParams, ServiceClient, TrainingClient

PROBLEMS = Path(agentlightning.__file__).parent / "calculator" / "train.jsonl"
MAX_TURNS, TURN = 3, SamplingParams(max_tokens=16)


@dataclass
class Config:
    """Every field is an option of the command line."""

    log_path: str = "checkpoints/agl_tinker"
    base_model: str = "tiny"
    base_url: str = ""  # of a server; empty: an engine in this process
    load_checkpoint_path: str = ""  # a saved state to start from, where nothing is to be resumed
    rank: int = 8
    learning_rate: float = 1e-3
    num_batches: int = 50
    problems_per_batch: int = 16
    group_size: int = 8  # rollouts of a problem
    save_every: int = 5  # batches
    seed: int = 0


@dataclass
class Rollout:
    """A problem being solved: the lists have one value for each token of the conversation so far."""

    problem: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)  # by the policy, and so trained
    reward: float = 0.0
    finished: bool = False

    def add(self, tokens: list[int], logprobs: list[float] | None = None) -> None:
        """Tokens of the policy with their log-probabilities, or of somebody else."""
        self.tokens += tokens
        self.logprobs += logprobs or [0.0] * len(tokens)
        self.chosen += [logprobs is not None] * len(tokens)


async def play(sampler: SamplingClient, renderer: ChatRenderer, problems: list[Any], group_size: int) -> list[Rollout]:
    """All rollouts of a batch, turn by turn: one batch of the engine's for each turn."""
    rollouts = [Rollout(problem) for problem in problems for _ in range(group_size)]
    for rollout in rollouts:
        rollout.add(renderer.prompt_ids(rollout.problem["prompt"]))
    for _ in range(MAX_TURNS):
        live = [rollout for rollout in rollouts if not rollout.finished]
        turns = await asyncio.gather(*(sampler.sample_async(ModelInput.from_ints(r.tokens), 1, TURN) for r in live))
        for rollout, turn in zip(live, turns, strict=True):
            take_turn(rollout, turn.sequences[0].tokens, turn.sequences[0].logprobs, renderer)
    return rollouts


def take_turn(rollout: Rollout, tokens: list[int], logprobs: list[float] | None, renderer: ChatRenderer) -> None:
    """The assistant called the calculator, whose result is added; or gave its answer, which is judged."""
    rollout.add(tokens, logprobs)
    text, closed = renderer.text(tokens), tokens[-1] == renderer.end_of_turn_id
    result = calculate(text)
    if result is not None:
        rollout.add(list(renderer.observation_ids(result, closed)))
    else:
        rollout.finished = True
        rollout.reward = compute_score("calculator", text, rollout.problem["reward_model"]["ground_truth"]) if closed else 0.0


def data_of(rollouts: list[Rollout], group_size: int) -> list[Datum]:
    """GRPO (arXiv 2402.03300): the advantage is the reward, whitened within its group; the loss is a mean over tokens."""
    trained, data = sum(sum(rollout.chosen) for rollout in rollouts), []
    for start in range(0, len(rollouts), group_size):
        group = rollouts[start : start + group_size]
        rewards = [rollout.reward for rollout in group]
        mean, spread = statistics.mean(rewards), statistics.pstdev(rewards)
        for rollout in group if spread else []:
            advantages = [chosen * (rollout.reward - mean) / spread / trained for chosen in rollout.chosen]
            inputs = {"target_tokens": rollout.tokens, "logprobs": rollout.logprobs, "advantages": advantages}
            shifted = {name: values[1:] for name, values in inputs.items()}  # what position i predicts is token i + 1
            data.append(Datum(ModelInput.from_ints(rollout.tokens[:-1]), shifted))
    return data


async def train_batch(client: TrainingClient, renderer: ChatRenderer, batch: int, config: Config) -> float:
    """Sample with the present weights, then one step. Everything is a function of the batch's number; returns the reward."""
    rows = random.Random(f"{config.seed}:{batch}").sample(PROBLEMS.read_text().splitlines(), config.problems_per_batch)
    sampler = await client.save_weights_and_get_sampling_client_async()
    rollouts = await play(sampler, renderer, [json.loads(row) for row in rows], config.group_size)
    data = data_of(rollouts, config.group_size)
    if data:  # else the rewards within each group are equal, and there is nothing to learn
        backward = await client.forward_backward_async(data, "importance_sampling")
        step = await client.optim_step_async(AdamParams(learning_rate=config.learning_rate))
        await backward.result_async()
        await step.result_async()
    return statistics.mean(rollout.reward for rollout in rollouts)


async def main(config: Config) -> None:
    """Resume, train, save."""
    resume_info = checkpoint_utils.get_last_checkpoint(config.log_path)
    start_batch = resume_info["batch"] if resume_info else 0
    load_state_path = resume_info["state_path"] if resume_info else config.load_checkpoint_path
    if start_batch >= config.num_batches:
        print("Training was already complete; nothing to do")
        return
    local: dict[str, Any] = {"backend": "inprocess", "root": config.log_path, "num_threads": 1}
    async with ServiceClient(**({"base_url": config.base_url} if config.base_url else local)) as service:
        client = await service.create_lora_training_client_async(config.base_model, config.rank, seed=config.seed)
        if load_state_path:
            future = await client.load_state_async(load_state_path)
            await future.result_async()
            print(f"goes on at batch {start_batch + 1} from {load_state_path}", flush=True)
        renderer = ChatRenderer(client.get_tokenizer())
        for batch in range(start_batch + 1, config.num_batches + 1):
            began = time.monotonic()
            reward = await train_batch(client, renderer, batch, config)
            print(f"batch {batch}/{config.num_batches}  reward {reward:.3f}  {time.monotonic() - began:.1f} s", flush=True)
            if batch % config.save_every == 0 or batch == config.num_batches:
                name, state = "final" if batch == config.num_batches else f"{batch:06d}", {"batch": batch}
                await checkpoint_utils.save_checkpoint_async(client, name, config.log_path, state, kind="both")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in fields(Config):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    asyncio.run(main(Config(**vars(parser.parse_args()))))
