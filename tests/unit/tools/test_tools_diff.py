"""`agl ckpt diff`: what differs is named with by how much, and what does not is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_runs import files_of

from agentlightning.checkpoint import CheckpointFiles, save
from agentlightning.cli import main
from agentlightning.tools.diff import ABSENT, Change, TensorChange, diff_checkpoints

MakeRun = Callable[..., Path]


def test_two_steps_of_a_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (None, 0.5))
    diff = diff_checkpoints(root / "global_step_1", root / "global_step_2")
    assert (diff.config, diff.harmless, diff.run_config, diff.only_in_a, diff.only_in_b) == ((), (), (), (), ())
    adapter, optimizer = diff.files
    assert adapter.equal == 1
    assert adapter.changed == (TensorChange("lora_B", 1.0, 1.0),)
    assert adapter.max_abs == 1.0
    assert adapter.relative_norm == pytest.approx(math.sqrt(32 / (32 + 32)))  # of lora_A and lora_B as one vector
    assert optimizer.changed[0].name == "step"
    assert diff.metrics == (
        Change("critic/score/mean", 0.1, 0.2),
        Change("val-core/sums/acc/mean@1", ABSENT, 0.5),
    )
    assert Change("tokens_seen", 100, 200) in diff.state
    assert main(["ckpt", "diff", "1", "2", "--run", str(root)]) == 0
    text = capsys.readouterr().out
    assert "configuration: the same" in text
    assert "lora_B" in text


def test_a_checkpoint_is_equal_to_itself(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (0.5,))
    assert main(["ckpt", "diff", f"{root}/1", str(root), "--json"]) == 0
    diff = json.loads(capsys.readouterr().out)
    assert all(not diff[kind] for kind in ("config", "harmless", "run_config", "metrics", "state"))
    assert [file["changed"] for file in diff["files"]] == [[], []]


def test_two_runs(make_run: MakeRun) -> None:
    a, b = make_run("a", (), seed=1), make_run("b", (), seed=2, extra=None)
    save(a, "global_step_1", 1, files_of(1))
    save(b, "global_step_1", 1, files_of(1, lora_rank=8))
    diff = diff_checkpoints(a / "global_step_1", b / "global_step_1")
    assert diff.same_tensors
    assert diff.config == (Change("lora_rank", 4, 8),)
    assert diff.run_config == (Change("trainer.extra", ABSENT, None), Change("trainer.seed", 1, 2))


def test_other_shapes_types_names_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = np.ones(3, np.float32)
    a = {"shape": one, "type": one, "gone": one, "zero": 0 * one, "nan": one, "same_nan": one * np.nan, "bool": one > 0}
    b = {"shape": np.ones((3, 1), np.float32), "type": np.ones(3), "new": one, "zero": one, "nan": one * np.nan}
    b |= {"same_nan": one * np.nan, "bool": one < 0}
    save(tmp_path, "a", 1, CheckpointFiles({"x.safetensors": a, "only_a.safetensors": {"y": one}}))
    save(tmp_path, "b", 1, CheckpointFiles({"x.safetensors": b}, {"trainer_state.json": [1]}))
    diff = diff_checkpoints(tmp_path / "a", tmp_path / "b")
    (file,) = diff.files
    assert diff.only_in_a == ("only_a.safetensors",)
    assert (file.only_in_a, file.only_in_b, file.equal) == (("gone",), ("new",), 1)
    assert file.reshaped == (
        Change("shape", "float32 [3]", "float32 [3, 1]"),
        Change("type", "float32 [3]", "float64 [3]"),
    )
    changed = {change.name: change for change in file.changed}
    assert set(changed) == {"zero", "nan", "bool"}
    assert changed["zero"] == TensorChange("zero", 1.0, math.inf)
    assert math.isnan(changed["nan"].max_abs)
    assert changed["bool"].max_abs == 1.0
    assert math.isnan(file.max_abs)
    assert not diff.same_tensors
    assert main(["ckpt", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["max_abs"] is None
    assert main(["ckpt", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_a_damaged_one_is_refused(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (None, None))
    (root / "global_step_2" / "trainer_state.json").write_text("{}")
    assert main(["ckpt", "diff", f"{root}/1", f"{root}/2"]) == 2
    assert "trainer_state.json" in capsys.readouterr().err
