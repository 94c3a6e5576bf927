"""`agl ckpt export`: what comes out computes what was trained, and nothing is written over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentlightning.checkpoint import CheckpointFiles, save
from agentlightning.cli import main
from agentlightning.errors import UserError
from agentlightning.models.adapters import Adapters
from agentlightning.models.base import load_base
from agentlightning.tools.export import export_adapter, export_merged
from agentlightning.types import LoraShape

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def trained(base_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint whose adapter does something, and the logits of the model with it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("run")
    base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False)
    adapters = Adapters(base, {"actor": LoraShape(rank=4, alpha=8, target_modules="all-linear")}, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.parameters["actor"].values():
            parameter.normal_(std=0.1)
        logits = adapters.model(IDS).logits
    weights = {name: parameter.detach().numpy() for name, parameter in adapters.parameters["actor"].items()}
    assert set(weights) == set(get_peft_model_state_dict(adapters.model, adapter_name="actor"))
    files = CheckpointFiles(
        {"actor/adapter_model.safetensors": weights}, {"actor/adapter_config.json": adapters.config_json("actor")}
    )
    return save(root, "global_step_3", 3, files).path, logits


def logits_of(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


def test_the_adapter_is_copied_and_loads(trained: tuple[Path, torch.Tensor], base_path: str, tmp_path: Path) -> None:
    checkpoint, logits = trained
    exported = export_adapter(checkpoint, tmp_path / "new" / "adapter")
    assert exported.base == base_path
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "new" / "adapter" / name).read_bytes() == (checkpoint / "actor" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "new")) == ["adapter"]
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "new" / "adapter")(IDS).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


def test_the_merged_model_computes_what_the_adapter_does(
    trained: tuple[Path, torch.Tensor], base_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, logits = trained
    out = tmp_path / "merged"
    assert main(["ckpt", "export", str(checkpoint.parent), str(out), "--merged", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == base_path
    torch.testing.assert_close(logits_of(out), logits, atol=1e-5, rtol=0)
    assert (logits_of(Path(base_path)) - logits).abs().max() > 0.1
    tokenizer, own = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base_path)
    assert tokenizer("12+34=").input_ids == own("12+34=").input_ids
    assert tokenizer.chat_template == own.chat_template
    export_merged(checkpoint, tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_nothing_is_written_over(
    trained: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in ("empty", "link"):
        assert main(["ckpt", "export", str(trained[0]), str(tmp_path / out)]) == 2
        assert "exists and is not written over" in capsys.readouterr().err
    assert main(["ckpt", "export", str(trained[0]), str(tmp_path / "new"), "--base", "x"]) == 2
    assert "--merged" in capsys.readouterr().err


def test_a_base_must_be_named_exist_and_fit(trained: tuple[Path, torch.Tensor], base_path: str, tmp_path: Path) -> None:
    checkpoint, _ = trained
    other = tmp_path / "other"
    config = AutoModelForCausalLM.from_pretrained(base_path).config
    config.num_hidden_layers, config.layer_types = 2, ["full_attention"] * 2
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    AutoTokenizer.from_pretrained(base_path).save_pretrained(other)
    for base, words in ((str(other), "does not fit the base"), (str(tmp_path / "nowhere"), "expected --base PATH")):
        with pytest.raises(UserError, match=words):
            export_merged(checkpoint, tmp_path / "out", base)
    files = CheckpointFiles(
        {"actor/adapter_model.safetensors": {}}, {"actor/adapter_config.json": {"base_model_name_or_path": None}}
    )
    nameless = save(tmp_path / "run", "global_step_1", 1, files).path
    with pytest.raises(UserError, match="names no base model; expected --base PATH"):
        export_merged(nameless, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["other", "run"]  # what failed leaves nothing


def test_only_verified_bytes_leave(tmp_path: Path, trained: tuple[Path, torch.Tensor]) -> None:
    files = CheckpointFiles({"actor/adapter_model.safetensors": {}}, {"actor/adapter_config.json": {}})
    checkpoint = save(tmp_path, "global_step_1", 1, files).path
    (checkpoint / "actor" / "adapter_config.json").write_text("[]\n")
    with pytest.raises(UserError, match=r"cannot be exported: actor/adapter_config\.json"):
        export_adapter(checkpoint, tmp_path / "out")
    bare = save(tmp_path, "global_step_2", 2, CheckpointFiles({}, {"trainer_state.json": 1})).path
    with pytest.raises(UserError, match=r"holds no actor/adapter_config\.json"):
        export_adapter(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
