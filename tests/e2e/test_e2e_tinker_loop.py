"""The example loop killed with `kill -9` at delicate places and started again: it ends as one that was never killed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentlightning import checkpoint_utils

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
EXAMPLES = Path(__file__).parents[2] / "examples" / "tinker"
LOOP = EXAMPLES / "agl_tinker" / "train.py"
BATCHES = 4
SMALL = (f"--num_batches={BATCHES}", "--problems_per_batch=4", "--group_size=4", "--save_every=2", "--log_path=log")
KILLED_IN = """
import importlib, os, runpy, signal, sys
script, module, path, number = sys.argv[1:5]
holder, _, name = path.rpartition(".")
holder = getattr(importlib.import_module(module), holder) if holder else importlib.import_module(module)
function, calls = getattr(holder, name), []
def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
setattr(holder, name, killed)
sys.argv = sys.argv[4:]
runpy.run_path(script, run_name="__main__")
"""


def run(cwd: Path, *killed_in: str) -> subprocess.CompletedProcess[str]:
    """The loop; with (module, function, number) it is killed when it calls the function for that time."""
    start = ["-c", KILLED_IN, str(LOOP), *killed_in] if killed_in else [str(LOOP)]
    cwd.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, *start, *SMALL], cwd=cwd, capture_output=True, text=True, timeout=300)


def state(cwd: Path) -> dict[str, bytes]:
    record = checkpoint_utils.get_last_checkpoint(cwd / "log")
    assert record is not None
    assert (record.name, record.batch) == ("final", BATCHES)
    assert record.state_path is not None
    tensors = Path(record.state_path).rglob("*.safetensors")
    return {path.name: path.read_bytes() for path in tensors}


def rewards(*outputs: str) -> dict[str, set[str]]:
    """What was said of each batch."""
    said: dict[str, set[str]] = {}
    for batch, reward in re.findall(r"^batch (\d+)/\d+  reward (\S+)", "\n".join(outputs), re.MULTILINE):
        said.setdefault(batch, set()).add(reward)
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody kills."""
    cwd = tmp_path_factory.mktemp("whole")
    done = run(cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done.stdout


def test_a_loop_killed_at_delicate_places_ends_as_one_that_was_never_killed(whole, tmp_path):
    cwd, output = whole
    outputs = []
    for killed_in in (
        ("agentlightning.tinker.engine_model", "LoraModel.step", "2"),  # before anything was saved
        ("agentlightning.checkpoint.loop_record", "commit", "1"),  # the state is saved, and no record names it yet
        (
            "agentlightning.tinker.engine",
            "InProcessLoraEngine.save_sampler",
            "1",
        ),  # between the state and the sampler's weights
        ("agentlightning.tinker.engine", "InProcessLoraEngine.sample", "7"),  # behind the first save, in the middle of a batch
        ("agentlightning.checkpoint.loop_record", "commit", "1"),  # the last save: only its record is missing
    ):
        killed = run(tmp_path, *killed_in)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        outputs.append(killed.stdout)
    last = run(tmp_path)
    assert last.returncode == 0, last.stderr
    assert "goes on at batch 3 from" in last.stdout
    assert rewards(*outputs, last.stdout) == rewards(output)
    assert len(rewards(output)) == BATCHES
    assert state(tmp_path) == state(cwd)
    assert {"adapter_model.safetensors", "optimizer-00000-of-00001.safetensors"} <= state(cwd).keys()


def test_a_finished_loop_has_nothing_to_do(whole):
    cwd, _ = whole
    before = sorted(os.listdir(cwd / "log"))
    again = run(cwd)
    assert (again.returncode, again.stdout) == (0, "Training was already complete; nothing to do\n")
    assert sorted(os.listdir(cwd / "log")) == before
