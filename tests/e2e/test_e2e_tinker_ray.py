"""The engine of the service on Ray workers: the bits of the engine in this process, and the same errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agentlightning.errors import NumericsError, UserError
from agentlightning.tinker.engine import EngineSettings, InProcessLoraEngine
from agentlightning.tinker.engine_api import SampleRequest
from agentlightning.tinker.ray_engine import RayLoraEngine
from agentlightning.tinker.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams, TensorData

pytestmark = pytest.mark.e2e
SETTINGS = EngineSettings("tiny", "cpu", num_threads=1)
DATA = [
    Datum(ModelInput.from_ints([258, *range(20, 20 + n)]), {"target_tokens": [*range(20, 20 + n), 257]})
    for n in (2, 9, 4, 6, 3)
]
OVERFLOWING = Datum(ModelInput.from_ints([258]), {"target_tokens": [20], "logprobs": [-1000.0], "advantages": [1.0]})
SAMPLES = [
    SampleRequest(
        *("now", ModelInput.from_ints([258, 20 + i]), 2, SamplingParams(max_tokens=12, stop=[]), f"s{i}"),
        target_prompt_logprobs=TensorData([30], "int64", [1, 3], [0, 1], [2]),
        prompt_alt_tokens_k=4,
    )
    for i in range(3)
]


def step(engine, model_id: str = "m") -> tuple:
    out = engine.forward_backward(model_id, DATA, "cross_entropy")
    metrics = engine.optim_step(model_id, AdamParams(learning_rate=1e-2))
    return out.metrics, [o["logprobs"].tolist() for o in out.loss_fn_outputs], metrics


def played(engine, directory: Path) -> list:
    """Train, fail, save with a gradient pending, sample, load and go on."""
    engine.create_model("m", LoraConfig(rank=4, seed=7))
    seen: list = [step(engine)]
    with pytest.raises(UserError, match="datum 5, target_tokens: given token id 999"):
        engine.forward_backward("m", [*DATA, Datum(ModelInput.from_ints([1]), {"target_tokens": [999]})], "cross_entropy")
    with pytest.raises(UserError, match="no gradient"):
        engine.optim_step("m", AdamParams())
    seen.append(engine.forward_backward("m", DATA, "cross_entropy").metrics)
    harmless = Datum(ModelInput.from_ints([258]), {"target_tokens": [20], "logprobs": [-1.0], "advantages": [1.0]})
    with pytest.raises(NumericsError, match="the loss is"):
        engine.forward_backward("m", [harmless, OVERFLOWING], "importance_sampling")
    engine.save_state("m", directory / "a")
    engine.add_sampler("now", "m")
    samples = engine.sample(SAMPLES)
    seen.append([([s.tokens for s in r.sequences], r.prompt_alt_tokens.tokens.tolist()) for r in samples])
    assert all(r.target_prompt_logprobs.to_numpy()[0, 2] < 0 for r in samples)
    engine.create_model("n", LoraConfig(rank=4, seed=8))
    engine.load_state("n", directory / "a", optimizer=True)
    for model_id in ("m", "n"):
        seen.append([engine.optim_step(model_id, AdamParams(learning_rate=1e-2)), step(engine, model_id)])
    with pytest.raises(UserError, match="no sampler 'gone'"):
        engine.sample([SampleRequest("gone", ModelInput.from_ints([258]), 1, SamplingParams(), "x")])
    return seen


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_train_and_sample_as_one_process_does(tmp_path: Path, workers: int):
    expected = played(InProcessLoraEngine(SETTINGS), tmp_path / "here")
    engine = RayLoraEngine(workers, SETTINGS, log_dir=tmp_path / "logs")
    try:
        given = played(engine, tmp_path / "ray")
        held = engine.memory()
    finally:
        engine.close()
    assert held.host_bytes > workers * 1e8  # torch alone is that much
    assert held.device_bytes == 0
    assert given[-1] == given[-2], "a loaded model does not go on as the one that was saved"
    if workers == 1:
        assert given == expected
        return
    assert given[2] == expected[2]
    for place in (0, 1, 3):
        np.testing.assert_allclose(numbers(given[place]), numbers(expected[place]), rtol=2e-4, atol=2e-4)


def numbers(value: object) -> list[float]:
    """All numbers in nested containers, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    assert isinstance(value, float)
    return [value]
