"""The GSM8K example: its files are what the trainer reads, and its commands compose."""

import importlib.util
import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from agentlightning.rewards.gsm8k import compute_score
from agentlightning.verl.config import load_config
from agentlightning.verl.data import load_prompts

FOLDER = Path(__file__).parents[3] / "examples" / "gsm8k"
COMMAND = "python -m agentlightning.verl "


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gsm8k_prepare", FOLDER / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> list[str]:
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    return [line[line.index(COMMAND) + len(COMMAND) :] for line in text.splitlines() if COMMAND in line]


def problems(count: int) -> list[dict[str, str]]:
    return [
        {
            "question": f"Ann has {i} pens and buys {1000 * i}. How many?",
            "answer": f"{i} + {1000 * i} = <<{i}+{1000 * i}={1001 * i}>>{1001 * i}\n#### {1001 * i:,}",
        }
        for i in range(count)
    ]


def copy_of_the_data(folder: Path) -> list[str]:
    """The arguments for a jsonl file of 15 rows and a parquet file of 5."""
    train, test = folder / "in.jsonl", folder / "in.parquet"
    train.write_text("".join(json.dumps(row) + "\n" for row in problems(15)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(problems(5)), test)
    return ["--train", str(train), "--test", str(test), "--out", str(folder / "out")]


class Tokenizer:
    """A token a character."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return messages[0]["content"]

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]


def test_the_trainer_reads_what_was_prepared_and_the_reward_knows_its_answers(example: ModuleType, tmp_path: Path) -> None:
    example.main(copy_of_the_data(tmp_path))
    files = [f"data.{split}_files={tmp_path}/out/{name}.parquet" for split, name in (("train", "train"), ("val", "test"))]
    data = load_config(["model=qwen3_0_6b", *files]).data
    train, val = (load_prompts(split, data, Tokenizer()) for split in ("train", "val"))  # pyright: ignore[reportArgumentType]
    assert (len(train), len(val)) == (15, 5)
    assert [prompt.ground_truth for prompt in train[:3]] == ["0", "1001", "2002"]
    question = 'Ann has 2 pens and buys 2000. How many? Let\'s think step by step and output the final answer after "####".'
    assert list(train[2].messages) == [{"role": "user", "content": question}]
    for prompt in (*train, *val):
        answer = prompt.extra_info["answer"]
        assert compute_score(prompt.data_source, answer, prompt.ground_truth) == 1.0
        assert compute_score(prompt.data_source, answer + "1", prompt.ground_truth) == 0.0


def test_nothing_is_written_over_without_force(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = copy_of_the_data(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.parquet").write_text("mine")
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.parquet"]
    example.main([*arguments, "--force"])
    assert pyarrow.parquet.read_table(tmp_path / "out" / "test.parquet").num_rows == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "a", "answer": "b #### 1"}\n{"question": "a", "answer": "no number"}\n', "row 2: its answer"),
        ('{"question": "a"}\n', "row 1: expected the texts"),
        ("[1]\n", "row 1: expected the texts"),
        ("nonsense\n", "cannot be read"),
        ("\n", "holds no row"),
    ],
)
def test_a_file_that_is_not_gsm8k_is_refused(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    arguments = copy_of_the_data(tmp_path)
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_there_is_a_command_for_one_gpu_eight_and_two_nodes() -> None:
    placements = [load_config(shlex.split(command)).trainer for command in commands()]
    assert [(trainer.nnodes, trainer.n_gpus_per_node) for trainer in placements] == [(1, 1), (1, 8), (2, 8)]


@pytest.mark.parametrize("command", commands())
def test_each_command_composes_with_few_overrides(command: str) -> None:
    words = shlex.split(command)
    assert len(words) <= 8
    config = load_config(words)
    assert config.data.train_files == "data/gsm8k/train.parquet"
    assert config.custom_reward_function.name == "agentlightning.rewards.gsm8k:compute_score"
    samples = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert samples % (config.trainer.nnodes * (config.trainer.n_gpus_per_node or 1)) == 0
