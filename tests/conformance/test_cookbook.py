"""Unmodified loops of tinker_cookbook: they end, and killed with `kill -9` they go on from their last checkpoint.

The cookbook knows models by names of its own, and reads a directory of that name where there is one: the loops run in a folder
where Qwen/Qwen3-8B-Base is the embedded base and HuggingFaceH4/no_robots a few conversations.
"""

import json
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sdk_programs import HERE, serving

from agentlightning.calculator import __file__ as calculator

BASE = Path(calculator).parent / "base"
MODEL, DATA = "Qwen/Qwen3-8B-Base", "HuggingFaceH4/no_robots"
BATCHES = 5
PATIENCE_S = 240.0
SL_LOOP = (
    "-m", "tinker_cookbook.recipes.sl_loop", f"model_name={MODEL}", "batch_size=2", "lora_rank=4", "learning_rate=0.01",
    "save_every=2", "max_length=128",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the names are directories."""
    cwd = tmp_path_factory.mktemp("cookbook")
    (cwd / MODEL).parent.mkdir()
    (cwd / MODEL).symlink_to(BASE)
    rows = [
        [{"role": "user", "content": f"{n} eggs, {n - 9} sold. How many left?"}, {"role": "assistant", "content": "9"}]
        for n in range(20, 20 + 2 * BATCHES)
    ]
    (cwd / DATA).mkdir(parents=True)
    pq.write_table(pa.table({"messages": rows}), cwd / DATA / "train-00000-of-00001.parquet")
    return cwd


@pytest.fixture(scope="module")
def cookbook(place, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("serve_cookbook") / "root", base_model=MODEL, cwd=place) as server:
        yield server


class Loop:
    """A loop of the cookbook with a log path of its own."""

    def __init__(self, sdk, server, place, log: Path, *command: str):
        self.log, self._place = log, place
        self._command = [str(sdk / "python"), *command]
        self._environment = {**server.client_environment(), "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "hf")}
        self.said = log.with_name(f"{log.name}.said")

    def start(self):
        with self.said.open("ab") as said:
            return subprocess.Popen(self._command, cwd=self._place, env=self._environment, stdout=said, stderr=said)

    def run(self):
        process = self.start()
        assert process.wait(timeout=PATIENCE_S) == 0, self.said.read_text()[-4000:]

    def run_until_killed_behind(self, checkpoint: str):
        """Killed as soon as it has named a checkpoint."""
        process, deadline = self.start(), time.monotonic() + PATIENCE_S
        while checkpoint not in self.names():
            assert process.poll() is None, self.said.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()

    def records(self) -> list[dict]:
        file = self.log / "checkpoints.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def names(self) -> list[str]:
        return [record["name"] for record in self.records()]

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.log / "metrics.jsonl").read_text().splitlines()]


def state_of(server, path: str) -> dict[str, bytes]:
    """The bytes behind `tinker://<run>/weights/<name>`."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    (folder,) = (server.root / "models" / run.replace(":", "-") / kind).glob(f"{name}@*")
    return {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}


def test_the_supervised_loop_killed_and_resumed_ends_with_the_same_bits(sdk, cookbook, place, tmp_path):
    whole = Loop(sdk, cookbook, place, tmp_path / "whole", *SL_LOOP, f"log_path={tmp_path / 'whole'}")
    killed = Loop(sdk, cookbook, place, tmp_path / "killed", *SL_LOOP, f"log_path={tmp_path / 'killed'}")
    process = whole.start()  # both at the same time: their models have nothing to do with each other
    killed.run_until_killed_behind("000002")
    killed.run()
    assert process.wait(timeout=PATIENCE_S) == 0, whole.said.read_text()[-4000:]
    assert whole.names() == ["000002", "000004", "final"]
    assert killed.names()[-1] == "final"
    assert "Resuming from batch" in killed.said.read_text()
    states = [state_of(cookbook, loop.records()[-1]["state_path"]) for loop in (whole, killed)]
    assert states[0] == states[1]
    assert len(states[0]) >= 2


def test_the_rl_trainer_killed_and_resumed_ends(sdk, cookbook, place, tmp_path):
    log = tmp_path / "rl"
    loop = Loop(sdk, cookbook, place, log, str(HERE / "client_cookbook_rl.py"), MODEL, str(log), str(BATCHES))
    loop.run_until_killed_behind("000002")
    loop.run()
    assert "Resumed training from tinker://" in loop.said.read_text()
    assert loop.names()[-1] == "final"
    assert loop.records()[-1]["batch"] == BATCHES
    assert set(loop.steps()) == set(range(BATCHES))
    assert state_of(cookbook, loop.records()[-1]["state_path"])
