"""Where reward functions run: async, batch, several, in processes that are killed; and samples without a reward."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from agentlightning.checkpoint.preemption import Preempted, Preemption
from agentlightning.errors import ConfigError, RewardError
from agentlightning.types import Completion, Prompt
from agentlightning.verl.config import load_config
from agentlightning.verl.rewards import Rewards

PROMPTS = [Prompt(f"train:{i}", ({"role": "user", "content": "?"},), (1,), "sums", str(i), {"index": i}) for i in range(4)]


def _completion(uid, sample_index, content):
    empty = np.zeros(0, dtype=np.float32)
    turns = ({"role": "assistant", "content": content},)
    return Completion(uid, sample_index, empty.astype(np.int32), empty.astype(bool), empty, turns, "stop", 0)


COMPLETIONS = [_completion(f"train:{i}", j, f"{i}.{j}") for i in range(4) for j in range(2)]
SCORES = [float(f"{i}.{j}") for i in range(4) for j in range(2)]
SIGNATURE = "(data_source, solution_str, ground_truth, extra_info=None)"


@pytest.fixture
def rewards_of(tmp_path):
    """Makes `Rewards` of a function's source and overrides, and closes them."""
    made = []

    def make(source, *overrides):
        path = tmp_path / "mine.py"
        path.write_text(source)
        where = [f"custom_reward_function.path={path}", "custom_reward_function.name=compute_score"]
        made.append(Rewards.from_config(load_config([*where, *overrides])))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


ASYNC = f"""
import asyncio
most = now = 0
async def compute_score{SIGNATURE}:
    global most, now
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.02 * (3 - float(solution_str)))  # the first ones end last
    now -= 1
    return {{"score": float(solution_str), "most": most, "now": now}}
"""


def test_async_functions_run_at_the_same_time_and_keep_the_order(rewards_of):
    result = rewards_of(ASYNC, "reward.num_workers=3").score(PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(result.score_B, np.array(SCORES, dtype=np.float32))
    assert max(result.extra["most"]) == 3


BATCH = """
def compute_score(data_sources, solution_strs, ground_truths, extra_infos):
    assert data_sources == ["sums"] * 8 and [info["index"] for info in extra_infos] == [0, 0, 1, 1, 2, 2, 3, 3]
    mean = sum(map(float, solution_strs)) / len(solution_strs)
    return [{"score": float(solution) - mean, "truth": float(truth)} for solution, truth in zip(solution_strs, ground_truths)]
"""


@pytest.mark.parametrize("form", ["def", "async def"])
@pytest.mark.parametrize("overrides", [[], ["reward.timeout_s=20"]])
def test_batch_functions_see_the_whole_batch(rewards_of, form, overrides):
    result = rewards_of(BATCH.replace("def", form, 1), *overrides).score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(result.score_B, np.array(SCORES) - np.mean(SCORES), rtol=1e-6)
    assert result.extra == {"truth": [0, 0, 1, 1, 2, 2, 3, 3]}


@pytest.mark.parametrize(("returned", "words"), [("[1.0]", "a list of 1"), ("3", "a int"), ("'12345678'", "a str of 8")])
def test_a_batch_function_that_returns_no_list_of_scores(rewards_of, returned, words):
    rewards = rewards_of(f"def compute_score(data_sources, solution_strs, ground_truths, extra_infos): return {returned}")
    with pytest.raises(RewardError, match=f"returned {words} for a batch of 8 samples, sample 0 of train:0 the first"):
        rewards.score(PROMPTS, COMPLETIONS)


PLAIN = f"def compute_score{SIGNATURE}:\n    return {{'score': float(solution_str), 'acc': True, 'text': 'x'}}\n"


def test_processes_give_the_same_scores_and_are_kept(rewards_of):
    here, there = rewards_of(PLAIN), rewards_of(PLAIN, "reward.timeout_s=20", "reward.num_workers=2")
    first = there.score(PROMPTS, COMPLETIONS)
    workers = _children()
    np.testing.assert_array_equal(first.score_B, here.score(PROMPTS, COMPLETIONS).score_B)
    assert first.extra == {"acc": [1.0] * 8}
    np.testing.assert_array_equal(there.score(PROMPTS, COMPLETIONS).score_B, first.score_B)
    assert _children() == workers
    assert len(workers) == 2
    there.close()
    assert not _children() & workers


HANGS = f"""
import os, pathlib, subprocess, sys, time
HERE = pathlib.Path(__file__).parent
def compute_score{SIGNATURE}:
    print("to standard output")
    if solution_str == "1.1":
        with open(HERE / "tries", "a") as file:
            file.write("x")
        if len((HERE / "tries").read_text()) <= int((HERE / "hangs").read_text()):
            WHAT
    return float(solution_str)
"""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("while True: pass", "took longer than 0.3 s"),
        ("subprocess.run(['sleep', '61'])", "took longer than 0.3 s"),
        ("os._exit(3)", r"ended its process \(exit status 3\)"),
        ("sys.exit(3)", "raised SystemExit"),
        ("raise KeyError('eggs')", "raised KeyError"),
    ],
)
def test_what_hangs_or_dies_is_replaced_and_tried_again(rewards_of, tmp_path, what, words):
    (tmp_path / "hangs").write_text("1")
    overrides = ["reward.timeout_s=0.3", "reward.num_workers=2"]
    rewards = rewards_of(HANGS.replace("WHAT", what), *overrides, "reward.retries=1")
    assert rewards.score(PROMPTS, COMPLETIONS).score_B.tolist() == pytest.approx(SCORES)
    assert (tmp_path / "tries").read_text() == "xx"
    (tmp_path / "hangs").write_text("9")
    with pytest.raises(RewardError, match=f"{words} .*for sample 1 of train:1.*reward.on_error=zero .* reward.on_error=mask"):
        rewards.score(PROMPTS, COMPLETIONS)
    rewards.close()
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "61"]]


@pytest.mark.parametrize("overrides", [[], ["reward.timeout_s=0.3", "reward.num_workers=2"]])
@pytest.mark.parametrize("on_error", ["zero", "mask"])
def test_samples_without_a_reward(rewards_of, on_error, overrides):
    source = PLAIN.replace("return", "if solution_str == '2.0': return 'text'\n    if solution_str == '1.1': 1 / 0\n    return")
    result = rewards_of(source, f"reward.on_error={on_error}", *overrides).score(PROMPTS, COMPLETIONS)
    assert result.score_B.tolist() == pytest.approx([0.0, 0.1, 1.0, 0.0, 0.0, 2.1, 3.0, 3.1])
    assert result.failed_B.tolist() == [False, False, False, True, True, False, False, False]
    assert result.masked_B.tolist() == (result.failed_B & (on_error == "mask")).tolist()
    assert result.extra == {"acc": [1, 1, 1, 0, 0, 1, 1, 1]}
    (warning,) = result.warnings
    assert warning.startswith(f"2 of 8 samples have no reward (reward.on_error={on_error}); the first: ")
    assert "raised ZeroDivisionError for sample 1 of train:1" in warning


def test_an_answer_that_is_no_number_is_not_asked_for_again(rewards_of, tmp_path):
    source = f"n = 0\ndef compute_score{SIGNATURE}:\n    global n\n    n += 1\n    return {{'score': None if n == 1 else n}}\n"
    result = rewards_of(source, "reward.on_error=zero", "reward.retries=3").score(PROMPTS, COMPLETIONS[:2])
    assert result.score_B.tolist() == [0.0, 2.0]


def test_async_functions_that_are_late_or_raise(rewards_of):
    source = f"""
import asyncio
tries = {{}}
async def compute_score{SIGNATURE}:
    tries[solution_str] = tries.get(solution_str, 0) + 1
    if solution_str == "0.0":
        await asyncio.sleep(60)
    if solution_str == "1.0" and tries[solution_str] == 1:
        raise TimeoutError("mine")
    return tries[solution_str]
"""
    overrides = ["reward.timeout_s=0.1", "reward.retries=1", "reward.on_error=zero"]
    result = rewards_of(source, *overrides).score(PROMPTS, COMPLETIONS)
    assert result.score_B.tolist() == [0, 1, 2, 1, 1, 1, 1, 1]
    assert "took longer than 0.1 s (reward.timeout_s) for sample 0 of train:0" in result.warnings[0]


def test_an_async_function_that_blocks_the_loop(rewards_of, monkeypatch):
    monkeypatch.setattr("agentlightning.verl.reward_loop._GRACE_S", 0.3)
    source = (
        f"import time\nasync def compute_score{SIGNATURE}:\n    if solution_str == '3.1': time.sleep(1.5)\n    return 1.0\n"
    )
    rewards = rewards_of(source, "reward.timeout_s=0.1", "reward.on_error=zero")
    result = rewards.score(PROMPTS, COMPLETIONS)
    assert result.score_B.tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert "blocked the event loop" in result.warnings[0]
    assert rewards.score(PROMPTS, COMPLETIONS[:2]).score_B.tolist() == [1, 1]  # on a new loop


@pytest.mark.parametrize("form", ["def", "async def"])
def test_sys_exit_is_one_of_the_things_that_a_function_may_raise(rewards_of, form):
    source = f"import sys\n{form} compute_score{SIGNATURE}: sys.exit(3)\n"
    with pytest.raises(RewardError, match="raised SystemExit for sample 0 of train:0"):
        rewards_of(source).score(PROMPTS, COMPLETIONS[:1])


# ---- several functions


def _functions(tmp_path, **weights):
    (tmp_path / "mine.py").write_text(
        f"def answer{SIGNATURE}: return float(solution_str)\n"
        f"def form{SIGNATURE}: return {{'score': 1.0, 'acc': 2}}\n"
        f"def broken{SIGNATURE}: return float('nan') if solution_str == '0.1' else 5.0\n"
    )
    return [
        f"+reward.functions.{name}={{path: {tmp_path / 'mine.py'}, name: {name}, weight: {weight}}}"
        for name, weight in weights.items()
    ]


def test_the_weighted_sum_of_several_functions(tmp_path):
    config = load_config(_functions(tmp_path, answer=2.0, form=-0.5))
    with Rewards.from_config(config) as rewards:
        result = rewards.score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(result.score_B, 2.0 * np.array(SCORES) - 0.5, rtol=1e-6)
    np.testing.assert_array_equal(result.components["answer"], np.array(SCORES, dtype=np.float32))
    assert result.components["form"].tolist() == [1.0] * 8
    assert result.extra == {"form/acc": [2.0] * 8}


def test_one_failing_function_of_several_fails_the_sample(tmp_path):
    config = load_config([*_functions(tmp_path, answer=1.0, broken=1.0), "reward.on_error=mask"])
    with Rewards.from_config(config) as rewards:
        result = rewards.score(PROMPTS, COMPLETIONS)
    assert (result.score_B[1], result.components["broken"][1], result.masked_B.tolist()) == (0, 0, [False, True] + [False] * 6)
    assert "the reward function broken returned nan for sample 1 of train:0" in result.warnings[0]


# ---- asked to stop


SLOW = {
    "processes": (f"def compute_score{SIGNATURE}:\n    while True: pass\n", ["reward.timeout_s=60", "reward.num_workers=2"]),
    "async": (f"import asyncio\nasync def compute_score{SIGNATURE}: await asyncio.sleep(60)\n", []),
    "blocked": (f"import time\nasync def compute_score{SIGNATURE}: time.sleep(0.7)\n", ["reward.num_workers=1"]),
}


@pytest.mark.parametrize("form", SLOW)
@pytest.mark.parametrize("how", ["signal", "flag"])
def test_a_request_to_stop_is_answered_at_once(rewards_of, form, how):
    source, overrides = SLOW[form]
    rewards = rewards_of(source, *overrides)
    stop = Preemption()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    asked_at = []

    def ask():
        asked_at.append(time.monotonic())
        if how == "flag":
            stop.request("a deadline")
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(0.3, ask)
    timer.start()
    stop.install()
    try:
        with pytest.raises(Preempted), stop.interrupting():
            rewards.score(PROMPTS, COMPLETIONS, stop.check)
        assert time.monotonic() - asked_at[0] < 0.2
    finally:
        timer.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    children = _children()
    rewards.close()
    assert not _children() & children
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "reward-loop")


def test_a_worker_ends_when_its_trainer_is_killed(tmp_path):
    (tmp_path / "mine.py").write_text(f"def compute_score{SIGNATURE}:\n    while True: pass\n")
    program = f"""
import sys
sys.path[:] = {sys.path!r}
from agentlightning.verl.reward_pool import WorkerPool
from agentlightning.verl.reward_functions import Sample
pool = WorkerPool({str(tmp_path / "mine.py")!r}, "compute_score", "key", batch=False, num_workers=1, timeout_s=99, retries=0)
def check():
    if pool._workers[0].job is not None:
        print(pool._workers[0].process.pid, flush=True)
list(pool.outcomes([Sample("a", dict.fromkeys(["data_source", "solution_str", "ground_truth", "extra_info"]))], check))
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = psutil.Process(int(trainer.stdout.readline()))
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    worker.wait(5)
    assert not worker.is_running()


# ---- wrong from the start


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "def compute_score(solution_str, truth): ...",
            ["compute_score(solution_str, truth)", "cannot be called with data_source"],
        ),
        ("def compute_score(data_sources, solution_strs): ...", ["cannot be called with data_sources, solution_strs"]),
        (
            "class compute_score: ...",
            ["cannot be called with", "compute_score(data_source, solution_str, ground_truth, extra_info)"],
        ),
    ],
)
def test_a_function_with_other_arguments(rewards_of, source, words):
    with pytest.raises(ConfigError) as error:
        rewards_of(source)
    for word in [*words, "custom_reward_function.name: given ", "mend the function, or set custom_reward_function.name="]:
        assert word in str(error.value)


def test_one_of_several_functions_is_not_there(tmp_path):
    config = load_config(_functions(tmp_path, answer=1.0, nowhere=1.0))
    with pytest.raises(ConfigError, match=r"reward.functions.nowhere.name: no function 'nowhere'"):
        Rewards.from_config(config)


def test_a_row_that_cannot_be_sent_to_a_process(rewards_of):
    prompt = Prompt("train:0", (), (1,), "sums", "4", {"thing": object()})
    rewards = rewards_of(PLAIN, "reward.timeout_s=20", "reward.num_workers=1")
    with pytest.raises(RewardError, match=r"cannot be sent sample 0 of train:0: .*reward.timeout_s=null"):
        rewards.score([prompt], COMPLETIONS[:1])


def _children():
    return {p.pid for p in psutil.Process().children() if "reward_worker" in " ".join(p.cmdline())}
