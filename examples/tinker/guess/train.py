"""A game of several turns on the clients, without asyncio: guess a number from 1 to 7, told "more" or "less", in three tries.

    python examples/tinker/guess/train.py

The small base has never seen the game: it calls its calculator, and finds the number in a quarter of the games. It learns to
say 6 first, then 3, then a number on the right side of it, and finds five of seven (to halve what is left, 4 and then 2 or 6,
would find all). About a minute of one core; killed and started again, it goes on from the last save. The last lines (the share
of games in which it was found; a number and what was guessed):

    batch 78/80  found 0.714  5: 6 3 5
    batch 79/80  found 0.714  5: 6 3 5
    batch 80/80  found 0.714  6: 6
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field, fields

from agentlightning import checkpoint_utils
from agentlightning.models.chat import ChatRenderer
from agentlightning.tinker import AdamParams, Datum, ModelInput, SamplingClient, SamplingParams, ServiceClient

HIGHEST, TRIES = 7, 3
QUESTION = [{"role": "user", "content": f"A number from 1 to {HIGHEST}?"}]
TURN = SamplingParams(max_tokens=16)
NUMBERS = [str(number) for number in range(1, HIGHEST + 1)]


@dataclass
class Config:
    """Every field is an option of the command line."""

    log_path: str = "checkpoints/guess"
    base_model: str = "tiny"
    rank: int = 8
    learning_rate: float = 2e-3
    num_batches: int = 80
    group_size: int = 16  # games for each of the numbers
    save_every: int = 10  # batches
    seed: int = 0


@dataclass
class Game:
    """The lists have one value for each token of the conversation so far."""

    secret: int
    tokens: list[int]
    logprobs: list[float]
    chosen: list[bool]  # by the policy, and so trained
    guesses: list[int] = field(default_factory=list)
    reward: float = 0.0

    @property
    def finished(self) -> bool:
        """Found, given up, or no number at all."""
        return self.reward > 0 or len(self.guesses) == TRIES or 0 in self.guesses

    def take_turn(self, tokens: list[int], logprobs: list[float], renderer: ChatRenderer) -> None:
        """The last digit of the turn is the guess, 0 if there is none; the game says something to it."""
        digits = [digit for digit in renderer.text(tokens) if digit in NUMBERS]
        self.guesses.append(int(digits[-1]) if digits else 0)
        self.reward = float(self.guesses[-1] == self.secret)
        said: list[int] = []
        if not self.finished:
            hint = "more" if self.guesses[-1] < self.secret else "less"
            said = list(renderer.observation_ids(hint, tokens[-1] == renderer.end_of_turn_id))
        self.tokens += tokens + said
        self.logprobs += logprobs + [0.0] * len(said)
        self.chosen += [True] * len(tokens) + [False] * len(said)


def play(sampler: SamplingClient, renderer: ChatRenderer, group_size: int) -> list[list[Game]]:
    """Groups of games, one for each number. All that wait for a guess are asked together."""
    ids = renderer.prompt_ids(QUESTION)
    zeros, nobody = [0.0] * len(ids), [False] * len(ids)
    groups = [[Game(secret, [*ids], [*zeros], [*nobody]) for _ in range(group_size)] for secret in range(1, HIGHEST + 1)]
    for _ in range(TRIES):
        live = [game for group in groups for game in group if not game.finished]
        futures = [sampler.sample(ModelInput.from_ints(game.tokens), 1, TURN) for game in live]
        for game, future in zip(live, futures, strict=True):
            guess = future.result().sequences[0]
            game.take_turn(guess.tokens, guess.logprobs or [], renderer)
    return groups


def data_of(groups: list[list[Game]]) -> list[Datum]:
    """GRPO (arXiv 2402.03300): how much better a game went than the others with the same number, for each of its tokens."""
    trained, data = sum(sum(game.chosen) for group in groups for game in group), []
    for group in groups:
        mean, spread = statistics.mean(game.reward for game in group), statistics.pstdev(game.reward for game in group)
        for game in group if spread else []:
            advantages = [chosen * (game.reward - mean) / spread / trained for chosen in game.chosen]
            inputs = {"target_tokens": game.tokens, "logprobs": game.logprobs, "advantages": advantages}
            shifted = {name: values[1:] for name, values in inputs.items()}  # what position i predicts is token i + 1
            data.append(Datum(ModelInput.from_ints(game.tokens[:-1]), shifted))
    return data


def main(config: Config) -> None:
    """Resume, play and learn, save."""
    last = checkpoint_utils.get_last_checkpoint(config.log_path)
    start = last["batch"] if last else 0
    if start >= config.num_batches:
        print("Training was already complete; nothing to do")
        return
    with ServiceClient(backend="inprocess", root=config.log_path, num_threads=1) as service:
        client = service.create_lora_training_client(config.base_model, config.rank, seed=config.seed)
        if last:
            client.load_state(last["state_path"]).result()
        renderer = ChatRenderer(client.get_tokenizer())
        for batch in range(start + 1, config.num_batches + 1):
            groups = play(client.save_weights_and_get_sampling_client(), renderer, config.group_size)
            data = data_of(groups)
            if data:
                backward = client.forward_backward(data, "importance_sampling")
                client.optim_step(AdamParams(learning_rate=config.learning_rate))
                backward.result()
            games = [game for group in groups for game in group]
            found = statistics.mean(game.reward for game in games)
            example = " ".join(map(str, games[batch % len(games)].guesses))
            print(
                f"batch {batch}/{config.num_batches}  found {found:.3f}  {games[batch % len(games)].secret}: {example}",
                flush=True,
            )
            if batch % config.save_every == 0 or batch == config.num_batches:
                checkpoint_utils.save_checkpoint(client, f"{batch:06d}", config.log_path, {"batch": batch}, kind="both")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in fields(Config):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    main(Config(**vars(parser.parse_args())))
