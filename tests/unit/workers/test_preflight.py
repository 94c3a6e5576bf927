"""The estimate against what autograd keeps and what the model weighs; what helps where it is too much."""

from dataclasses import replace

import pytest
import torch
from test_worker import worker_settings
from transformers import Qwen3Config, Qwen3ForCausalLM

from agentlightning.errors import UserError
from agentlightning.models.adapters import Adapters
from agentlightning.types import LoraShape, MicroBatches
from agentlightning.workers import worker
from agentlightning.workers.group import InProcess, WorkerGroup
from agentlightning.workers.preflight import ModelSizes, check_memory, estimate_memory, model_sizes

SIZES = ModelSizes(256, 3, 4, 2, 64, 768, 1000, tie_word_embeddings=False)
GIB = 2**30


@pytest.fixture
def settings(base_path):
    settings = worker_settings(base_path)
    return replace(settings, actor=replace(settings.actor, micro_batch=MicroBatches(8, 256)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen3Config(**{name: getattr(SIZES, name) for name in ModelSizes.__slots__})
    return Qwen3ForCausalLM(config)


def test_sizes_are_those_of_the_model(model, settings):
    assert model_sizes(model.config.to_dict()) == SIZES
    estimate = estimate_memory(SIZES, settings, torch.float32, longest=64, merged=False)
    assert estimate.base == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.01)  # norms are left out
    adapters = Adapters(model, {"actor": LoraShape(4, 8)}, 0)
    lora = sum(p.numel() for p in adapters.parameters["actor"].values())
    assert estimate.adapters == lora * 4 * (4 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_about_what_autograd_keeps(model, settings, dtype):
    adapters = Adapters(model.to(dtype).requires_grad_(False), {"actor": LoraShape(4, 8)}, 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = adapters.base.get_decoder()(torch.randint(0, 1000, (4, 64)), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    estimate = estimate_memory(SIZES, settings, dtype, longest=64, merged=False)
    assert 0.7 < estimate.activations / sum(kept.values()) < 1.4


@pytest.mark.parametrize(
    ("change", "override"),
    [
        ({}, "enable_gradient_checkpointing=true"),
        ({"gradient_checkpointing": True}, "ppo_max_token_len_per_gpu=50000000"),
        ({"rollout_seqs": 10**6}, "max_num_seqs=500000"),
    ],
)
def test_the_override_is_that_of_the_largest_part(settings, change, override):
    tokens = 1 if "rollout_seqs" in change else 10**8
    settings = replace(
        settings,
        actor=replace(settings.actor, micro_batch=MicroBatches(8, tokens)),
        rollout=replace(settings.rollout, max_num_seqs=change.get("rollout_seqs", 1)),
        gradient_checkpointing=change.get("gradient_checkpointing", False),
    )
    estimate = estimate_memory(SIZES, settings, torch.float32, longest=64, merged=False)
    assert check_memory(estimate, estimate.peak, settings) is None
    warning = check_memory(estimate, int(estimate.peak * 0.9), settings)
    assert warning is not None
    assert override in warning
    with pytest.raises(UserError, match=override):
        check_memory(estimate, int(estimate.peak * 0.5), settings)


def test_a_base_that_is_too_large_is_named(settings):
    sizes = replace(SIZES, num_hidden_layers=3000)
    settings = replace(settings, actor=replace(settings.actor, micro_batch=MicroBatches(1, 8)))
    estimate = estimate_memory(sizes, settings, torch.float32, longest=8, merged=True)
    with pytest.raises(UserError, match=r"merge_lora=false"):
        check_memory(estimate, GIB // 8, settings)


def test_a_model_of_another_kind_has_no_estimate():
    assert model_sizes({"n_embd": 64, "n_layer": 2}) is None


class Answers:
    """A back end of workers that have said this."""

    def __init__(self, *said: str | None) -> None:
        self.world_size, self.said = len(said), list(said)

    def call(self, method: str, arguments: object) -> list[str | None]:
        assert method == "memory_warning"
        return self.said


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ([None, None], None),
        (["needs 9"], "needs 9"),
        ([None, "needs 9, has 8.1", "needs 9, has 8.0"], "needs 9, has 8.1 (so on 2 of 3 workers)"),
    ],
)
def test_the_controller_hears_of_it_once_however_many_workers_say_it(said, told):
    assert WorkerGroup(Answers(*said)).memory_warning() == told


def test_a_worker_keeps_its_warning_for_the_controller(base_path, monkeypatch):
    settings = replace(worker_settings(base_path), longest=128)
    room = []

    def check(estimate, available, settings):
        room.append(available)
        return check_memory(estimate, int(estimate.peak * 0.9), settings)

    monkeypatch.setattr(worker, "check_memory", check)
    group = WorkerGroup(InProcess(settings, lambda: None))
    assert room[0] > 0
    assert str(group.memory_warning()).startswith("a step needs about ")
