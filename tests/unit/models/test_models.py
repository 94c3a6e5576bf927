"""Log-probabilities, adapters and the merged copy, against plain float64 passes."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch

from agentlightning.errors import UserError
from agentlightning.models import logprobs
from agentlightning.models.adapters import Adapters, MergedCopy
from agentlightning.models.base import load_base
from agentlightning.models.chat import load_tokenizer
from agentlightning.models.logprobs import log_probs
from agentlightning.models.passes import micro_batches, training_passes
from agentlightning.types import Batch, LoraShape, MicroBatches


def random_batch(rng: np.random.Generator, rows: int = 5) -> Batch:
    prompt_len = rng.integers(2, 9, rows).astype(np.int32)
    response_len = rng.integers(1, 12, rows).astype(np.int32)
    mask = np.arange(response_len.max()) < response_len[:, None]
    mask &= rng.random(mask.shape) < 0.7  # observations
    mask[:, 0] = True
    return Batch(
        uids=tuple(f"p{i}" for i in range(rows)),
        prompt_BP=rng.integers(0, 250, (rows, prompt_len.max())).astype(np.int32),
        prompt_len_B=prompt_len,
        response_BT=rng.integers(0, 250, (rows, response_len.max())).astype(np.int32),
        response_len_B=response_len,
        mask_BT=mask,
        adapter_version=0,
    )


def reference(model, batch: Batch, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies [B, T] of one row at a time, float64."""
    logp, entropy = np.zeros(batch.mask_BT.shape), np.zeros(batch.mask_BT.shape)
    model = model.double()
    for row in range(len(batch)):
        prompt = batch.prompt_BP[row, : batch.prompt_len_B[row]].tolist()
        response = batch.response_BT[row, : batch.response_len_B[row]].tolist()
        logits = model(torch.tensor([prompt + response])).logits[0] / temperature
        probabilities = logits.softmax(-1)
        for t in np.flatnonzero(batch.mask_BT[row]):
            p = probabilities[len(prompt) + t - 1]
            logp[row, t], entropy[row, t] = float(p[response[t]].log()), -float((p * p.log()).sum())
    model.float()
    return logp, entropy


def grouped_batch(rng: np.random.Generator, prompts: int = 4, samples: int = 3) -> Batch:
    """Several samples of each prompt, of different lengths."""
    one = random_batch(rng, prompts * samples)
    first = np.repeat(np.arange(prompts) * samples, samples)
    return Batch(
        uids=tuple(f"p{i}" for i in first),
        prompt_BP=one.prompt_BP[first],
        prompt_len_B=one.prompt_len_B[first],
        response_BT=one.response_BT,
        response_len_B=one.response_len_B,
        mask_BT=one.mask_BT,
        adapter_version=0,
    )


def log_probs_BT(model, batch: Batch, sizes: MicroBatches, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    logp, entropy = np.zeros(batch.mask_BT.shape), np.zeros(batch.mask_BT.shape)
    for run in training_passes(model, batch, np.arange(len(batch)), sizes):
        logp_N, entropy_N = log_probs(model.lm_head, run.hidden_NH, run.target_N, temperature)
        width = run.micro.mask_BT.shape[1]
        logp[run.rows, :width] = run.scatter(logp_N).detach().numpy()
        entropy[run.rows, :width] = run.scatter(entropy_N).detach().numpy()
    return logp, entropy


SIZES = [MicroBatches(100), MicroBatches(2), MicroBatches(1, max_tokens=25)]


@pytest.mark.parametrize("sizes", SIZES, ids=["whole", "rows", "tokens"])
@pytest.mark.parametrize("chunk", [None, 7], ids=["", "chunked"])
@pytest.mark.parametrize("training", [False, True], ids=["shared-prompts", "whole-rows"])
def test_log_probs_and_entropy(base_model, monkeypatch, chunk, sizes, training):
    if chunk:
        monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk * 264)
    base_model.train(training)  # training mode means gradient checkpointing, which runs whole rows
    batch = grouped_batch(np.random.default_rng(0))
    logp, entropy = log_probs_BT(base_model, batch, sizes, 0.7)
    expected_logp, expected_entropy = reference(base_model, batch, 0.7)
    assert logp == pytest.approx(expected_logp, abs=2e-4)
    assert entropy == pytest.approx(expected_entropy, abs=2e-4)


def test_chunks_give_the_same_gradient(base_model, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(23, 96, generator=generator), torch.randint(0, 264, (23,), generator=generator)
    gradients = []
    for elements in (1 << 25, 5 * 264):
        monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", elements)
        hidden = start.clone().requires_grad_()
        logp, entropy = log_probs(base_model.lm_head, hidden, target, 1.0, entropy_grad=True)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        gradients.append(hidden.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=["whole", "rows", "tokens"])
def test_gradients_through_shared_prompts_equal_those_of_one_row_at_a_time(base_model, sizes):
    adapters = adapters_with_random_weights(base_model, ("actor",))
    batch = grouped_batch(np.random.default_rng(3))
    weight_BT = np.random.default_rng(4).normal(size=batch.mask_BT.shape)
    parameters = adapters.parameters["actor"]

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
        return found

    for run in training_passes(adapters.base, batch, np.arange(len(batch)), sizes):
        logp_N, _ = log_probs(adapters.base.lm_head, run.hidden_NH, run.target_N, 1.0)
        (
            logp_N * torch.tensor(weight_BT[run.rows][:, : run.micro.mask_BT.shape[1]][run.micro.mask_BT]).float()
        ).sum().backward()
    ours = gradients()
    for row in range(len(batch)):
        prompt = batch.prompt_BP[row, : batch.prompt_len_B[row]].tolist()
        response = batch.response_BT[row, : batch.response_len_B[row]].tolist()
        log_p = adapters.base(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        steps = np.flatnonzero(batch.mask_BT[row])
        sum(log_p[len(prompt) + t - 1, response[t]] * weight_BT[row, t] for t in steps).backward()
    expected = gradients()
    assert ours.keys() == expected.keys() == parameters.keys()
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm() / gradient.norm()) < 1e-4, name


def test_gradient_checkpointing_gives_the_same_gradients(base_path):
    batch, found = grouped_batch(np.random.default_rng(5)), []
    for checkpointing in (False, True):
        base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=checkpointing)
        adapters = adapters_with_random_weights(base, ("actor",))
        adapters.use("actor", training=True)
        assert adapters.base.training == checkpointing
        for run in training_passes(adapters.base, batch, np.arange(len(batch)), MicroBatches(5)):
            log_probs(adapters.base.lm_head, run.hidden_NH, run.target_N, 1.0)[0].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in adapters.parameters["actor"].values()]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-4


def test_micro_batches_take_each_place_once_and_keep_to_their_size():
    lengths = np.array([5, 1, 9, 3, 9, 2])
    for sizes in (MicroBatches(2), MicroBatches(1, 10), MicroBatches(1, 4), MicroBatches(1, 30)):
        parts = micro_batches(lengths, sizes)
        assert sorted(np.concatenate(parts)) == list(range(6))
        padded = [len(part) * lengths[part].max() for part in parts]
        assert padded[0] == max(padded)
        for part in parts:
            if sizes.max_tokens is None:
                assert len(part) <= sizes.max_rows
            else:
                assert len(part) == 1 or len(part) * lengths[part].max() <= sizes.max_tokens
    assert micro_batches(lengths[:0], MicroBatches(2)) == micro_batches(lengths[:0], MicroBatches(1, 10)) == []


def test_micro_batches_cost_the_least_of_all_ways_to_cut_the_sorted_rows():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(0, 25, 9)
        for max_tokens, pass_share in ((30, 8), (60, 4), (60, 1)):
            parts = micro_batches(lengths, MicroBatches(1, max_tokens), pass_share)
            assert cost_of(parts, lengths, max_tokens, pass_share) == min(
                cost_of(cut, lengths, max_tokens, pass_share) for cut in ways_to_cut(lengths)
            )


def ways_to_cut(lengths: np.ndarray) -> Iterator[list[np.ndarray]]:
    order = np.argsort(-lengths, kind="stable")
    for chosen in product((False, True), repeat=len(order) - 1):
        yield np.split(order, [place for place, cut in enumerate(chosen, 1) if cut])


def cost_of(parts: list[np.ndarray], lengths: np.ndarray, max_tokens: int, pass_share: int) -> float:
    padded = [len(part) * max(1, lengths[part].max()) for part in parts]
    if any(tokens > max_tokens and len(part) > 1 for tokens, part in zip(padded, parts, strict=True)):
        return float("inf")
    return sum(padded) + len(parts) * (max_tokens // pass_share)


def adapters_with_random_weights(base, names=("actor", "critic")) -> Adapters:
    adapters = Adapters(base, {name: LoraShape(4, 8) for name in names}, seed=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameters in adapters.parameters.values():
            for parameter in parameters.values():
                parameter.normal_(std=0.05, generator=generator)
    return adapters


def test_the_merged_copy_gives_the_adapters_logits_and_leaves_the_base_alone(base_model):
    before = {name: p.clone() for name, p in base_model.named_parameters()}
    plain = MergedCopy.plain_copy(base_model)
    adapters = adapters_with_random_weights(base_model)
    merged = MergedCopy(plain, adapters, "actor")
    ids = torch.randint(0, 250, (3, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # a second refresh must not add up
        merged.refresh()
    adapters.use("actor")
    with torch.no_grad():
        with_adapter, in_merged = adapters.base(ids).logits, merged.model(ids).logits
        with adapters.model.disable_adapter():
            base_logits = adapters.base(ids).logits
    assert float((with_adapter - base_logits).abs().max()) > 0.1
    assert torch.allclose(with_adapter, in_merged, atol=2e-4)
    after = {name.replace(".base_layer", ""): p for name, p in adapters.base.named_parameters() if "lora_" not in name}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_are_apart_and_take_gradients_one_at_a_time(base_model):
    adapters = adapters_with_random_weights(base_model)
    assert adapters.parameters["actor"].keys() == adapters.parameters["critic"].keys()
    ids = torch.tensor([[1, 2, 3]])
    for name, other in (("actor", "critic"), ("critic", "actor")):
        adapters.use(name)
        assert all(p.requires_grad for p in adapters.parameters[name].values())
        assert not any(p.requires_grad for p in adapters.parameters[other].values())
        adapters.base(ids).logits.sum().backward()
        assert all(p.grad is not None for p in adapters.parameters[name].values())
        for parameter in adapters.parameters[name].values():
            parameter.grad = None
        assert all(p.grad is None for p in adapters.parameters[other].values())


def test_the_seed_decides_the_start(base_path):
    def start(seed: int) -> list[torch.Tensor]:
        base = load_base(base_path, "float32", torch.device("cpu"), gradient_checkpointing=False)
        return list(Adapters(base, {"actor": LoraShape(4, 8)}, seed).parameters["actor"].values())

    torch.manual_seed(99)  # the global state must not matter
    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_wrong_paths_and_targets_name_the_override(tmp_path, base_path):
    for load in (load_tokenizer, lambda path: load_base(path, "auto", torch.device("cpu"), gradient_checkpointing=False)):
        with pytest.raises(UserError, match=r"actor_rollout_ref\.model\.path="):
            load(str(tmp_path / "nothing"))
    base = load_base(base_path, "auto", torch.device("cpu"), gradient_checkpointing=False)
    with pytest.raises(UserError, match="target_modules"):
        Adapters(base, {"actor": LoraShape(4, 8, ("no_such_module",))}, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_gradient_is_the_same_every_time(base_path):
    """A bfloat16 base under float32 adapters, by the path that the CPU takes."""
    gradients, batch = [], grouped_batch(np.random.default_rng(0))
    for _ in range(3):
        base = load_base(base_path, "auto", torch.device("cuda"), gradient_checkpointing=False)
        assert base.dtype == torch.bfloat16
        adapters = Adapters(base, {"actor": LoraShape(4, 8)}, 0)
        adapters.use("actor", training=True)
        for run in training_passes(adapters.base, batch, np.arange(len(batch)), MicroBatches(5)):
            run.hidden_NH.float().square().sum().backward()
        parameters = adapters.parameters["actor"].values()
        assert all(parameter.dtype == torch.float32 for parameter in parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).cpu())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
