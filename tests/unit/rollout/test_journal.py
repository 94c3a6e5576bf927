"""Finished samples outlive the process that sampled them, and only those of the same adapter, step and tool are used again."""

import errno
import logging
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from agentlightning.calculator.task import calculate
from agentlightning.rollout import journal as journal_module
from agentlightning.rollout.engine import DecodeLoop
from agentlightning.rollout.journal import RolloutJournal, adapter_digest, tool_digest
from agentlightning.types import Completion, JournalSpec, SamplingParams

AGENT = SamplingParams(n=4, max_tokens=96, max_assistant_turns=4, max_tokens_per_turn=16)
IDENTITY = {"adapter": "a", "step": 3}


class Killed(Exception):
    """In the place of a SIGKILL."""


@pytest.fixture
def engine(base_model, renderer):
    return DecodeLoop(base_model, renderer, max_num_seqs=8, tool=calculate)


def opened(directory, reuse="whole", identity=None):
    return RolloutJournal(JournalSpec(str(directory), reuse), identity or IDENTITY)


def same(a: Completion, b: Completion) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("token_ids", "mask", "logprobs"))
    names = ("uid", "sample_index", "turns", "stop_reason", "adapter_version")
    return arrays and all(getattr(a, name) == getattr(b, name) for name in names)


def killed_after(engine, tokens):
    left = iter(range(tokens))

    def check():
        if next(left, None) is None:
            raise Killed

    return replace(engine, check=check)


def test_what_was_finished_is_given_back_as_it_was(engine, prompts, tmp_path):
    first = engine.generate(prompts[:4], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    never = replace(engine, check=lambda: pytest.fail("sampled again"))
    again = never.generate(prompts[:4], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert [c.from_journal for c in first] == [False] * 16
    assert [c.from_journal for c in again] == [True] * 16


def test_row_rollouts_before_the_kill_are_thrown_away_each_sample_is_kept_as_it_finishes(engine, prompts, tmp_path):
    whole = engine.generate(prompts[:4], AGENT, 7, 3, 2)
    with pytest.raises(Killed):
        killed_after(engine, 20).generate(prompts[:4], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    again = engine.generate(prompts[:4], AGENT, 7, 3, 2, opened(tmp_path / "step_3", "each"))
    reused = [c for c in again if c.from_journal]
    assert 0 < len(reused) < 16
    assert all(same(a, b) for a, b in zip(whole, again, strict=True) if b.from_journal)
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in whole]
    # The second start has added the rest to what the first one left.
    assert all(c.from_journal for c in engine.generate(prompts[:4], AGENT, 7, 3, 2, opened(tmp_path / "step_3", "whole")))


def test_a_share_that_is_not_whole_is_sampled_again_where_bits_count(engine, prompts, tmp_path):
    whole = engine.generate(prompts[:4], AGENT, 7, 3, 2)
    with pytest.raises(Killed):
        killed_after(engine, 20).generate(prompts[:4], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    again = engine.generate(prompts[:4], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    assert not any(c.from_journal for c in again)
    assert all(same(a, b) for a, b in zip(whole, again, strict=True))


def test_samples_of_another_adapter_are_not_used(engine, prompts, tmp_path):
    engine.generate(prompts[:1], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    wanted = [(prompts[0].uid, i) for i in range(4)]
    assert len(opened(tmp_path / "step_3").reusable(wanted)) == 4
    assert opened(tmp_path / "step_3", "each", {**IDENTITY, "adapter": "b"}).reusable(wanted) == {}


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign"])
def test_a_damaged_line_and_all_behind_it_are_passed_over(engine, prompts, tmp_path, damage):
    engine.generate(prompts[:1], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    (file,) = (tmp_path / "step_3").glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    lines[2] = {
        "torn": lines[2][:-9],
        "flipped": lines[2].replace(b'"stop_reason": "', b'"stop_reason": "x'),
        "empty": b"\n",
        "foreign": b"hello\n",
    }[damage]
    file.write_bytes(b"".join(lines))
    assert len(opened(tmp_path / "step_3", "each").reusable([(prompts[0].uid, i) for i in range(4)])) == 1


def test_where_the_run_directory_cannot_be_seen_nothing_is_written(engine, prompts, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        engine.generate(prompts[:1], AGENT, 7, 3, 2, opened(tmp_path / "elsewhere" / "step_3"))
    assert "not journaled" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_journal_and_not_the_rollout(engine, prompts, tmp_path, monkeypatch, caplog):
    def full(_descriptor, _data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module.os, "write", full)
    with caplog.at_level(logging.WARNING):
        completions = engine.generate(prompts[:2], AGENT, 7, 3, 2, opened(tmp_path / "step_3"))
    assert len(completions) == 8
    assert caplog.text.count("No space left") == 1


def test_the_identity_follows_weights_and_tool(tmp_path, monkeypatch):
    weights = {"b": torch.ones(2, 3), "a": torch.zeros(4)}
    changed = {"b": torch.ones(2, 3), "a": torch.tensor([0.0, 0.0, 0.0, 1e-8])}
    assert adapter_digest(weights) == adapter_digest(dict(reversed(weights.items()))) != adapter_digest(changed)
    monkeypatch.syspath_prepend(str(tmp_path))
    tool = tmp_path / "journal_tool.py"
    tool.write_text("def tool(text, extra_info): ...\n")
    before = tool_digest("journal_tool:tool")
    tool.write_text("def tool(text, extra_info): return 'mended'\n")
    assert before is not None
    assert before.startswith("journal_tool:tool ")
    assert tool_digest("journal_tool:tool") != before
    assert tool_digest(None) is None
    assert asdict(AGENT)  # the sampling parameters are part of it as a plain dictionary
