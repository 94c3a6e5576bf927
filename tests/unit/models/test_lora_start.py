"""A run that starts from an adapter: what is taken from it, what is refused, and what a checkpoint lays over it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from agentlightning.errors import CheckpointError, ConfigError, UserError
from agentlightning.models.adapters import Adapters
from agentlightning.models.base import load_base
from agentlightning.types import LoraShape
from agentlightning.verl.assembly import Placement, worker_settings
from agentlightning.verl.config import load_config
from agentlightning.verl.fingerprint import run_fingerprint
from agentlightning.verl.rules import check_paths
from agentlightning.workers.optimizer import load_weights
from agentlightning.workers.worker import Worker

MODEL = "actor_rollout_ref.model"
IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(base_path, tmp_path_factory) -> Path:
    """A DoRA adapter of rank 3 with alpha 6 on two kinds of modules, trained elsewhere with dropout, as PEFT saves it."""
    directory = tmp_path_factory.mktemp("adapter")
    base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], lora_dropout=0.1, use_dora=True)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def change(adapter: Path, **values: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def overrides(adapter: Path, *more: str) -> list[str]:
    return [f"{MODEL}.lora_adapter_path={adapter}", f"{MODEL}.lora_rank=3", f"{MODEL}.lora_alpha=6", *more]


def start(adapter: Path, *more: str) -> Worker:
    config = load_config(overrides(adapter, "trainer.num_threads=1", *more))
    check_paths(config)
    return Worker(worker_settings(config, Placement(1, "cpu", 1), 10))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_the_policy_starts_as_the_adapter_and_the_reference_as_the_base(adapter, base_path):
    ours = start(adapter, "algorithm.adv_estimator=gae", "critic.kind=adapter")
    base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False)
    base_logits = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))
    assert float((expected - base_logits).abs().max()) > 0.1
    assert torch.equal(logits(ours.adapters.base), expected)
    assert ours.merged is not None
    assert torch.allclose(logits(ours.merged.model), expected, atol=2e-4)
    with ours.adapters.model.disable_adapter():
        assert torch.equal(logits(ours.adapters.base), base_logits)
    config = ours.adapter_configs()["actor"]
    assert (config["use_dora"], config["target_modules"], config["lora_dropout"]) == (True, ["o_proj", "q_proj"], 0.0)
    assert ours.adapter_configs()["critic"]["use_dora"] is False, "the critic's is the configuration's"


def test_a_resumed_run_goes_on_from_its_checkpoint(adapter):
    first, second = start(adapter), start(adapter)
    with torch.no_grad():
        for parameter in first.actor.parameters.values():
            parameter.add_(0.01)
    second.load_state(first.state())
    assert torch.equal(logits(second.adapters.base), logits(first.adapters.base))


@pytest.mark.parametrize(
    ("given", "mended"),
    [
        ([f"{MODEL}.lora_rank=8"], f"{MODEL}.lora_rank=3"),
        ([f"{MODEL}.lora_alpha=7"], f"{MODEL}.lora_alpha=6"),
        ([f"{MODEL}.target_modules=[q_proj]"], f"{MODEL}.target_modules=all-linear"),
        ([f"{MODEL}.exclude_modules=[q_proj]"], f"{MODEL}.exclude_modules=null"),
        ([f"{MODEL}.use_rslora=true"], f"{MODEL}.use_rslora=false"),
    ],
)
def test_what_the_configuration_says_otherwise_is_refused_before_anything_loads(adapter, given, mended):
    with pytest.raises(ConfigError) as error:
        check_paths(load_config(overrides(adapter, *given)))
    assert str(error.value).endswith(f"mend it with {mended}")
    check_paths(load_config(overrides(adapter, *given, mended)))


def test_saying_what_the_adapter_is_does_no_harm(adapter):
    check_paths(load_config(overrides(adapter, f"{MODEL}.target_modules=[q_proj,o_proj]", f"{MODEL}.use_dora=true")))


def test_an_adapter_without_what_was_asked_for(adapter):
    change(adapter, use_dora=False)
    with pytest.raises(ConfigError, match=f"mend it with {MODEL}.use_dora=false"):
        check_paths(load_config(overrides(adapter, f"{MODEL}.use_dora=true")))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LOHA"}, "kind 'LOHA'; expected LORA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"r": "x"}, "invalid literal"),
        ({"target_modules": 5}, "not iterable"),
    ],
)
def test_adapters_that_are_not_trained_here(adapter, base_model, values, words):
    change(adapter, **values)
    with pytest.raises(ConfigError, match=words):
        check_paths(load_config(overrides(adapter)))
    with pytest.raises(UserError, match=words):  # and by whoever comes without a configuration
        Adapters(base_model, {"actor": LoraShape(3, 6)}, 0, {"actor": str(adapter)})


def test_broken_directories(adapter):
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=f"mend it with {MODEL}.lora_adapter_path=null"):
        check_paths(load_config(overrides(adapter)))
    with pytest.raises(ConfigError, match="No such file"):
        check_paths(load_config(overrides(adapter / "nothing")))


def test_a_pickle_is_not_opened(adapter, base_model):
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors.*adapter_model\.bin is a pickle"):
        check_paths(load_config(overrides(adapter)))
    with pytest.raises(UserError, match=r"a pickle \(adapter_model\.bin\) is not opened"):
        Adapters(base_model, {"actor": LoraShape(3, 6)}, 0, {"actor": str(adapter)})


@pytest.mark.parametrize("spoil", ["shape", "missing", "extra", "cut"])
def test_weights_that_do_not_fit_are_refused(adapter, base_model, spoil):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if "lora_A" in name)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        if spoil == "shape":
            tensors[name] = torch.zeros(3, 5)
        elif spoil == "missing":
            del tensors[name]
        else:
            tensors["base_model.model.lm_head.weight"] = torch.zeros(2)
        save_file(tensors, file)
    with pytest.raises(UserError, match="cannot be read" if spoil == "cut" else f"does not fit the base: .*{MODEL}.path="):
        Adapters(base_model, {"actor": LoraShape(3, 6)}, 0, {"actor": str(adapter)})


def test_without_a_configuration_rank_and_alpha_are_checked_too(adapter, base_model):
    with pytest.raises(UserError, match=f"mend it with {MODEL}.lora_rank=3 {MODEL}.lora_alpha=6"):
        Adapters(base_model, {"actor": LoraShape(8, 6)}, 0, {"actor": str(adapter)})


def test_the_start_is_part_of_the_run_wherever_it_lies(adapter, tmp_path):
    def breaking(directory: Path | None) -> dict[str, object]:
        config = load_config(overrides(directory) if directory else [f"{MODEL}.lora_rank=3", f"{MODEL}.lora_alpha=6"])
        return run_fingerprint(config, None)["breaking"]

    before = breaking(adapter)
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    assert breaking(moved) == before
    tensors = load_file(moved / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, moved / "adapter_model.safetensors")
    assert breaking(moved) != before
    assert breaking(None).keys() == before.keys() - {f"{MODEL}.lora_adapter_path"}


def test_checkpoints_from_before_the_options_still_fit():
    options = {"exclude_modules", "use_rslora", "use_dora", "lora_adapter_path", "quantization", "override_config"}
    plain = run_fingerprint(load_config([]), None)["breaking"]
    assert not {f"{MODEL}.{name}" for name in options} & plain.keys()
    used = [f"{MODEL}.use_dora=true", f"{MODEL}.use_rslora=true", f"{MODEL}.exclude_modules=[o_proj]"]
    now = run_fingerprint(load_config([*used, f"+{MODEL}.override_config.rope_theta=5.0"]), None)["breaking"]
    assert now.keys() - plain.keys() == {
        f"{MODEL}.{name}" for name in ("use_dora", "use_rslora", "exclude_modules", "override_config")
    }


def test_a_checkpoint_of_another_shape_is_refused_by_name(base_model):
    parameters = Adapters(base_model, {"actor": LoraShape(4, 8, use_dora=True)}, 0).parameters["actor"]
    weights = {name: np.zeros(p.shape) for name, p in parameters.items() if "magnitude" not in name}
    with pytest.raises(CheckpointError, match="lora_magnitude_vector has shape None there"):
        load_weights(parameters, weights, "actor")
