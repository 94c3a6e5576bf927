"""The recipe that made the base: its demonstrators, its labels, its data, and that it gives the same bytes again."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agentlightning.calculator.task import calculate, compute_score, make_problem

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "agentlightning" / "calculator"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_base", ROOT / "scripts" / "make_tiny_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def score(problem, turns) -> float:
    return compute_score("calculator", turns[-1]["content"], str(problem.answer))


def test_clean_demonstrations_are_all_right(recipe: ModuleType) -> None:
    rng = random.Random(5)
    for _ in range(300):
        problem = make_problem(rng)
        turns = recipe.clean_demonstration(problem, rng)
        assert [turn["role"] for turn in turns] == ["assistant", "tool"] * len(problem.operators) + ["assistant"]
        for call, result in zip(turns[:-1:2], turns[1::2], strict=True):
            assert calculate(call["content"]) == result["content"]
        assert score(problem, turns) == 1.0


def test_sloppy_demonstrations_are_well_formed_and_fail_as_often_as_they_say(recipe: ModuleType) -> None:
    rng = random.Random(6)
    problems = [make_problem(rng) for _ in range(6000)]
    demonstrations = [recipe.sloppy_demonstration(problem, rng) for problem in problems]
    calls = [sum(turn["role"] == "tool" for turn in turns) for turns in demonstrations]
    two_steps = [count for count, problem in zip(calls, problems, strict=True) if len(problem.operators) == 2 and count]
    assert sum(count > 0 for count in calls) / len(calls) == pytest.approx(0.7, abs=0.03)
    assert two_steps.count(2) / len(two_steps) == pytest.approx(0.4, abs=0.03)
    right = [score(problem, turns) for problem, turns in zip(problems, demonstrations, strict=True)]
    # One step: 0.7 * 0.34; two steps: 0.7 * 0.34 * 0.4 * 0.34; now and then by luck.
    assert sum(right) / len(right) == pytest.approx((0.238 + 0.032) / 2, abs=0.02)
    for turns in demonstrations:
        for turn in turns:
            assert (
                turn["role"] == "tool"
                or calculate(turn["content"]) not in (None, "error")
                or turn["content"].lstrip("-").isdigit()
            )


def test_tokens_are_the_chat_templates_and_labels_are_the_policys_own(recipe: ModuleType) -> None:
    tokenizer, rng = recipe.make_tokenizer(), random.Random(8)
    for _ in range(20):
        problem = make_problem(rng)
        turns = recipe.clean_demonstration(problem, rng)
        ids, labels = recipe.encode(tokenizer, problem, turns)
        messages = [{"role": "user", "content": problem.question}, *turns]
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        own = "".join(turn["content"] + "<|end|>" for turn in turns if turn["role"] == "assistant")
        assert tokenizer.decode([label for label in labels if label != -100]) == own


def test_the_data_files_are_what_the_script_writes(recipe: ModuleType, tmp_path: Path) -> None:
    known = recipe.write_data(tmp_path)
    for name in ("train.jsonl", "val.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()
    assert all(problem.question not in known for problem, _ in zip(recipe.fresh_problems(random.Random(0), known), range(500)))  # noqa: B905


def test_the_tokenizer_is_what_the_script_writes(recipe: ModuleType, tmp_path: Path) -> None:
    tokenizer = recipe.make_tokenizer()
    recipe.save(recipe.make_model(tokenizer), tokenizer, tmp_path / "base")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "base" / name).read_text() == (SHIPPED / "base" / name).read_text()


def test_the_same_seed_gives_the_same_bytes_and_training_lowers_the_loss(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(recipe, "measure", lambda *_: {"success": 0.0, "format": 0.0})
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        recipe.make_base(seed, set(), tmp_path / name, clean_steps=6, sloppy_steps=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert losses[0] < 5.3  # after 6 steps; ln(264) = 5.6 is knowing nothing
