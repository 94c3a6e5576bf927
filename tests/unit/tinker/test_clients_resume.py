"""A loop through the clients on the embedded base: never stopped equals resumed to the last bit; without the optimizer not."""

from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file

from agentlightning import checkpoint_utils
from agentlightning.models.base import load_base
from agentlightning.tinker import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient

ADAM = AdamParams(learning_rate=3e-3)
BATCHES = 4


@pytest.fixture
def new_service(tmp_path):
    """Each has an engine of its own, as each start of a program has."""
    made = []

    def make():
        made.append(ServiceClient(backend="inprocess", root=tmp_path / "saves", num_threads=1))
        return made[-1]

    yield make
    for service in made:
        service.close().result()


def train(client, prompts, start: int, end: int) -> list[list[int]]:
    """Batches `start` to `end`: samples without seeds, made-up advantages. Returns the samples."""
    drawn = []
    for batch in range(start, end):
        sampler = client.save_weights_and_get_sampling_client()
        chosen = [ModelInput.from_ints(prompt.token_ids) for prompt in prompts[batch % 2 : batch % 2 + 2]]
        futures = [sampler.sample(prompt, 3, SamplingParams(max_tokens=8)) for prompt in chosen]
        data = []
        for prompt, future in zip(chosen, futures, strict=True):
            for number, sample in enumerate(future.result().sequences):
                drawn.append(sample.tokens)
                ids, before = prompt.to_ints() + sample.tokens, [0.0] * (prompt.length - 1)
                advantages = before + [number - 1.0] * len(sample.tokens)
                inputs = {"target_tokens": ids[1:], "logprobs": before + sample.logprobs, "advantages": advantages}
                data.append(Datum(ModelInput.from_ints(ids[:-1]), inputs))
        client.forward_backward(data, "importance_sampling")
        client.optim_step(ADAM)
    return drawn


def files(path: str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*.safetensors")}


def test_never_stopped_equals_resumed_and_neither_a_start_without_the_optimizer(new_service, prompts, tmp_path):
    client = new_service().create_lora_training_client("tiny", rank=4, seed=1)
    drawn = train(client, prompts, 0, 2)
    checkpoint_utils.save_checkpoint(client, "000002", tmp_path / "log", {"batch": 2}, kind="both")
    rest = train(client, prompts, 2, BATCHES)
    whole = files(client.save_state("final").result().path)

    record = checkpoint_utils.get_last_checkpoint(tmp_path / "log")
    assert record is not None
    resumed = new_service().create_lora_training_client("tiny", rank=4, seed=7)  # the state decides, not its own seed
    resumed.load_state(record.state_path)
    assert train(resumed, prompts, record.batch, BATCHES) == rest
    assert files(resumed.save_state("final").result().path) == whole
    assert len({tuple(tokens) for tokens in (*drawn, *rest)}) > len(rest)  # they are not all alike

    created = new_service().create_training_client_from_state_with_optimizer(record.state_path)
    train(created, prompts, record.batch, BATCHES)
    assert files(created.save_state("final").result().path) == whole

    cold = new_service().create_lora_training_client("tiny", rank=4)
    cold.load_state(record.state_path, optimizer=False)
    train(cold, prompts, record.batch, BATCHES)
    assert files(cold.save_state("final").result().path) != whole


def test_saved_weights_sample_as_the_model_does_and_peft_loads_them(new_service, prompts):
    service = new_service()
    client = service.create_lora_training_client("tiny", rank=4, train_unembed=False)
    train(client, prompts, 0, 1)
    path = client.save_weights_for_sampler("a").result().path
    assert path is not None
    prompt = ModelInput.from_ints(prompts[0].token_ids)
    clients = [
        client.save_weights_and_get_sampling_client(),
        client.create_sampling_client(path),
        service.create_sampling_client(model_path=path),
        service.create_sampling_client(base_model="tiny"),
    ]
    logprobs = [sampler.compute_logprobs(prompt).result() for sampler in clients]
    assert logprobs[0] == logprobs[1] == logprobs[2] != logprobs[3]

    import torch

    ids = torch.tensor([prompt.to_ints()])
    for given, adapter in ((logprobs[0], f"{path}/actor"), (logprobs[3], None)):
        model = load_base(client.get_info().model_data.tokenizer_id, "float32", torch.device("cpu"), False)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            expected = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(np.array(given[1:]), expected.numpy(), atol=2e-5)


def test_a_custom_loss_trains_as_the_built_in_one(new_service, prompts):
    ids = list(prompts[0].token_ids)
    weights = np.linspace(-1, 1, len(ids) - 1)
    built_in = Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], "weights": weights})
    plain = Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})
    service = new_service()
    saved = []
    for custom in (False, True):
        client = service.create_lora_training_client("tiny", rank=4, seed=1)
        for _ in range(3):
            if custom:
                client.forward_backward_custom(
                    [plain], lambda data, logps: (-(logps[0] * logps[0].new_tensor(weights)).sum(), {})
                )
            else:
                client.forward_backward([built_in], "cross_entropy")
            client.optim_step(ADAM)
        saved.append(load_file(f"{client.save_state('end').result().path}/actor/adapter_model.safetensors"))
    assert all(np.array_equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_the_words_of_a_loop_run_as_they_are_written(tmp_path, monkeypatch, prompts):
    """The README's snippet."""
    import asyncio

    monkeypatch.chdir(tmp_path)

    async def loop(num_batches):
        resume_info = checkpoint_utils.get_last_checkpoint("log")
        start_batch = resume_info["batch"] if resume_info else 0
        load_state_path = resume_info["state_path"] if resume_info else None
        async with ServiceClient(backend="inprocess") as service:
            training_client = await service.create_lora_training_client_async(base_model="tiny", rank=8)
            if load_state_path:
                future = await training_client.load_state_async(load_state_path)
                await future.result_async()
            await checkpoint_utils.save_checkpoint_async(
                training_client=training_client, name="final", log_path="log", kind="both", loop_state={"batch": num_batches}
            )
        return start_batch

    assert [asyncio.run(loop(batches)) for batches in (3, 5, 5)] == [0, 3, 5]
    assert len(list((tmp_path / "checkpoints" / "tinker").iterdir())) == 3
