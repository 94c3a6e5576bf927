"""Shared by all tests: the embedded base, and prompts for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import agentlightning

BASE = str(Path(agentlightning.__file__).parent / "calculator" / "base")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `pytest -n 2` (pytest-xdist): a file's tests share its fixtures, and some of e2e the runs they compare with."""
    for item in items:
        compares = "references" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("references" if compares else str(item.path)))
    # The largest group first, so that the other core has all the rest to do meanwhile.
    items.sort(key=lambda item: "references" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def base_path() -> str:
    return BASE


@pytest.fixture(scope="session")
def renderer():
    from agentlightning.models.chat import ChatRenderer, load_tokenizer

    return ChatRenderer(load_tokenizer(BASE))


@pytest.fixture(scope="session")
def prompts(renderer):
    """Sixteen calculator problems."""
    from agentlightning.types import Prompt

    lines = (Path(BASE).parent / "train.jsonl").read_text().splitlines()[:16]
    rows = [json.loads(line) for line in lines]
    return [
        Prompt(
            uid=f"train:{i}",
            messages=tuple(row["prompt"]),
            token_ids=tuple(renderer.prompt_ids(row["prompt"])),
            data_source=row["data_source"],
            ground_truth=row["reward_model"]["ground_truth"],
        )
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def base_model():
    """A fresh copy of the base in float32, one thread."""
    import torch

    from agentlightning.models.base import load_base

    torch.set_num_threads(1)
    return load_base(BASE, "float32", torch.device("cpu"), gradient_checkpointing=False)
