"""rsLoRA, DoRA and excluded modules: against merged weights by hand in float64, against PEFT's own loading, and in training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import save_file
from torch import nn

from agentlightning.errors import UserError
from agentlightning.models.adapters import Adapters, MergedCopy
from agentlightning.models.base import load_base
from agentlightning.types import Batch, LoraShape, SamplingParams
from agentlightning.verl.assembly import Placement, worker_settings
from agentlightning.verl.batching import make_batch, rollout_probs_diff
from agentlightning.verl.config import load_config
from agentlightning.workers.messages import MiniBatch
from agentlightning.workers.worker import Worker

MODEL = "actor_rollout_ref.model"
MERGE = "actor_rollout_ref.rollout.merge_lora"
IDS = torch.randint(0, 250, (3, 17), generator=torch.Generator().manual_seed(0))
VARIANTS = [
    LoraShape(4, 12),
    LoraShape(4, 12, use_rslora=True),
    LoraShape(4, 12, use_dora=True),
    LoraShape(4, 12, use_rslora=True, use_dora=True),
    LoraShape(4, 12, exclude_modules=("o_proj", "down_proj"), use_dora=True),
]
NAMES = ["lora", "rslora", "dora", "rsdora", "excluded"]


def with_random_weights(base, shape: LoraShape) -> Adapters:
    """Away from the start, where the adapter is the base."""
    adapters = Adapters(base, {"actor": shape, "critic": replace(shape, rank=2)}, seed=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameters in adapters.parameters.values():
            for name, parameter in parameters.items():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("lora_magnitude_vector"):
                    parameter.mul_(1 + 0.1 * noise)
                else:
                    parameter.copy_(0.05 * noise)
    adapters.use("actor")
    return adapters


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weight_by_hand(weight: torch.Tensor, of: dict[str, torch.Tensor], shape: LoraShape) -> torch.Tensor:
    """W + s BA (LoRA); m (W + s BA) / ||W + s BA||, row by row (DoRA, equation 5)."""
    scale = shape.alpha / (shape.rank**0.5 if shape.use_rslora else shape.rank)
    merged = weight + scale * of["lora_B.weight"] @ of["lora_A.weight"]
    return of["lora_magnitude_vector"][:, None] * merged / merged.norm(dim=1, keepdim=True) if shape.use_dora else merged


@pytest.mark.parametrize("shape", VARIANTS, ids=NAMES)
def test_adapter_and_merged_copy_are_the_formula(base_model, base_path, shape):
    plain = MergedCopy.plain_copy(base_model)
    base_logits = logits(base_model)
    adapters = with_random_weights(base_model, shape)
    assert adapters.unmergeable("actor") is None
    merged = MergedCopy(plain, adapters, "actor")
    for _ in range(2):  # a second refresh must not add up
        merged.refresh()
    by_hand = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False).double()
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in adapters.parameters["actor"].items():
        module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        modules.setdefault(module, {})[f"lora_{kind}"] = parameter.detach().double()
    for module, of in modules.items():
        layer = by_hand.get_submodule(module)
        layer.weight = nn.Parameter(weight_by_hand(layer.weight.detach(), of, shape))
    expected = logits(by_hand).float()
    with_adapter = logits(adapters.base)
    assert float((with_adapter - base_logits).abs().max()) > 0.1
    assert torch.allclose(with_adapter, expected, atol=2e-4)
    assert torch.allclose(logits(merged.model), expected, atol=2e-4)
    with adapters.model.disable_adapter():
        assert torch.equal(logits(adapters.base), base_logits), "the reference is the base"


@pytest.mark.parametrize("shape", VARIANTS, ids=NAMES)
def test_parameters_have_the_names_that_peft_saves(base_model, shape):
    adapters = with_random_weights(base_model, shape)
    for name, parameters in adapters.parameters.items():
        saved = get_peft_model_state_dict(adapters.model, adapter_name=name, save_embedding_layers=False)
        assert parameters.keys() == saved.keys()
        assert all(torch.equal(parameter, saved[key]) for key, parameter in parameters.items())
        assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
        assert any("lora_magnitude_vector" in key for key in parameters) == shape.use_dora
    adapters.use("critic")
    logits_of_critic = adapters.base(IDS).logits
    logits_of_critic.sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters["critic"].values())
    assert all(parameter.grad is None for parameter in adapters.parameters["actor"].values())


def test_dora_starts_as_the_base_in_bfloat16_too(base_path):
    base = load_base(base_path, "bfloat16", torch.device("cpu"), gradient_checkpointing=False)
    before = logits(base)
    adapters = Adapters(base, {"actor": LoraShape(4, 8, use_dora=True)}, seed=0)
    assert torch.equal(logits(adapters.base), before)


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [
        ("all-linear", ("o_proj",), {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}),
        ("all-linear", r".*mlp.*", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("q_proj", "k_proj"), ("k_proj",), {"q_proj"}),
    ],
)
def test_excluded_modules(base_model, targets, excluded, expected):
    adapters = Adapters(base_model, {"actor": LoraShape(4, 8, targets, excluded)}, seed=0)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapters.parameters["actor"]} == expected


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (LoraShape(4, 8, exclude_modules=("no_such_module",)), "no modules were excluded"),
        (LoraShape(4, 8, ("q_proj",), ("q_proj",)), "exclude_modules"),
    ],
)
def test_exclusions_that_do_nothing_or_leave_nothing_are_refused(base_model, shape, words):
    with pytest.raises(UserError, match=words) as error:
        Adapters(base_model, {"actor": shape}, seed=0)
    assert f"{MODEL}.exclude_modules" in str(error.value)


# ---- in training


def worker(*overrides: str) -> Worker:
    config = load_config([f"{MODEL}.lora_rank=4", f"{MODEL}.lora_alpha=12", "trainer.num_threads=1", *overrides])
    return Worker(worker_settings(config, Placement(1, "cpu", 1), 10))


def rollouts(of: Worker, prompts) -> Batch:
    completions = of.generate(prompts[:2], SamplingParams(n=4, max_tokens=24), 0, 1, of.version)
    made = make_batch(prompts, completions, np.zeros(len(completions)))
    advantage_B = np.where(np.arange(len(made)) % 2, 1.0, -1.0)
    return made.with_columns(advantages=np.where(made.mask_BT, advantage_B[:, None], 0.0).astype(np.float32))


def train(of: Worker, batch: Batch, step: int) -> None:
    from agentlightning.algorithms.aggregation import global_denominators

    rows = np.arange(len(batch))
    mini_batch = MiniBatch(rows, global_denominators(torch.from_numpy(batch.mask_BT), 24.0))
    of.update_actor(batch, [mini_batch], step)
    of.update_weights(step)


@pytest.mark.parametrize("merge", ["true", "false"])
def test_dora_is_sampled_as_it_is_trained_and_its_magnitudes_learn(prompts, merge):
    ours = worker(f"{MODEL}.use_dora=true", f"{MODEL}.use_rslora=true", f"{MERGE}={merge}")
    assert (ours.merged is not None) == (merge == "true")
    magnitudes = {n: p.detach().clone() for n, p in ours.actor.parameters.items() if n.endswith("lora_magnitude_vector")}
    train(ours, rollouts(ours, prompts), 1)
    assert not any(torch.equal(before, ours.actor.parameters[name]) for name, before in magnitudes.items())
    assert {f"exp_avg.{name}" for name in magnitudes} <= ours.actor.optimizer.state().keys()
    batch = rollouts(ours, prompts)
    assert rollout_probs_diff(batch, ours.compute_log_prob(batch).log_probs_BT)["training/rollout_probs_diff_max"] < 1e-4


def test_a_dora_checkpoint_is_peft_s_and_goes_round_bit_for_bit(prompts, base_path, tmp_path):
    overrides = (f"{MODEL}.use_dora=true", f"{MODEL}.use_rslora=true")
    first, second = worker(*overrides), worker(*overrides)
    batch = rollouts(first, prompts)
    train(first, batch, 1)
    state = first.state()
    (tmp_path / "adapter_config.json").write_text(json.dumps(state.actor.config))
    save_file(dict(state.actor.weights), tmp_path / "adapter_model.safetensors")
    base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path))), logits(first.adapters.base))
    second.load_state(state)
    for other in (first, second):
        train(other, batch, 2)
    a, b = first.state().actor, second.state().actor
    assert all(np.array_equal(a.weights[name], b.weights[name]) for name in a.weights)
    assert all(np.array_equal(a.optimizer[name], b.optimizer[name]) for name in a.optimizer)


def test_an_adapter_on_the_embedding_is_decoded_unmerged(prompts):
    targets = f"{MODEL}.target_modules=[embed_tokens,q_proj]"
    ours = worker(targets)
    assert ours.merged is None
    train(ours, rollouts(ours, prompts), 1)
    batch = rollouts(ours, prompts)
    assert rollout_probs_diff(batch, ours.compute_log_prob(batch).log_probs_BT)["training/rollout_probs_diff_max"] < 1e-4
    with pytest.raises(UserError, match=r"embed_tokens cannot be merged.*merge_lora=auto"):
        worker(targets, f"{MERGE}=true")
