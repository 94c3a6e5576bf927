"""Training through the engine against PEFT, torch.optim.AdamW and autograd in float64; and what must not change anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from agentlightning.algorithms.tinker_losses import SERVICE_LOSSES
from agentlightning.errors import NumericsError, UserError
from agentlightning.models.base import load_base
from agentlightning.tinker.engine import EngineSettings, InProcessLoraEngine, open_engine
from agentlightning.tinker.types import AdamParams, Datum, LoraConfig, ModelInput

LENGTHS = (3, 11, 6, 1, 8)
LORA = LoraConfig(rank=4, seed=3)


@pytest.fixture(scope="module")
def engine() -> InProcessLoraEngine:
    return InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1))


@pytest.fixture
def model(engine: InProcessLoraEngine):
    """The id of a model whose B is not zero, so that every weight has a gradient."""
    engine.create_model("s:train:0", LORA)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.models["s:train:0"].parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    yield "s:train:0"
    engine.unload_model("s:train:0")


def rl_data(seed: int = 0) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n).tolist()),
            {
                "target_tokens": rng.integers(0, 256, n),
                "weights": rng.uniform(0, 1, n).astype(np.float32),
                "logprobs": rng.uniform(-15, -5, n).astype(np.float32),
                "advantages": rng.normal(0, 1, n).astype(np.float32),
            },
        )
        for n in LENGTHS
    ]


def gradient(engine: InProcessLoraEngine, model: str) -> np.ndarray:
    return engine.models[model].gradient.numpy().copy()


def peft_in_float64(engine: InProcessLoraEngine, model: str, directory: Path) -> PeftModel:
    engine.save_state(model, directory)
    base = load_base(engine.settings.path, "float32", torch.device("cpu"), gradient_checkpointing=False).double()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        return PeftModel.from_pretrained(base, directory / "actor", is_trainable=True).double()


def reference(peft: PeftModel, data: Sequence[Datum], loss_fn: str) -> tuple[float, list[np.ndarray], dict[str, np.ndarray]]:
    """Loss, log-probabilities and gradients, a datum at a time, in float64."""
    total, logps = torch.zeros((), dtype=torch.float64), []
    spec = SERVICE_LOSSES[loss_fn]
    for datum in data:
        target = datum.loss_fn_inputs["target_tokens"].to_torch()
        log_p = peft(torch.tensor([datum.model_input.to_ints()])).logits[0].log_softmax(-1)
        logp = log_p.gather(-1, target.reshape(len(target), -1)).reshape(target.shape)
        logps.append(logp.detach().numpy())
        columns = {name: value.to_torch().double() for name, value in datum.loss_fn_inputs.items()}
        columns |= {name: torch.full_like(logp, value) for name, value in spec.config.items()}
        columns["sequence_ratio_mask"] = torch.ones_like(logp)
        rows = {name: column[None] for name, column in columns.items()}
        weight = 1.0 if loss_fn == "cross_entropy" else columns["weights"]
        total = total + (spec.positions(logp[None], rows, spec.config)[0] * weight).sum()
    total.backward()
    names = {name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad}
    return float(total.detach()), logps, {name: p.grad.numpy() for name, p in names.items()}


@pytest.mark.parametrize("loss_fn", SERVICE_LOSSES)
def test_losses_log_probabilities_and_gradients_are_peft_s_in_float64(engine, model, tmp_path, loss_fn):
    total, logps, grads = reference(peft_in_float64(engine, model, tmp_path / "a"), rl_data(), loss_fn)
    out = engine.forward_backward(model, rl_data(), loss_fn)
    assert out.metrics["loss:sum"] == pytest.approx(total, rel=2e-5)
    for given, expected in zip(out.loss_fn_outputs, logps, strict=True):
        assert given["logprobs"].dtype == "float32"
        np.testing.assert_allclose(given["logprobs"].to_numpy(), expected, atol=2e-5)
    given_grads = engine.models[model].gradient_tensors()
    assert given_grads.keys() == grads.keys()
    scale = max(np.abs(grad).max() for grad in grads.values())
    for name, grad in grads.items():
        np.testing.assert_allclose(given_grads[name], grad, atol=3e-5 * scale, err_msg=name)


def test_several_targets_a_position(engine, model, tmp_path):
    rng = np.random.default_rng(5)
    data = [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n).tolist()),
            {"target_tokens": rng.integers(0, 256, (n, k)), "weights": rng.uniform(0, 1, (n, k)).astype(np.float32)},
        )
        for n, k in ((4, 3), (2, 1), (5, 2))
    ]
    total, logps, _ = reference(peft_in_float64(engine, model, tmp_path / "a"), data, "cross_entropy")
    out = engine.forward_backward(model, data, "cross_entropy")
    assert out.metrics["loss:sum"] == pytest.approx(total, rel=2e-5)
    for given, expected in zip(out.loss_fn_outputs, logps, strict=True):
        np.testing.assert_allclose(given["logprobs"].to_numpy(), expected, atol=2e-5)


def test_a_custom_loss_is_cross_entropy_with_its_gradient_as_weights(engine, model, tmp_path):
    """C = half the sum of squares of all log-probabilities, by the chain rule as the SDK sends it."""
    peft = peft_in_float64(engine, model, tmp_path / "a")
    forward = engine.forward_backward(model, rl_data(), "cross_entropy", forward_only=True)
    sent, custom = [], torch.zeros((), dtype=torch.float64)
    for datum, out in zip(rl_data(), forward.loss_fn_outputs, strict=True):
        target = datum.loss_fn_inputs["target_tokens"]
        sent.append(Datum(datum.model_input, {"target_tokens": target, "weights": -out["logprobs"].to_numpy()}))
        log_p = peft(torch.tensor([datum.model_input.to_ints()])).logits[0].log_softmax(-1)
        custom = custom + 0.5 * log_p.gather(-1, target.to_torch()[:, None]).square().sum()
    assert not gradient(engine, model).any(), "a forward pass has added a gradient"
    custom.backward()
    engine.forward_backward(model, sent, "cross_entropy")
    grads = {name.replace(".default", ""): p.grad.numpy() for name, p in peft.named_parameters() if p.requires_grad}
    scale = max(np.abs(grad).max() for grad in grads.values())
    for name, given in engine.models[model].gradient_tensors().items():
        np.testing.assert_allclose(given, grads[name], atol=3e-5 * scale, err_msg=name)


@pytest.mark.parametrize("max_tokens", [1, 12, 40])
def test_how_rows_are_cut_changes_nothing_but_rounding(engine, model, max_tokens):
    whole = engine.forward_backward(model, rl_data(), "ppo")
    expected = gradient(engine, model)
    other = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1, max_batch_tokens=max_tokens))
    other.models["m"] = engine.models[model]
    engine.models[model].drop_gradient()
    cut = other.forward_backward("m", rl_data(), "ppo")
    np.testing.assert_allclose(gradient(other, "m"), expected, atol=2e-6 * np.abs(expected).max())
    assert cut.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-5)


def test_gradients_add_up_over_calls(engine, model):
    engine.forward_backward(model, rl_data(), "cispo")
    expected = gradient(engine, model)
    engine.models[model].drop_gradient()
    for datum in rl_data():
        engine.forward_backward(model, [datum], "cispo")
    np.testing.assert_allclose(gradient(engine, model), expected, atol=2e-6 * np.abs(expected).max())


def test_gradient_checkpointing_gives_the_same_bits(engine, model):
    engine.forward_backward(model, rl_data(), "dro")
    other = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1, gradient_checkpointing=True))
    expected = gradient(engine, model)
    other.models["m"] = engine.models[model]
    engine.models[model].drop_gradient()
    other.forward_backward("m", rl_data(), "dro")
    np.testing.assert_array_equal(gradient(other, "m"), expected)


def test_adamw_is_torch_s_with_the_numbers_of_each_call(engine, model):
    parameters = engine.models[model].parameters
    twins = {name: torch.nn.Parameter(p.detach().double()) for name, p in parameters.items()}
    adam = torch.optim.AdamW(twins.values())
    for i, clip in enumerate((0.0, 0.05, 1e9)):
        engine.forward_backward(model, rl_data(i), "cross_entropy")
        norm = np.linalg.norm(gradient(engine, model).astype(np.float64))
        for name, twin in twins.items():
            twin.grad = parameters[name].grad.double() * (min(1.0, clip / norm) if clip else 1.0)
        adam.param_groups[0].update(lr=1e-3 * (i + 1), betas=(0.8, 0.9 + 0.01 * i), eps=1e-9, weight_decay=0.1 * i)
        adam.step()
        given = AdamParams(1e-3 * (i + 1), 0.8, 0.9 + 0.01 * i, 1e-9, 0.1 * i, clip)
        assert engine.optim_step(model, given)["grad_norm:mean"] == pytest.approx(norm, rel=1e-5)
        for name, twin in twins.items():
            np.testing.assert_allclose(parameters[name].detach(), twin.detach(), atol=3e-6)


def test_an_error_leaves_weights_and_gradient_as_they_were(engine, model):
    engine.forward_backward(model, rl_data(), "cross_entropy")
    before = gradient(engine, model)
    half = Datum(ModelInput.from_ints([1]), {"target_tokens": [1], "logprobs": [0.0]})
    with pytest.raises(UserError, match="datum 0, advantages: not given"):
        engine.forward_backward(model, [half, *rl_data()], "ppo")
    overflowing = Datum(ModelInput.from_ints([1]), {"target_tokens": [1], "logprobs": [-1000.0], "advantages": [1.0]})
    narrow = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1, max_batch_tokens=1))
    narrow.models[model] = engine.models[model]
    with pytest.raises(NumericsError, match="datum 5: the loss is -inf"):  # the last micro-batch of several
        narrow.forward_backward(model, [*rl_data(), overflowing], "importance_sampling")
    np.testing.assert_array_equal(gradient(engine, model), before)
    assert engine.models[model].pending == 1


def test_a_gradient_of_nan_changes_nothing_and_is_dropped(engine, model):
    engine.forward_backward(model, rl_data(), "cross_entropy")
    engine.models[model].gradient[5] = torch.nan
    before = engine.models[model].weights()
    with pytest.raises(NumericsError, match="no weight was changed"):
        engine.optim_step(model, AdamParams())
    after = engine.models[model].weights()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="there is no gradient"):
        engine.optim_step(model, AdamParams())


@pytest.mark.parametrize(
    ("adam", "words"),
    [
        (AdamParams(learning_rate=-1.0), "learning_rate: given -1.0"),
        (AdamParams(beta2=1.0), "beta2: given 1.0, expected at least 0 and below 1"),
        (AdamParams(eps=float("nan")), "eps: given nan"),
        (AdamParams(grad_clip_norm=float("inf")), "grad_clip_norm: given inf"),
    ],
)
def test_bad_numbers_for_adam_are_named(engine, model, adam, words):
    with pytest.raises(UserError, match=words):
        engine.optim_step(model, adam)


def test_models_do_not_touch_each_other_and_swapping_changes_no_bit(engine):
    """Three models in turn, with room for one on the device, and each alone."""

    def trained(target: InProcessLoraEngine, ids: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        for model_id in ids:
            target.create_model(model_id, LoraConfig(rank=2 + int(model_id[-1]), seed=int(model_id[-1])))
        for step in range(2):
            for model_id in ids:
                target.forward_backward(model_id, rl_data(step), "cross_entropy")
            for model_id in ids:
                target.optim_step(model_id, AdamParams(learning_rate=1e-2))
        return {model_id: target.models[model_id].weights() for model_id in ids}

    crowded = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1, max_resident_models=1))
    together = trained(crowded, ["a:1", "a:2", "a:3"])
    for model_id in ("a:1", "a:2", "a:3"):
        alone = trained(engine, [model_id])[model_id]
        engine.unload_model(model_id)
        assert all(np.array_equal(alone[name], together[model_id][name]) for name in alone)


def test_the_model_that_was_not_used_for_longest_leaves_the_device(monkeypatch):
    engine = InProcessLoraEngine(EngineSettings("tiny", "cpu", num_threads=1, max_resident_models=2))
    moved: list[tuple[str, str]] = []
    engine.device = torch.device("cpu", 0)  # told apart from the host by name alone
    for name in "abc":
        engine.create_model(name, LORA)
        monkeypatch.setattr(engine.models[name], "to", lambda device, name=name: moved.append((name, str(device))))
    engine.forward_backward("a", rl_data()[:1], "cross_entropy", forward_only=True)
    assert moved == [("a", "cpu"), ("b", "cpu"), ("a", "cpu:0")]


def test_which_layers_are_trained(engine):
    engine.create_model("attn", LoraConfig(rank=2, train_mlp=False, train_unembed=False))
    engine.create_model("head", LoraConfig(rank=2, train_mlp=False, train_attn=False))
    parts = {name.split(".")[-3] for name in engine.models["attn"].parameters}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[-3] for name in engine.models["head"].parameters} == {"lm_head"}
    with pytest.raises(UserError, match="no layer to train"):
        engine.create_model("none", LoraConfig(rank=2, train_attn=False, train_mlp=False, train_unembed=False))


def test_a_new_model_is_the_base_and_its_seed_draws_it(engine):
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        engine.create_model(name, LoraConfig(rank=2, seed=seed))
    one, same, other = (engine.models[name].weights() for name in ("one", "same", "other"))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)
    base = load_base(engine.settings.path, "float32", torch.device("cpu"), gradient_checkpointing=False)
    datum = rl_data()[1]
    with torch.no_grad():
        log_p = base(torch.tensor([datum.model_input.to_ints()])).logits[0].log_softmax(-1)
    expected = log_p.gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0]
    (out,) = engine.forward_backward("one", [datum], "cross_entropy", forward_only=True).loss_fn_outputs
    np.testing.assert_allclose(out["logprobs"].to_numpy(), expected, atol=1e-5)


def test_unknown_and_double_ids_are_errors(engine):
    with pytest.raises(UserError, match="no model 'nobody'"):
        engine.optim_step("nobody", AdamParams())
    engine.create_model("twice", LORA)
    with pytest.raises(UserError, match="'twice' exists already"):
        engine.create_model("twice", LORA)
    with pytest.raises(UserError, match="rank: given 0"):
        engine.create_model("flat", LoraConfig(rank=0))


def test_a_base_in_bfloat16_trains_in_float32_and_loads_what_one_in_float32_saved(engine, model, tmp_path):
    engine.forward_backward(model, rl_data(), "cross_entropy")
    engine.save_state(model, tmp_path / "a")
    half = InProcessLoraEngine(EngineSettings("tiny", "cpu", "bfloat16", num_threads=1))
    half.create_model("m", LORA)
    half.load_state("m", tmp_path / "a", optimizer=True)
    whole, rough = (e.forward_backward(m, rl_data(), "cross_entropy") for e, m in ((engine, model), (half, "m")))
    assert rough.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=0.03)
    half.optim_step("m", AdamParams())
    assert {parameter.dtype for parameter in half.models["m"].parameters.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_model": "/no/such/base"}, "base_model: given '/no/such/base', expected 'tiny', a directory"),
        ({"workers": 2}, "workers: given 2 with backend=inprocess, expected 1; or backend=ray"),
        ({"backend": "rey"}, "backend: given 'rey', expected one of inprocess, ray"),
        ({"device": "gpu"}, "device: given 'gpu'"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: given 0, expected at least 1"),
    ],
)
def test_an_engine_that_cannot_be_says_why(options, words):
    with pytest.raises(UserError, match=words):
        open_engine(**{"base_model": "tiny", "device": "cpu", **options})
