"""tinker_cookbook's RL trainer as it is, on problems of our own.

python client_cookbook_rl.py MODEL LOG_PATH BATCHES
"""

import asyncio
import sys
from collections.abc import Sequence
from functools import partial

import chz
from tinker_cookbook import renderers
from tinker_cookbook.rl import train
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import RLDataset, RLDatasetBuilder
from tinker_cookbook.tokenizer_utils import get_tokenizer

RENDERER = "role_colon"
GROUP = 4
GROUPS = 2


class Eggs(ProblemEnv):
    """An even number of characters is right: some samples are, some are not."""

    def __init__(self, renderer: renderers.Renderer, number: int) -> None:
        super().__init__(renderer)
        self._number = number

    def get_question(self) -> str:
        return f"{self._number} eggs, {self._number - 9} sold. How many left?"

    def check_answer(self, sample_str: str) -> bool:
        return len(sample_str) % 2 == 0

    def check_format(self, sample_str: str) -> bool:
        return True

    def get_reference_answer(self) -> str:
        return "an even number of characters"


class Problems(RLDataset):
    def __init__(self, renderer: renderers.Renderer, batches: int) -> None:
        self._renderer, self._batches = renderer, batches

    def get_batch(self, index: int) -> Sequence[ProblemGroupBuilder]:
        numbers = [20 + index * GROUPS + i for i in range(GROUPS)]
        return [ProblemGroupBuilder(partial(Eggs, self._renderer, number), num_envs=GROUP) for number in numbers]

    def __len__(self) -> int:
        return self._batches


@chz.chz
class ProblemsBuilder(RLDatasetBuilder):
    model_name: str
    batches: int

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        return Problems(renderers.get_renderer(RENDERER, get_tokenizer(self.model_name)), self.batches), None


def main(model_name: str, log_path: str, batches: int) -> None:
    config = train.Config(
        learning_rate=1e-2,
        dataset_builder=ProblemsBuilder(model_name=model_name, batches=batches),
        model_name=model_name,
        renderer_name=RENDERER,
        recipe_name="conformance",
        max_tokens=8,
        log_path=log_path,
        lora_rank=4,
        save_every=2,
        eval_every=0,
        num_substeps=2,
    )
    asyncio.run(train.main(config))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
