"""Log-probabilities, adapters and the merged copy, against plain float64 passes."""

import numpy as np
import pytest
import torch

from agentlightning.errors import UserError
from agentlightning.models import logprobs
from agentlightning.models.adapters import Adapters, MergedCopy
from agentlightning.models.base import load_base
from agentlightning.models.chat import load_tokenizer
from agentlightning.models.logprobs import TokenRows, hidden_states, log_probs
from agentlightning.types import Batch, LoraShape


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


@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "chunked"])
def test_log_probs_and_entropy(base_model, monkeypatch, chunk):
    if chunk:
        monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk * 264)
    batch = random_batch(np.random.default_rng(0))
    tokens = TokenRows.from_batch(batch, base_model.device)
    logp, entropy = log_probs(base_model.lm_head, hidden_states(base_model, tokens), tokens.target_N, 0.7)
    expected_logp, expected_entropy = reference(base_model, batch, 0.7)
    assert logp.detach().numpy() == pytest.approx(expected_logp[batch.mask_BT], abs=2e-4)
    assert entropy.detach().numpy() == pytest.approx(expected_entropy[batch.mask_BT], abs=2e-4)


def test_chunks_give_the_same_gradient(base_model, monkeypatch):
    batch = random_batch(np.random.default_rng(1))
    tokens = TokenRows.from_batch(batch, base_model.device)
    gradients = []
    for elements in (1 << 25, 5 * 264):
        monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", elements)
        hidden = hidden_states(base_model, tokens).detach().requires_grad_()
        logp, entropy = log_probs(base_model.lm_head, hidden, tokens.target_N, 1.0, entropy_grad=True)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        gradients.append(hidden.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_padding_rows_changes_nothing(base_model):
    batch = random_batch(np.random.default_rng(2))
    tokens = TokenRows.from_batch(batch, base_model.device)
    together, _ = log_probs(base_model.lm_head, hidden_states(base_model, tokens), tokens.target_N, 1.0)
    alone = []
    for row in range(len(batch)):
        one = TokenRows.from_batch(batch.rows([row]), base_model.device)
        alone.append(log_probs(base_model.lm_head, hidden_states(base_model, one), one.target_N, 1.0)[0])
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def adapters_with_random_weights(base, names=("actor", "critic")) -> Adapters:
    adapters = Adapters(base, {name: LoraShape(4, 8) for name in names}, seed=3)
    with torch.no_grad():
        for parameters in adapters.parameters.values():
            for parameter in parameters.values():
                parameter.normal_(std=0.05)
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
