"""A server that dies and comes back under a live client, which sees nothing of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sdk_programs import chaos_serve

KILLS, STEPS = 3, 10


@pytest.fixture(scope="module")
def runs(sdk, tmp_path_factory):
    """The loop with a server that nobody touches, and with one that is killed; at the same time."""
    folder, python = tmp_path_factory.mktemp("kills"), str(sdk / "python")
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(chaos_serve.run_loop, python, folder / "whole", STEPS)
        killed = pool.submit(chaos_serve.run_loop, python, folder / "killed", STEPS, KILLS, seed=1)
        return whole.result(), killed.result()


def test_a_loop_whose_server_is_killed_ends_with_the_same_bits(runs):
    whole, killed = runs
    assert killed.kills >= KILLS
    assert len(whole.lines) == STEPS
    assert len(whole.files) == 2 * STEPS
    assert chaos_serve.differences(whole, killed) == []


def test_a_difference_is_seen(runs):
    whole, _ = runs
    other = chaos_serve.LoopRun(whole.lines[:-1], {**whole.files, "more": b""}, 0, 0.0)
    assert len(chaos_serve.differences(whole, other)) == 2
    name = min(whole.files)
    flipped = chaos_serve.LoopRun(whole.lines, {**whole.files, name: whole.files[name][::-1]}, 0, 0.0)
    assert chaos_serve.differences(whole, flipped) == [f"{name} differs"]
