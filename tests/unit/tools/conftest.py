"""A fixture that makes run directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import files_of

from agentlightning.checkpoint import save


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "run", accuracies: tuple[float | None, ...] = (), **trainer: Any) -> Path:
        root = tmp_path / name
        root.mkdir()
        for step, accuracy in enumerate(accuracies, start=1):
            save(root, f"global_step_{step}", step, files_of(step, accuracy))
        (root / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
        return root

    return make
