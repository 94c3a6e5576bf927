"""A service that is killed loses nothing that it acknowledged: what it does after a restart is what it would have done."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import Client, forward_backward, output, serving

from agentlightning.tinker.server.keeper import SavePolicy

TARGETS = [[1, 2, 3], [4, 5], [1, 1, 6], [2, 9]]


async def go_on(client: Client, steps: list[list[int]]) -> list[Any]:
    return [
        (output(trained).SerializeToString(deterministic=True), stepped)
        for trained, stepped in [await client.step(t) for t in steps]
    ]


def take_over(client: Client, before: Client) -> None:
    client.session, client.model, client.seq = before.session, before.model, before.seq


async def undisturbed(root: Path) -> list[Any]:
    async with serving(root) as client:
        await client.open()
        return await go_on(client, TARGETS)


@pytest.mark.parametrize("policy", [None, SavePolicy(operations=2, seconds=1e9, cost_share=1e9)], ids=["replay", "saved"])
def test_killed_between_any_two_steps(tmp_path: Path, policy: SavePolicy | None):
    async def main():
        expected = await undisturbed(tmp_path / "calm")
        root, found = tmp_path / "killed", []
        async with serving(root, kill=True, policy=policy) as client:
            await client.open()
            found += await go_on(client, TARGETS[:1])
        for targets in TARGETS[1:]:
            before = client
            async with serving(root, kill=True, policy=policy) as client:
                take_over(client, before)
                found += await go_on(client, [targets])
                loaded = [name for name, _ in client.engine.calls].count("load_state")
        assert found == expected
        assert loaded == (0 if policy is None else 1)

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_with_operations_that_wait_and_one_that_runs(tmp_path: Path):
    """The forward_backward had run and its result was not yet fetched; the optim_step and a sample waited."""

    async def main():
        expected = await undisturbed(tmp_path / "calm")
        root = tmp_path / "killed"
        async with serving(root, kill=True) as client:
            await client.open()
            await client.snapshot(0)
            calm = await client.result(await client.ask(f"{client.session}:sample:0", 7))
            first = await client.forward_backward(TARGETS[0])
            await client.service.registry.operations[first["request_id"]].done.wait()
            client.engine.gate.clear()
            second = await client.optim_step()
            third = await client.forward_backward(TARGETS[1])
            sample = await client.ask(f"{client.session}:sample:0", 8)
            client.service.queue.close()
            client.engine.fail_next = SystemExit("killed")  # the operation that runs gives no result
            client.engine.gate.set()
        async with serving(root) as again:
            take_over(again, client)
            results = [await again.result(future) for future in (first, second, third, sample)]
            assert results[0] == expected[0][0]
            assert results[1] == expected[0][1]
            assert results[2] == expected[1][0]
            assert isinstance(results[3], bytes)
            assert await again.result(await again.ask(f"{client.session}:sample:0", 7)) == calm
            assert [name for name, _ in again.engine.calls].count("optim_step") == 1
            assert await again.result(await again.optim_step()) == expected[1][1]

    asyncio.run(main())


def test_an_answered_error_stays_one_and_a_fault_has_no_effect(tmp_path: Path):
    async def main():
        root = tmp_path / "killed"
        async with serving(root, kill=True) as client:
            await client.open()
            await client.step([1, 2])
            client.engine.fail_next = MemoryError("full")
            lost = await client.forward_backward([7, 7, 7])
            assert (await client.result(lost))["category"] == "server"
            assert (await client.save("a/b"))["category"] == "user"
            await client.step([3])
            weights_V = client.engine.models[client.model].weights_V.tobytes()
        async with serving(root) as again:
            take_over(again, client)
            assert (await again.result(lost))["category"] == "server"
            await again.save("b")
            assert again.engine.models[client.model].weights_V.tobytes() == weights_V

    asyncio.run(main())


def test_a_model_made_from_a_checkpoint_needs_it_no_more(tmp_path: Path):
    async def main():
        root = tmp_path / "killed"
        async with serving(root, kill=True) as client:
            await client.open(rank=2)
            await client.step([1, 2])
            await client.save("a")
            path = f"tinker://{client.model}/weights/a"
            body = {"session_id": client.session, "model_seq_id": 1, "path": path, "optimizer": True}
            made = await client.result(await client.post("load_weights", body))
            first = client.model
            client.model, client.seq = made["model_id"], 0
            assert client.model == f"{client.session}:train:1"
            assert (await client.post("get_info", {"model_id": client.model}))["lora_rank"] == 2
            await client.step([5])
            await client.call("DELETE", f"training_runs/{first}/checkpoints/weights/a")
            weights_V = client.engine.models[client.model].weights_V.tobytes()
        async with serving(root) as again:
            take_over(again, client)
            await again.save("b")
            assert again.engine.models[client.model].weights_V.tobytes() == weights_V

    asyncio.run(main())


def test_what_a_killed_process_began_is_removed_and_done_again(tmp_path: Path):
    async def main():
        async with serving(tmp_path, kill=True) as client:
            await client.open()
            await client.save("whole")
            folder = tmp_path / "models" / client.model.replace(":", "-") / "weights"
            (folder / "torn@2" / "state").mkdir(parents=True)
            (folder.parent / "auto-9").mkdir()
        async with serving(tmp_path) as again:
            assert [path.name for path in folder.iterdir()] == ["whole@1"]
            take_over(again, client)
            assert "path" in await again.save("torn")

    asyncio.run(main())


def test_a_damaged_payload_is_an_error_and_not_another_gradient(tmp_path: Path):
    async def main():
        async with serving(tmp_path, kill=True) as client:
            await client.open()
            await client.step([1, 2, 3])
        (segment,) = (tmp_path / "journal").glob("requests-*.seg")
        raw = bytearray(segment.read_bytes())
        raw[-40] ^= 1
        segment.write_bytes(raw)
        async with serving(tmp_path, kill=True) as again:
            take_over(again, client)
            failed = await again.result(await again.forward_backward([1]))
            assert failed["category"] == "server"
            assert "damaged" in failed["error"]

    asyncio.run(main())


def test_a_calm_end_saves_and_the_next_start_replays_nothing(tmp_path: Path):
    async def main():
        async with serving(tmp_path) as client:
            await client.open()
            await client.step([1, 2, 3])
        assert client.engine.closed
        async with serving(tmp_path) as again:
            take_over(again, client)
            await again.step([4])
            assert [name for name, _ in again.engine.calls][:3] == ["create_model", "load_state", "forward_backward"]
            assert (
                len(list((tmp_path / "journal").glob("requests-*.seg"))) == 1
            )  # the old one's payloads are covered by the save

    asyncio.run(main())


def test_an_engine_that_does_not_end_is_left_when_all_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def main():
        stuck = threading.Event()
        monkeypatch.setattr("agentlightning.tinker.server.runner._CLOSE_S", 0.01)
        async with serving(tmp_path) as client:
            client.engine.close = lambda: stuck.wait(30)
            await client.open()
            await client.step([1])
        assert client.service.runner.saved.is_set()
        assert client.service.runner.is_running
        assert list(tmp_path.glob("models/*/auto-2/state"))
        stuck.set()

    asyncio.run(main())


def test_a_closing_service_answers_polls_and_takes_nothing_new(tmp_path: Path):
    async def main():
        async with serving(tmp_path, FakeEngine()) as client:
            await client.open()
            client.engine.gate.clear()
            future = await client.forward_backward([1])
            poll = asyncio.create_task(client.call("POST", "retrieve_future", json={"request_id": future["request_id"]}))
            await asyncio.sleep(0)
            client.service.closing.set()
            assert json.loads((await poll).content)["type"] == "try_again"
            await client.post("forward_backward", forward_backward(client.model, 2, [1]), 503)
            client.engine.gate.set()

    asyncio.run(main())


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def main():
        async with serving(tmp_path) as client:
            await client.open()
            monkeypatch.setattr("agentlightning.tinker.server.runner._RETRY_S", 0.01)
            append, failures = client.service.journal.segments.append, [OSError(28, "No space left on device")] * 3

            def full(blob):
                if failures:
                    raise failures.pop()
                append(blob)

            monkeypatch.setattr(client.service.journal.segments, "append", full)
            body = forward_backward(client.model, 1, [1])
            await client.post("forward_backward", body, 503)  # not acknowledged; the SDK sends it again
            failures.clear()
            client.engine.gate.clear()
            future = await client.post("forward_backward", body)
            failures.extend([OSError(28, "No space left on device")] * 3)
            client.engine.gate.set()
            assert isinstance(await client.result(future), bytes)
            assert not failures

    asyncio.run(main())


def hold_journal(client: Client, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> threading.Event:
    """Nothing becomes durable until the event is set; the first commit that was held then fails with `error`."""
    go_on, errors = threading.Event(), [error] if error is not None else []
    sync = client.service.journal.segments.sync

    def held():
        go_on.wait(10)  # a test that has failed ends
        if errors:
            raise errors.pop()
        sync()

    monkeypatch.setattr(client.service.journal.segments, "sync", held)
    return go_on


async def until_called(client: Client, name: str, times: int = 1) -> None:
    while [called for called, _ in client.engine.calls].count(name) < times:
        await asyncio.sleep(0.001)


def test_the_engine_may_begin_before_a_request_is_durable_but_nobody_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def main():
        async with serving(tmp_path) as client:
            await client.open()
            await client.snapshot(0)
            for name, send in (
                ("forward_backward", lambda: client.forward_backward([1, 2])),
                ("optim_step", client.optim_step),
                ("sample", lambda: client.ask(f"{client.session}:sample:0", 5)),
            ):
                go_on = hold_journal(client, monkeypatch)
                submitted = asyncio.create_task(send())
                await until_called(client, name)
                operation = list(client.service.registry.operations.values())[-1]
                assert not submitted.done()
                assert not operation.done.is_set()
                assert operation.result_type is None
                go_on.set()
                assert await client.result(await submitted)

    asyncio.run(main())


def test_what_ran_and_could_not_be_kept_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each request of a loop runs once while its acceptance fails, and is sent again: the bits are those of a calm loop."""

    async def main():
        expected = await undisturbed(tmp_path / "calm")
        async with serving(tmp_path / "full") as client:
            await client.open()
            await client.snapshot(0)
            found, seq, done = [], 1, {"forward_backward": 0, "optim_step": 0}
            sampler = f"{client.session}:sample:0"
            await client.result(await client.ask(sampler, 1))
            for targets in TARGETS:
                results = []
                for path in ("forward_backward", "optim_step"):
                    seq += 1
                    optim = {"model_id": client.model, "seq_id": seq, "adam_params": {"learning_rate": 0.1}}
                    body = forward_backward(client.model, seq, targets) if path == "forward_backward" else optim
                    go_on = hold_journal(client, monkeypatch, OSError(28, "No space left on device"))
                    refused = asyncio.create_task(client.post(path, body, 503))
                    await until_called(client, path, done[path] + 1)
                    go_on.set()
                    await refused
                    results.append(await client.result(await client.post(path, body)))
                    done[path] = [name for name, _ in client.engine.calls].count(path)
                found.append((output(results[0]).SerializeToString(deterministic=True), results[1]))
            assert found == expected
            go_on = hold_journal(client, monkeypatch, OSError(28, "No space left on device"))
            refused = asyncio.create_task(client.ask(sampler, 2, status=503))
            await until_called(client, "sample", 2)
            go_on.set()
            await refused
            assert isinstance(await client.result(await client.ask(sampler, 2)), bytes)

    asyncio.run(main())


def test_what_waits_behind_a_request_that_was_not_kept_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def main():
        async with serving(tmp_path) as client:
            await client.open()
            client.engine.gate.clear()
            go_on = hold_journal(client, monkeypatch, OSError(28, "No space left on device"))
            first = asyncio.create_task(client.post("forward_backward", forward_backward(client.model, 1, [1]), 503))
            while client.service.queue.next_seq(client.model) != 1 or not client.service.runner.is_running:
                await asyncio.sleep(0.001)
            go_on.set()
            await first
            behind = await client.post("forward_backward", forward_backward(client.model, 2, [2]))
            client.engine.gate.set()
            again = await client.post("forward_backward", forward_backward(client.model, 1, [1]))
            assert isinstance(await client.result(again), bytes)
            assert isinstance(await client.result(behind), bytes)
            order = sorted(client.service.registry.operations_of(client.model), key=lambda op: op.finished_at)
            assert [op.seq for op in order] == [0, 1, 2]

    asyncio.run(main())


def test_a_step_that_was_sent_whole_is_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def main():
        async with serving(tmp_path) as client:
            await client.open()
            client.engine.gate.clear()
            futures = [await client.forward_backward([1]), await client.optim_step(), await client.forward_backward([2])]
            sizes, write = [], client.service.journal.write

            def counting(*changes, blobs=()):
                sizes.append(len(blobs))
                return write(*changes, blobs=blobs)

            monkeypatch.setattr(client.service.journal, "write", counting)
            client.engine.gate.set()
            for future in futures:
                assert await client.result(future)
            assert [size for size in sizes if size] == [2, 1]

    asyncio.run(main())
