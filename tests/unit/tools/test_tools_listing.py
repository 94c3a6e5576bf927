"""`agl ckpt ls` and `prune`: every thing in the directory has its row, and what the policy does not keep goes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_runs import ACC

from agentlightning.checkpoint import read_record
from agentlightning.checkpoint.retention import RetentionPolicy, mark_verified
from agentlightning.checkpoint_utils import save_checkpoint
from agentlightning.cli import main
from agentlightning.errors import AgentLightningError
from agentlightning.tools.listing import list_checkpoints
from agentlightning.tools.prune import prune_run
from agentlightning.tools.runs import find_checkpoint, open_run, policy_of

MakeRun = Callable[..., Path]


def test_every_thing_has_its_row(make_run: MakeRun) -> None:
    root = make_run("run", (0.1, 0.9, 0.2, 0.3, 0.5, 0.4, 0.3, 0.2), max_actor_ckpt_to_keep=1, keep_best_by=ACC)
    record = read_record(root / "global_step_3.pt")
    assert record.digest is not None
    mark_verified(root, "global_step_3", record.digest)
    (root / "global_step_4.pt").write_bytes(b"torn")
    shutil.rmtree(root / "global_step_5")
    (root / "global_step_6" / "trainer_state.json").unlink()
    (root / "global_step_7.pt").unlink()
    torch.save({"batch": 20, "state_path": "gs://elsewhere/20", "metrics": {ACC: 0.7}}, root / "000020.pt")
    (root / "global_step_8" / "manifest.json").write_bytes(b"{}")
    listing = list_checkpoints(root, policy_of(root))
    rows = {row.name: row for row in listing.rows}
    assert (listing.metric, listing.policy) == (ACC, RetentionPolicy(1, ACC))
    assert [row.step for row in listing.rows] == [20, 8, 7, 6, 5, 4, 3, 2, 1]
    assert {name: row.state for name, row in rows.items() if row.state != "bad"} == {
        "000020": "foreign",
        "global_step_1": "whole",
        "global_step_2": "whole",
        "global_step_3": "whole",
    }
    assert {name: row.kept for name, row in rows.items() if row.state == "whole"} == {
        "global_step_3": ("newest 1", "last verified"),
        "global_step_2": (f"best by {ACC}",),
        "global_step_1": (),
    }
    for name, words in {
        "global_step_4": "cannot be read",
        "global_step_5": "directory is missing",
        "global_step_6": "trainer_state.json is missing",
        "global_step_7": "without its record",
        "global_step_8": "no manifest",
    }.items():
        assert words in (rows[name].problem or "")
    good = rows["global_step_3"]
    assert (good.metric, good.verified_at is not None) == (0.2, True)
    assert good.bytes == sum(path.stat().st_size for path in (root / "global_step_3").rglob("*") if path.is_file())


def test_the_metric_that_is_shown(make_run: MakeRun) -> None:
    root = make_run("run", (0.1, None))
    assert list_checkpoints(root, RetentionPolicy()).metric == "critic/score/mean"  # the newest has no validation
    assert list_checkpoints(root, RetentionPolicy(), ACC).rows[1].metric == 0.1
    assert list_checkpoints(root, RetentionPolicy(), ACC).rows[0].metric is None


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("trainer: {max_actor_ckpt_to_keep: 3}", RetentionPolicy(3)),
        ("trainer: {max_actor_ckpt_to_keep: null, keep_best_by: null, keep_every: 5}", RetentionPolicy(None, None, 5)),
        ("trainer: {keep_best_by: -actor/kl}", RetentionPolicy(None, "-actor/kl", None)),
        ("data: {}", RetentionPolicy()),
        (None, RetentionPolicy()),
    ],
)
def test_the_policy_of_a_run(tmp_path: Path, text: str | None, policy: RetentionPolicy) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    assert policy_of(tmp_path) == policy
    assert policy_of(tmp_path, keep=7).keep == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {max_actor_ckpt_to_keep: 0}", "expected at least 1"),
        ("trainer: {max_actor_ckpt_to_keep: three}", "expected a whole number"),
        ("trainer: {keep_best_by: 3}", "expected a metric"),
        ("trainer: [", "not YAML"),
        ("- 1", "expected sections"),
    ],
)
def test_a_config_that_cannot_be_meant(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(AgentLightningError, match=words):
        policy_of(tmp_path)


def test_what_a_person_may_call_a_run(make_run: MakeRun) -> None:
    root = make_run("run", (None,))
    assert open_run(f"{root}/") == root
    for text, words in {
        f"{root}/nothing": "not there",
        f"{root}/config.yaml": "is a file",
        f"{root}/global_step_1": "is one checkpoint",
    }.items():
        with pytest.raises(AgentLightningError, match=words):
            open_run(text)


@pytest.mark.parametrize("text", ["1", "global_step_1", "global_step_1/", "global_step_1.pt", "global_step_1/actor"])
def test_what_a_person_may_call_a_checkpoint(make_run: MakeRun, text: str) -> None:
    root = make_run("run", (None, None))
    assert find_checkpoint(f"{root}/{text}") == root / "global_step_1"
    if not text.startswith("global_step_1/"):
        assert find_checkpoint(text, root) == root / "global_step_1"


def test_a_run_means_its_newest_whole_checkpoint(make_run: MakeRun) -> None:
    root = make_run("run", (None, None))
    assert find_checkpoint(str(root)) == root / "global_step_2"
    (root / "global_step_2" / "trainer_state.json").unlink()
    assert find_checkpoint(str(root)) == root / "global_step_1"
    with pytest.raises(AgentLightningError, match=r"^9 is no checkpoint: expected a step"):
        find_checkpoint(str(root / "9"))


def test_prune_says_first_and_then_does(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (0.1, 0.9, 0.2, 0.3), max_actor_ckpt_to_keep=1, keep_best_by=ACC)
    before = sorted(os.listdir(root))
    assert main(["ckpt", "prune", str(root), "--dry-run", "--json"]) == 0
    would = json.loads(capsys.readouterr().out)
    assert (would["gone"], would["dry_run"]) == (["global_step_3", "global_step_1"], True)
    assert would["bytes"] > 1000
    assert sorted(os.listdir(root)) == before
    assert main(["ckpt", "prune", str(root), "--keep", "2"]) == 0
    assert "gone  global_step_1\n" in capsys.readouterr().out
    assert {name for name in os.listdir(root) if name.endswith(".pt")} == {f"global_step_{step}.pt" for step in (2, 3, 4)}
    assert prune_run(root, RetentionPolicy(1, None, 3), dry_run=False).gone == ("global_step_2",)


def test_prune_without_a_number_says_why_nothing_goes(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run("run", (0.1, 0.9))
    assert main(["ckpt", "prune", str(root)]) == 0
    assert "give --keep N" in capsys.readouterr().out


def test_prune_leaves_a_running_job_alone(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    from agentlightning.checkpoint import CheckpointManager

    root = make_run("run", (0.1, 0.9), max_actor_ckpt_to_keep=1)
    with CheckpointManager(root, save_freq=1):
        assert main(["ckpt", "prune", str(root)]) == 2
        assert "in use by pid" in capsys.readouterr().err
        assert main(["ckpt", "prune", str(root), "--dry-run"]) == 0
    assert (root / "global_step_1.pt").exists()


def test_a_custom_loop_s_records_are_foreign_and_not_bad(tmp_path):
    save_checkpoint(None, "0007", str(tmp_path), {"batch": 7}, kind="metadata")
    (row,) = list_checkpoints(tmp_path, RetentionPolicy()).rows
    assert (row.name, row.state, row.step, row.problem) == ("0007", "foreign", 7, None)
