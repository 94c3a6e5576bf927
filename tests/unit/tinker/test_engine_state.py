"""Saved models: what lies in the directory, what comes back, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from agentlightning.checkpoint.manifest import read as read_manifest
from agentlightning.checkpoint.manifest import verified_bytes
from agentlightning.errors import CheckpointError, UserError
from agentlightning.tinker.engine import EngineSettings, InProcessLoraEngine
from agentlightning.tinker.engine_saved import read_saved_model
from agentlightning.tinker.types import AdamParams, Datum, LoraConfig, ModelInput

LORA = LoraConfig(rank=4, seed=3)
ADAM = AdamParams(learning_rate=1e-2)


@pytest.fixture
def engine() -> InProcessLoraEngine:
    engine = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1))
    engine.create_model("m", LORA)
    return engine


def accumulate(engine: InProcessLoraEngine, step: int, model: str = "m") -> None:
    rng = np.random.default_rng(step)
    data = [
        Datum(ModelInput.from_ints(rng.integers(0, 256, n).tolist()), {"target_tokens": rng.integers(0, 256, n)})
        for n in (3, 5)
    ]
    engine.forward_backward(model, data, "cross_entropy")


def train(engine: InProcessLoraEngine, step: int, model: str = "m") -> None:
    accumulate(engine, step, model)
    engine.optim_step(model, ADAM)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_uninterrupted_is_resumed_is_not_cold(engine, tmp_path):
    train(engine, 0)
    train(engine, 1)
    engine.save_state("m", tmp_path / "a")
    train(engine, 2)
    ends = {}
    for with_optimizer in (True, False):
        other = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1))
        other.create_model("s:train:1", LoraConfig(rank=4, seed=99))
        other.load_state("s:train:1", tmp_path / "a", optimizer=with_optimizer)
        train(other, 2, "s:train:1")
        ends[with_optimizer] = other.models["s:train:1"]
    assert same(engine.models["m"].weights(), ends[True].weights())
    assert not same(engine.models["m"].weights(), ends[False].weights())
    assert same(engine.models["m"].optimizer.state(), ends[True].optimizer.state())
    assert (ends[True].steps, ends[False].steps) == (3, 1)


def test_a_pending_gradient_comes_back_with_the_optimizer_alone(engine, tmp_path):
    train(engine, 0)
    accumulate(engine, 1)
    engine.save_state("m", tmp_path / "a")
    accumulate(engine, 2)
    engine.optim_step("m", ADAM)
    engine.create_model("n", LORA)
    accumulate(engine, 9, "n")  # dropped by the load
    engine.load_state("n", tmp_path / "a", optimizer=True)
    accumulate(engine, 2, "n")
    engine.optim_step("n", ADAM)
    assert same(engine.models["m"].weights(), engine.models["n"].weights())
    engine.load_state("n", tmp_path / "a", optimizer=False)
    assert engine.models["n"].pending == 0
    assert not engine.models["n"].gradient.any()


def test_the_directory_is_verified_durable_and_peft_s(engine, tmp_path):
    train(engine, 0)
    size = engine.save_state("m", tmp_path / "a")
    files = verified_bytes(tmp_path / "a", read_manifest(tmp_path / "a"))
    assert sorted(files) == [
        "actor/adapter_config.json",
        "actor/adapter_model.safetensors",
        "actor/optimizer-00000-of-00001.safetensors",
        "trainer_state.json",
    ]
    assert size == sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert (tmp_path / "a.pt").is_file()
    weights = load_file(tmp_path / "a/actor/adapter_model.safetensors")
    assert same(weights, engine.models["m"].weights())
    assert read_saved_model(tmp_path / "a").lora == LORA
    with pytest.raises(CheckpointError, match="not written over"):
        engine.save_state("m", tmp_path / "a")


def test_another_shape_is_refused_before_anything_changes(engine, tmp_path):
    engine.save_state("m", tmp_path / "a")
    engine.create_model("wide", LoraConfig(rank=8, seed=1))
    before = engine.models["wide"].weights()
    with pytest.raises(
        UserError, match=r"lora_config.rank is 4 there and 8 in the model; expected a model created with rank=4"
    ):
        engine.load_state("wide", tmp_path / "a", optimizer=True)
    assert same(before, engine.models["wide"].weights())
    engine.create_model("headless", LoraConfig(rank=4, train_unembed=False))
    with pytest.raises(UserError, match=r"lora_config.train_unembed is True there and False"):
        engine.load_state("headless", tmp_path / "a", optimizer=False)


def test_another_base_is_refused_whatever_it_is_called(engine, tmp_path, base_path):
    engine.save_state("m", tmp_path / "a")
    same_base = shutil.copytree(base_path, tmp_path / "copy")
    other = InProcessLoraEngine(EngineSettings(str(same_base), "cpu", num_threads=1))
    other.create_model("m", LORA)
    other.load_state("m", tmp_path / "a", optimizer=True)
    other.digest = "of another base"
    with pytest.raises(UserError, match=r"is of the base 'tiny', and this engine holds '.*copy'"):
        other.load_state("m", tmp_path / "a", optimizer=True)


def test_a_flipped_bit_and_a_missing_directory_are_refused(engine, tmp_path):
    engine.save_state("m", tmp_path / "a")
    file = tmp_path / "a/actor/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = engine.models["m"].weights()
    with pytest.raises(CheckpointError, match="does not match its digest"):
        engine.load_state("m", tmp_path / "a", optimizer=True)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        engine.add_sampler("x", tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.load_state("m", tmp_path / "nowhere", optimizer=True)
    assert same(before, engine.models["m"].weights())


def test_weights_to_sample_from_have_no_optimizer(engine, tmp_path):
    train(engine, 0)
    engine.save_sampler("m", tmp_path / "s")
    engine.load_state("m", tmp_path / "s", optimizer=False)
    with pytest.raises(UserError, match="holds weights to sample from and no optimizer"):
        engine.load_state("m", tmp_path / "s", optimizer=True)


def test_a_checkpoint_of_something_else_is_refused(engine, tmp_path: Path):
    from agentlightning.checkpoint.store import CheckpointFiles, save

    save(tmp_path, "global_step_1", 1, CheckpointFiles({}, json={"trainer_state.json": {"epoch": 1}}))
    with pytest.raises(CheckpointError, match="is not the state of a model"):
        engine.load_state("m", tmp_path / "global_step_1", optimizer=True)
