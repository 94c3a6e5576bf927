"""A server that dies and comes back under a live client, which sees nothing of it."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from sdk_programs import HERE, chaos_serve, serving

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


def test_an_idle_client_goes_on_with_a_server_that_was_stopped_and_started(sdk, tmp_path):
    """SIGTERM ends it with exit code 0; an open gradient sum, snapshots and numbers are there again."""
    out = tmp_path / "seen.json"
    with serving(tmp_path / "root") as server:
        command = [str(sdk / "python"), str(HERE / "client_idle.py"), str(out)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=server.client_environment(), **pipes) as idle:
            assert idle.stdout.readline() == "idle\n"
            assert server.stop() == 0
            server.start()
            server.wait_ready()
            idle.communicate("go on\n", timeout=200)
    assert idle.returncode == 0
    seen = json.loads(out.read_text())
    assert seen["after"] == seen["before"]
    assert seen["norm"]["grad_norm:mean"] > 0
    assert seen["stepped"]["loss"] != seen["after"]["loss"]
    assert seen["stepped"]["logprobs"] == seen["after"]["logprobs"]
    assert seen["saved"].endswith("/weights/behind")
