"""Options of the frozen base: its own configuration overridden, four bits, code and tokenizer of somebody else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from agentlightning.errors import ConfigError, UserError
from agentlightning.models.base import check_quantization, load_base, load_model_config, quantization_config
from agentlightning.models.chat import check_vocabulary, load_tokenizer
from agentlightning.verl.assembly import Placement, worker_settings
from agentlightning.verl.config import load_config
from agentlightning.workers.worker import Worker

MODEL = "actor_rollout_ref.model"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(path: str, **override_config: object):
    return load_base(path, "float32", CPU, gradient_checkpointing=False, override_config=override_config)


# ---- override_config


@pytest.mark.parametrize("override", [{"rope_theta": 50.0}, {"rope_parameters": {"rope_theta": 50.0}}])
def test_an_overridden_value_is_the_models(base_path, base_model, override):
    config = AutoConfig.from_pretrained(base_path)
    config.rope_parameters["rope_theta"] = 50.0
    expected = logits(AutoModelForCausalLM.from_pretrained(base_path, config=config, dtype=torch.float32))
    ours = load(base_path, **override)
    assert ours.config.rope_parameters == {"rope_theta": 50.0, "rope_type": "default"}
    assert torch.equal(logits(ours), expected)
    assert not torch.allclose(logits(base_model), expected, atol=1e-2)


def test_lists_of_the_command_line_arrive_as_lists(base_path):
    config = load_config([f"+{MODEL}.override_config.layer_types=[full_attention,full_attention,full_attention]"])
    settings = worker_settings(config, Placement(1, "cpu", 1), 1)
    assert load_model_config(base_path, False, settings.override_config).layer_types == ["full_attention"] * 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"rope_thetta": 1.0}, f"did you mean rope_theta.*{MODEL}.override_config.rope_theta=1.0"),
        ({"hidden_sise": 1}, "did you mean hidden_size"),
        ({"dtype": "float32"}, f"{MODEL}.dtype=float32 instead"),
        ({"vocab_size": "many"}, "expected int, got str"),
        ({"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}, r"layers\.3.* is not in the files.*override_config"),
        ({"hidden_size": 64}, "not those of its configuration.*override_config"),
        ({"rope_parameters": {"rope_type": "no_such_type"}}, "no_such_type.*override_config"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 4}, "full attention only"),
    ],
)
def test_overrides_that_do_not_fit_name_the_key(base_path, override, words):
    with pytest.raises(UserError, match=words):
        load(base_path, **override)


def test_files_without_a_weight_are_refused(base_path, tmp_path):
    from safetensors.torch import load_file, save_file

    spoiled = Path(shutil.copytree(base_path, tmp_path / "base"))
    [file] = spoiled.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight is not in the files; expected files that are whole"):
        load(str(spoiled))


# ---- four bits


def test_four_bits_are_qloras():
    config = quantization_config("4bit", torch.bfloat16)
    assert config is not None
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config(None, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("device", "installed", "words"),
    [
        (CPU, True, f"4bit on cpu, expected a GPU; mend it with {MODEL}.quantization=null"),
        (GPU, False, r"without bitsandbytes; mend it with pip install 'agentlightning\[quantization\]'"),
    ],
)
def test_four_bits_where_they_cannot_be(device, installed, words):
    with pytest.raises(UserError, match=words):
        check_quantization("4bit", device, installed)
    check_quantization(None, device, installed)


def test_four_bits_on_a_gpu_with_the_library_pass():
    check_quantization("4bit", GPU, installed=True)


def test_four_bits_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=f"{MODEL}.quantization=null"):
        load_base(str(tmp_path / "nothing"), "auto", CPU, gradient_checkpointing=False, quantization="4bit")


@pytest.mark.parametrize(
    ("overrides", "mended"),
    [
        (["trainer.device=cpu"], f"{MODEL}.quantization=null"),
        (["actor_rollout_ref.rollout.merge_lora=true"], "actor_rollout_ref.rollout.merge_lora=auto"),
    ],
)
def test_four_bits_and_what_does_not_go_with_them(overrides, mended):
    with pytest.raises(ConfigError, match=f"mend it with {mended}"):
        load_config([f"{MODEL}.quantization=4bit", *overrides])
    load_config([f"{MODEL}.quantization=4bit", *overrides, mended])


def test_four_bits_without_a_gpu_are_refused_as_soon_as_that_is_known():
    config = load_config([f"{MODEL}.quantization=4bit"])
    with pytest.raises(ConfigError, match=f"no GPU, expected one; mend it with {MODEL}.quantization=null"):
        worker_settings(config, Placement(1, "cpu", 1), 1)
    assert worker_settings(config, Placement(1, "cuda", 1), 1).quantization == "4bit"


# ---- code and tokenizer


def test_code_that_comes_with_a_model_runs_only_when_it_is_trusted(base_path, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = Path(shutil.copytree(base_path, tmp_path / "base"))
    config = json.loads((theirs / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "theirs.py").write_text(
        f"from transformers import Qwen3Config\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Theirs(Qwen3Config):\n    model_type = 'theirs'\n"
    )
    with pytest.raises(UserError, match=f"not run unasked.*{MODEL}.trust_remote_code=true"):
        load_model_config(str(theirs), False, {})
    assert not (tmp_path / "ran").exists()
    assert load_model_config(str(theirs), True, {"rope_theta": 7.0}).rope_parameters["rope_theta"] == 7.0
    assert (tmp_path / "ran").exists()


def test_the_tokenizer_may_lie_elsewhere(base_path, tmp_path):
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    for file in [*Path(base_path).glob("*token*"), *Path(base_path).glob("chat_template*")]:
        shutil.copy(file, elsewhere)
    (elsewhere / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    config = load_config([f"{MODEL}.tokenizer_path={elsewhere}", "trainer.num_threads=1"])
    worker = Worker(worker_settings(config, Placement(1, "cpu", 1), 1))
    renderer = worker.engine.renderer  # pyright: ignore[reportAttributeAccessIssue] - the one there is
    assert renderer.text(renderer.prompt_ids([{"role": "user", "content": "2+2"}])) == "2+2!"


def test_a_tokenizer_that_is_not_there_or_is_another_models(base_path, tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer at .*{MODEL}.tokenizer_path="):
        load_tokenizer(str(tmp_path / "nothing"))
    tokenizer = load_tokenizer(base_path)
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(UserError, match=rf"has {len(tokenizer)} tokens and the model {len(tokenizer) - 1} embeddings"):
        check_vocabulary(tokenizer, len(tokenizer) - 1)
