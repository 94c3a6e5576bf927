"""What the service promises to a loop: order, futures, errors that are shown at once, one key beside another."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from serving import KEY, OTHER, Client, forward_backward, output, serving

from agentlightning.errors import NumericsError
from agentlightning.tinker.server.wire import MESSAGES


def run(root: Path, test, **options) -> None:
    async def main() -> None:
        async with serving(root, **options) as client:
            await test(client)

    asyncio.run(main())


def test_a_training_loop(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        assert client.model == f"{client.session}:train:0"
        info = await client.post("get_info", {"model_id": client.model})
        assert info["model_data"] == {"arch": "toy", "model_name": "tiny", "tokenizer_id": "/tokenizer"}
        trained, stepped = await client.step([1, 2, 3])
        record = output(trained).loss_fn_outputs[0]
        logp = np.frombuffer(record.fields["logprobs"].data, "<f4")
        weights_V = np.random.default_rng(0).normal(size=64) / 4
        assert logp.tolist() == (-np.abs(weights_V[[1, 2, 3]])).astype(np.float32).tolist()
        assert stepped["metrics"]["grad_norm:mean"] == pytest.approx(3**0.5)
        assert (await client.save("first"))["path"] == f"tinker://{client.model}/weights/first"

    run(tmp_path, test)


def test_chunks_run_by_their_numbers_whatever_order_they_come_in(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        futures = {seq: await client.post("forward_backward", forward_backward(client.model, seq, [seq])) for seq in (2, 3)}
        waiting = await client.service.retrieve(client.service.keys.owner(KEY) or "", futures[2]["request_id"], timeout=0.05)
        assert b"waits for request 1" in waiting.body
        assert b"try_again" in waiting.body
        futures[1] = await client.post("forward_backward", forward_backward(client.model, 1, [1]))
        for future in futures.values():
            await client.result(future)
        operations = client.service.registry.operations_of(client.model)
        assert [op.seq for op in sorted(operations, key=lambda op: op.finished_at)] == [0, 1, 2, 3]

    run(tmp_path, test)


def test_a_submit_that_is_sent_again_is_the_same_operation(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        body = forward_backward(client.model, 1, [5])
        first, again = await asyncio.gather(client.post("forward_backward", body), client.post("forward_backward", body))
        assert first == again
        await client.result(first)
        assert await client.post("forward_backward", body) == first
        assert client.engine.calls.count(("forward_backward", client.model)) == 1
        other = await client.post("forward_backward", forward_backward(client.model, 1, [6]), 400)
        assert "two clients must not use one model" in other["detail"]

    run(tmp_path, test)


def test_a_snapshot_that_is_asked_for_again_keeps_its_first_number(tmp_path: Path):
    """The SDK counts its sampling sessions at every attempt."""

    async def test(client: Client):
        await client.open()
        body = client.numbered(sampling_session_seq_id=0)
        first = await client.post("save_weights_for_sampler", body)
        assert await client.post("save_weights_for_sampler", {**body, "sampling_session_seq_id": 1}) == first
        assert (await client.result(first))["sampling_session_id"] == f"{client.session}:sample:0"

    run(tmp_path, test)


WRONG = [
    ("save_weights", {"path": "../up"}, "one segment"),
    ("save_weights", {"path": "/etc/passwd"}, "one segment"),
    ("save_weights", {"path": "a/b"}, "one segment"),
    ("save_weights", {"path": ".hidden"}, "one segment"),
    ("save_weights", {}, "one segment"),
    ("save_weights", {"path": "x", "ttl_seconds": 5}, "ttl_seconds"),
    ("optim_step", {"adam_params": {"learning_rate": "fast"}}, "learning_rate"),
    ("optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 1}}, "adam_params"),
    ("load_weights", {"path": "tinker://x/weights/y", "optimizer": True}, "no checkpoint"),
    ("load_weights", {"path": "tinker://x/sampler_weights/y", "optimizer": True}, "no training can go on"),
    ("load_weights", {"path": "file:///etc/passwd", "optimizer": True}, "expected tinker://"),
    ("save_weights_for_sampler", {"path": "a", "sampling_session_seq_id": 1}, "both given"),
    ("save_weights_external", {"path": "a", "age_encryption_recipients": ["age1x"]}, "encrypts no exports"),
]


def test_a_user_error_is_the_futures_and_what_comes_behind_runs(tmp_path: Path):
    """A number that was refused at the door would be a gap: the client's next request would wait for ever."""

    async def test(client: Client):
        await client.open()
        for path, body, words in WRONG:
            failed = await client.result(await client.post(path, client.numbered(**body)))
            assert failed["category"] == "user"
            assert words in failed["error"]
        assert isinstance((await client.step([1]))[0], bytes)

    run(tmp_path, test)


def test_a_name_that_is_taken_is_refused_or_overwritten(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.save("a")
        assert "overwrite=True" in (await client.save("a"))["error"]
        old = client.service.registry.checkpoints[f"tinker://{client.model}/weights/a"].directory
        assert "path" in await client.save("a", overwrite=True)
        new = client.service.registry.checkpoints[f"tinker://{client.model}/weights/a"].directory
        assert (tmp_path / new).exists()
        assert not (tmp_path / old).exists()

    run(tmp_path, test)


def test_wrong_shapes_nan_and_faults(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.step([1, 2])
        client.engine.fail_next = NumericsError("the gradient is not finite")
        failed = await client.result(await client.optim_step())
        assert failed == {"error": "the gradient is not finite", "category": "user"}
        client.engine.fail_next = RuntimeError("CUDA out of memory")
        failed = await client.result(await client.forward_backward([4]))
        assert failed["category"] == "server"
        assert "out of memory" in failed["error"]
        assert ("unload_model", client.model) in client.engine.calls  # what it holds is in doubt: it is restored
        assert isinstance((await client.step([5]))[0], bytes)

    run(tmp_path, test)


def test_what_is_wrong_at_once_is_said_at_once(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        create = {"session_id": client.session, "model_seq_id": 1, "base_model": "tiny"}
        assert "expected 'tiny'" in (await client.post("create_model", {**create, "base_model": "gpt"}, 404))["detail"]
        await client.post("create_model", {**create, "lora_config": {"rank": 0}}, 422)
        await client.post("create_model", {**create, "session_id": "none"}, 404)
        await client.post("optim_step", {"model_id": "none", "seq_id": 1, "adam_params": {}}, 404)
        await client.post("optim_step", {"model_id": client.model, "adam_params": {}}, 422)
        await client.post("forward_backward", b"\xff\xff", 400)
        await client.post("optim_step", b"not json", 422)
        await client.post("forward_backward", b"x" * ((1 << 20) + 1), 413)
        await client.post("forward_backward_custom", {}, 404)
        load = {"session_id": client.session, "model_seq_id": 1, "optimizer": True}
        await client.post("load_weights", {**load, "path": "tinker://x/weights/y"}, 404)
        await client.post("load_weights", {**load, "path": "tinker://x/../y"}, 400)
        sampler = {"session_id": client.session, "sampling_session_seq_id": 3}
        await client.post("create_sampling_session", sampler, 400)
        await client.post("create_sampling_session", {**sampler, "model_path": f"tinker://{client.model}/weights/a"}, 400)
        reply = await client.call("POST", "retrieve_future", json={"request_id": "sample-of-before"})
        assert reply.status_code == 410  # the SDK samples again by itself

    run(tmp_path, test)


def test_a_body_without_a_length_ends_when_it_is_too_large(tmp_path: Path):
    async def test(client: Client):
        async def endless():
            for _ in range(3):
                yield b"x" * (1 << 19)

        reply = await client.call("POST", "forward_backward", content=endless())
        assert reply.status_code == 413

    run(tmp_path, test)


def test_a_request_that_cannot_be_read_takes_up_its_number(tmp_path: Path):
    """The SDK counts on: a number that was refused at the door would be waited for by all that come behind."""

    async def test(client: Client):
        await client.open()
        whole = forward_backward(client.model, 1, [1, 2])

        async def without_a_length():
            yield forward_backward(client.model, 3, [1, 2])
            for _ in range(3):
                yield b"x" * (1 << 19)

        torn = await client.post("forward_backward", whole[:-5])
        large = await client.post("forward_backward", forward_backward(client.model, 2, [1] * (1 << 17)))
        larger = (await client.call("POST", "forward_backward", content=without_a_length())).json()
        for future, words in ((torn, "expected protobuf"), (large, "--max-body-mb"), (larger, "--max-body-mb")):
            failed = await client.result(future)
            assert failed["category"] == "user"
            assert words in failed["error"]
        assert await client.post("forward_backward", whole[:-5]) == torn
        assert "other contents" in (await client.post("forward_backward", whole, 400))["detail"]
        too_large = forward_backward(client.model, 1, [1] * (1 << 17))
        assert "other contents" in (await client.post("forward_backward", too_large, 400))["detail"]
        client.seq = 3
        assert isinstance((await client.step([1]))[0], bytes)

    run(tmp_path, test)


def test_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def test(client: Client):
        caplog.set_level("DEBUG")
        await client.open()
        await client.save("a")
        path = f"tinker://{client.model}/weights/a"
        for headers in ({}, {"X-API-Key": "tml-wrong"}, {"X-API-Key": ""}):
            client.http.headers.pop("X-API-Key", None)
            for route in ("get_info", "nothing", "status"):
                assert (await client.http.post(f"/api/v1/{route}", headers=headers, json={})).status_code == 401
            assert (await client.http.get("/api/v1/healthz", headers=headers)).json() == {"status": "ok"}
        client.http.headers["X-API-Key"] = OTHER
        await client.post("get_info", {"model_id": client.model}, 404)
        await client.post("optim_step", client.numbered(adam_params={}), 404)
        await client.post("weights_info", {"tinker_path": path}, 404)
        operation = next(iter(client.service.registry.operations))
        await client.post("retrieve_future", {"request_id": operation}, 404)
        assert (await client.call("GET", "training_runs")).json()["training_runs"] == []
        assert (await client.call("DELETE", f"training_runs/{client.model}/checkpoints/weights/a")).status_code == 404
        client.http.headers["X-API-Key"] = KEY
        publish = f"training_runs/{client.model}/checkpoints/weights/a/publish"
        assert (await client.call("POST", publish)).status_code == 204
        client.http.headers["X-API-Key"] = OTHER
        assert (await client.post("weights_info", {"tinker_path": path}))["lora_rank"] == 4
        assert (await client.call("DELETE", publish)).status_code == 404  # to read is not to own
        assert "tml-" not in caplog.text

    run(tmp_path, test)


def test_samples_that_wait_are_drawn_together(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.snapshot(0)
        await client.step([1, 2])
        await client.snapshot(1)
        client.engine.gate.clear()
        held = await client.forward_backward([1])
        futures = [await client.ask(f"{client.session}:sample:{i % 2}", i) for i in range(6)]
        assert len(futures[0]["sample_sequence_ids"]) == 2
        client.engine.gate.set()
        results = [await client.result(future) for future in futures]
        await client.result(held)
        assert client.engine.batches == [6]
        alone = await client.ask(f"{client.session}:sample:0", 0)
        assert alone == futures[0]
        assert len(set(results)) == 6

    run(tmp_path, test)


def test_one_bad_sample_does_not_harm_those_beside_it(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.snapshot(0)
        sampler = f"{client.session}:sample:0"
        client.engine.gate.clear()
        held = await client.forward_backward([1])
        good, bad = await client.ask(sampler, 0), await client.ask(sampler, 1, [63, 64])
        client.engine.gate.set()
        assert isinstance(await client.result(good), bytes)
        assert "vocabulary" in (await client.result(bad))["error"]
        await client.result(held)
        await client.post("asample", {"sampling_session_id": sampler, "seq_id": 5}, 422)
        for prompt, options, status in (([1] * 512, {}, 400), ([1], {"prompt_alt_tokens_k": 101}, 422), ([-1], {}, 400)):
            chunks = [{"type": "encoded_text", "tokens": prompt}]
            body = {"sampling_session_id": sampler, "seq_id": 9, "prompt": {"chunks": chunks}, "sampling_params": {}}
            await client.post("asample", {**body, **options}, status)

    run(tmp_path, test)


def test_what_a_sample_shall_tell_of_reaches_the_engine_and_comes_back(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.snapshot(0)
        sampler = f"{client.session}:sample:0"
        targets = {"data": [7, 9], "dtype": "int64", "shape": [2, 3]}
        sparse = {"sparse_crow_indices": [0, 0, 2], "sparse_col_indices": [0, 2]}
        options = {"topk_sample_logprobs": 1, "prompt_alt_tokens_k": 2, "target_prompt_logprobs": {**targets, **sparse}}
        last = {"prompt_logprobs": True, "prompt_logprobs_last_n": 1}  # which touches none of the three
        raw = await client.result(await client.ask(sampler, 0, **options, **last))
        answer = MESSAGES["SampleResponse"].FromString(raw)
        assert [(one.topk_sampled_logprobs.k, one.topk_sampled_logprobs.length) for one in answer.sequences] == [(1, 4)] * 2
        given = answer.target_prompt_logprobs
        assert (given.dtype, list(given.shape), given.sparse_csr.values) == (1, [2, 3], np.float32([-7, -9]).tobytes())
        assert np.frombuffer(given.sparse_csr.crow_indices, "<i8").tolist() == [0, 0, 2]
        assert list(answer.prompt_alt_tokens.tokens.shape) == list(answer.prompt_alt_tokens.logprobs.shape) == [2, 2]
        assert np.isnan(np.frombuffer(answer.prompt_logprobs, "<f4")).tolist() == [True, True, False]
        without = MESSAGES["SampleResponse"].FromString(await client.result(await client.ask(sampler, 1)))
        for field in ("target_prompt_logprobs", "prompt_alt_tokens"):
            assert not without.HasField(field)

    run(tmp_path, test)


def test_a_sample_that_cannot_tell_what_it_shall_is_refused_at_once(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.snapshot(0)
        dense = {"data": [7, 9], "dtype": "int64", "shape": [2, 1]}
        sparse = {"sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [0, 0]}
        many = {"num_samples": 4096, "sampling_params": {}}
        for options, status, said in (
            ({"topk_sample_logprobs": 101}, 422, "topk_sample_logprobs"),
            ({"topk_sample_logprobs": -1}, 422, "topk_sample_logprobs"),
            ({"prompt_alt_tokens_k": -1}, 422, "prompt_alt_tokens_k"),
            ({"target_prompt_logprobs": {**dense, "dtype": "float32"}}, 422, "target_prompt_logprobs.dtype"),
            ({"target_prompt_logprobs": {**dense, "shape": [2]}}, 422, "target_prompt_logprobs.shape"),
            ({"target_prompt_logprobs": {**dense, "shape": [-1, 1]}}, 422, "target_prompt_logprobs.shape"),
            ({"target_prompt_logprobs": {**dense, "shape": [2, 2]}}, 422, "reshape"),
            ({"target_prompt_logprobs": {**dense, "data": [7, -2]}}, 422, "target_prompt_logprobs.data.1"),
            ({"target_prompt_logprobs": {**dense, **sparse, "sparse_col_indices": None}}, 422, "sparse_col_indices"),
            ({"target_prompt_logprobs": {**dense, **sparse, "sparse_crow_indices": [0, 1, 9]}}, 422, "do not fit"),
            ({"target_prompt_logprobs": {**dense, "data": [5] * 301, "shape": [1, 301]}}, 400, "at most 100 for each of the 3"),
            ({**many, "topk_sample_logprobs": 20}, 400, "lower num_samples or max_tokens"),
        ):
            chunks = [{"type": "encoded_text", "tokens": [1, 2, 3]}]
            body = {"sampling_session_id": f"{client.session}:sample:0", "seq_id": 9, "prompt": {"chunks": chunks}}
            reply = await client.post("asample", {**body, "sampling_params": {"max_tokens": 4}, **options}, status)
            assert said in reply["detail"]

    run(tmp_path, test)


def test_a_cancelled_sample_is_not_drawn(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.snapshot(0)
        client.engine.gate.clear()
        held = await client.forward_backward([1])
        future = await client.ask(f"{client.session}:sample:0", 0)
        assert (await client.call("POST", "cancel_future", json={"request_id": future["request_id"]})).status_code == 204
        client.engine.gate.set()
        assert "cancelled" in (await client.result(future))["error"]
        await client.result(held)
        assert client.engine.batches == []

    run(tmp_path, test)


def test_models_take_turns(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        first = client.model
        body = {"session_id": client.session, "model_seq_id": 1, "base_model": "tiny"}
        second = (await client.result(await client.post("create_model", body)))["model_id"]
        client.engine.gate.clear()
        futures = [await client.post("forward_backward", forward_backward(first, seq, [1])) for seq in range(1, 5)]
        futures += [await client.post("forward_backward", forward_backward(second, seq, [1])) for seq in range(1, 3)]
        client.engine.gate.set()
        for future in futures:
            await client.result(future)
        order = [model for name, model in client.engine.calls if name == "forward_backward"]
        assert order == [first, second, first, second, first, first]

    run(tmp_path, test)


def test_a_gap_that_nobody_fills_ends_with_the_session(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        future = await client.post("forward_backward", forward_backward(client.model, 2, [1]))
        finished = await client.call("POST", f"sessions/{client.session}/finish", json={"reason": {"type": "success"}})
        assert finished.status_code == 204
        assert "the session has ended" in (await client.result(future))["error"]
        beat = await client.call("POST", "session_heartbeat", json={"session_id": client.session})
        assert beat.status_code == 410

    run(tmp_path, test)


@pytest.mark.parametrize("trouble", ["a full disk", "a result that is not written"])
def test_a_model_that_cannot_be_saved_when_its_session_ends_costs_nothing(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def test(client: Client):
        await client.open()
        await client.step([1])
        runner = client.service.runner
        with monkeypatch.context() as patch:
            if trouble == "a full disk":
                patch.setattr(runner.keeper, "save", full)
            else:
                runner._unwritten.add("some request")
            done = threading.Event()
            client.service.queue.add_chore(lambda: (runner.put_away(client.model), done.set()))
            assert await asyncio.to_thread(done.wait, 20)
        runner._unwritten.discard("some request")
        assert client.model not in runner.keeper.held
        assert not list(tmp_path.glob("models/*/auto-2"))
        await client.step([2])  # it is brought back, and goes on
        assert client.engine.models[client.model].steps == 2

    run(tmp_path, test)


def test_telemetry_is_logged_in_short_and_without_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def test(client: Client):
        event = {"severity": "ERROR", "event_name": "APIFuture", "event_data": {"request_headers": {"x-api-key": KEY}}}
        crash = {"severity": "CRITICAL", "error_type": "ValueError", "error_message": f"with {KEY}" + "x" * 5000}
        assert (await client.post("telemetry", {"events": [event, crash]})) == {"status": "accepted"}
        assert "ValueError" in caplog.text
        assert KEY not in caplog.text
        assert len(caplog.text) < 2000

    run(tmp_path, test)
