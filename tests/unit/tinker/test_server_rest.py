"""Runs, checkpoints, downloads, sessions and time-outs, as the REST client and the `tinker` command use them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

from serving import KEY, OTHER, Client, serving

from agentlightning.tinker.server import sweeper as sweeping


def run(root: Path, test, **options) -> None:
    async def main() -> None:
        async with serving(root, **options) as client:
            await test(client)

    asyncio.run(main())


def test_runs_and_checkpoints(tmp_path: Path):
    async def test(client: Client):
        await client.open(user_metadata={"renderer": "role_colon", "n": 3})
        await client.save("a", user_metadata={"k": "v"}, ttl_seconds=7200)
        await client.result(await client.post("save_weights_for_sampler", client.numbered(path="a")))
        listed = (await client.call("GET", "training_runs?limit=1&access_scope=owned")).json()
        assert listed["cursor"] == {"offset": 0, "limit": 1, "total_count": 1}
        one = (await client.call("GET", f"training_runs/{client.model}?access_scope=owned")).json()
        assert one == listed["training_runs"][0]
        assert one["user_metadata"] == {"renderer": "role_colon", "n": "3"}
        assert one["last_checkpoint"]["tinker_path"] == f"tinker://{client.model}/weights/a"
        assert one["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/a"
        checkpoints = (await client.call("GET", f"training_runs/{client.model}/checkpoints")).json()["checkpoints"]
        assert [c["checkpoint_type"] for c in checkpoints] == ["training", "sampler"]
        assert checkpoints[0]["user_metadata"] == {"k": "v"}
        left = datetime.fromisoformat(checkpoints[0]["expires_at"]) - datetime.now(UTC)
        assert timedelta(seconds=7100) < left <= timedelta(seconds=7200)
        ttl = f"training_runs/{client.model}/checkpoints/weights/a/ttl"
        assert (await client.call("PUT", ttl, json={"ttl_seconds": None})).status_code == 204
        mine = (await client.call("GET", "checkpoints?limit=1&offset=1")).json()
        assert mine["checkpoints"][0]["expires_at"] is None
        assert mine["cursor"]["total_count"] == 2
        info = await client.post("weights_info", {"tinker_path": f"tinker://{client.model}/weights/a"})
        assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == ("tiny", 4, True)
        capabilities = (await client.call("GET", "get_server_capabilities")).json()
        assert capabilities["supported_models"][0]["max_context_length"] == 512
        state = (await client.call("GET", "status")).json()
        assert state["models"][0]["id"] == client.model
        assert state["checkpoints"]["count"] == 2

    run(tmp_path, test)


def test_time_outs_spare_the_last_resumable_state(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        for name in ("a", "b"):
            await client.save(name, ttl_seconds=3600)
        await client.result(await client.post("save_weights_for_sampler", client.numbered(path="b", ttl_seconds=3600)))
        moment = datetime.now(UTC) + timedelta(hours=2)
        expired = client.sweeper.expired(moment)
        assert [c.id.rpartition(":")[2] for c in expired] == ["0/weights/a", "0/sampler_weights/b"]
        assert client.sweeper.expired(datetime.now(UTC)) == []
        for checkpoint in expired:
            await client.sweeper.delete(checkpoint)
            assert not (tmp_path / checkpoint.directory).exists()
        left = (await client.call("GET", f"training_runs/{client.model}/checkpoints")).json()["checkpoints"]
        assert [c["checkpoint_id"] for c in left] == ["weights/b"]

    run(tmp_path, test)


def test_weights_that_are_sampled_from_outlive_their_name(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        saved = await client.result(await client.post("save_weights_for_sampler", client.numbered(path="a")))
        body = {"session_id": client.session, "sampling_session_seq_id": 0, "model_path": saved["path"]}
        made = await client.post("create_sampling_session", body)
        assert await client.post("create_sampling_session", body) == made
        sampler = (await client.call("GET", f"samplers/{made['sampling_session_id']}")).json()
        assert sampler["model_path"] == saved["path"]
        url = f"training_runs/{client.model}/checkpoints/sampler_weights/a"
        assert (await client.call("DELETE", url)).status_code == 204
        assert (await client.call("DELETE", url)).status_code == 404
        assert isinstance(await client.result(await client.ask(made["sampling_session_id"], 0)), bytes)
        await client.post("create_sampling_session", {**body, "sampling_session_seq_id": 1}, 404)

    run(tmp_path, test)


def test_a_loops_old_snapshots_go_when_nobody_uses_them(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        for number in range(sweeping.SNAPSHOTS + 2):
            await client.snapshot(number)
        moment = datetime.now(UTC) + timedelta(seconds=sweeping.SNAPSHOT_S + 1)
        first, second = (f"{client.session}:sample:{number}" for number in (0, 1))
        assert [sampler.id for sampler in client.sweeper.outdated(moment)] == [first, second]
        client.service.registry.samplers[first].used_at = moment.isoformat()
        assert [sampler.id for sampler in client.sweeper.outdated(moment)] == [second]
        assert client.sweeper.outdated(datetime.now(UTC)) == []

    run(tmp_path, test)


def test_fetched_answers_and_ended_sessions_are_forgotten(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.step([1])
        await client.snapshot(0)
        later = datetime.now(UTC).timestamp() + sweeping.FETCHED_S + 1
        assert client.sweeper.forgettable(later) == []  # a replay would need them
        client.service.queue.add_chore(client.service.runner.keeper.save_idle)
        await client.result(await client.ask(f"{client.session}:sample:0", 0))
        await client.step([2])
        old = client.sweeper.forgettable(later)
        assert sorted(op.kind for op in old) == [
            "create_model", "forward_backward", "optim_step", "sample", "save_weights_for_sampler",
        ]  # fmt: skip
        await client.sweeper._forget(old)
        reply = await client.post("optim_step", {"model_id": client.model, "seq_id": 1, "adam_params": {}}, 400)
        assert "answered long ago" in reply["detail"]
        await client.service.finish_session(client.service.keys.owner(KEY) or "", client.session, {"type": "success"}, None)
        client.service.registry.sessions[client.session].seen_at = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
        directory = client.service.registry.samplers[f"{client.session}:sample:0"].directory or ""
        assert (tmp_path / directory).exists()
        await client.sweeper.sweep()
        assert not (tmp_path / directory).exists()
        assert client.service.registry.samplers == {}

    run(tmp_path, test)


def test_an_export_is_downloaded_by_a_signature(tmp_path: Path):
    async def test(client: Client):
        await client.open()
        await client.result(await client.post("save_weights_external", client.numbered(path="e")))
        one = f"training_runs/{client.model}/checkpoints/external_weights/e/external_weights_urls"
        urls = (await client.call("GET", one)).json()["urls"]
        assert list(urls) == ["weights.npy"]
        del client.http.headers["X-API-Key"]
        url = urls["weights.npy"]
        found = await client.http.get(url)
        assert found.content == next(tmp_path.rglob("external_weights/*/state/weights.npy")).read_bytes()
        for wrong in (
            url[:-1],
            url.replace("weights.npy", "../../x"),
            url.replace("expires=", "expires=9"),
            url.partition("?")[0],
        ):
            assert (await client.http.get(wrong)).status_code == 401
        keys = client.service.keys
        up = f"/api/v1/external_weights/{client.model}/e/../../../../service.db"
        assert (await client.http.get("http://test" + keys.sign(up, 60).replace("..", "%2E%2E"))).status_code in (400, 401, 404)
        assert not keys.is_signed("/a", *(word.partition("=")[2] for word in keys.sign("/a", -1).partition("?")[2].split("&")))

    run(tmp_path, test)


def test_sessions(tmp_path: Path):
    async def test(client: Client):
        ids = []
        for name in ("first run", "second run", None):
            body = {"tags": [], "user_metadata": {"a": "1"}, "display_name": name}
            ids.append((await client.post("create_session", body))["session_id"])
        assert (await client.call("GET", "sessions?limit=2")).json() == {"sessions": [ids[2], ids[1]]}
        assert (await client.call("PUT", f"sessions/{ids[0]}/project", json={"project_id": "p"})).status_code == 204
        page = await client.post("sessions/search", {"limit": 2, "user_metadata": {"a": "1"}})
        assert [s["session_id"] for s in page["sessions"]] == [ids[2], ids[1]]
        rest = await client.post("sessions/search", {"limit": 2, "cursor": page["next_cursor"]})
        assert [s["session_id"] for s in rest["sessions"]] == [ids[0]]
        assert rest["next_cursor"] is None
        named = await client.post("sessions/search", {"display_name": "RUN first"})
        assert [(s["session_id"], s["project_id"]) for s in named["sessions"]] == [(ids[0], "p")]
        await client.call("POST", f"sessions/{ids[1]}/finish", json={"reason": {"type": "errored"}, "detail": "x"})
        asked = {"statuses": [{"type": "client_finished", "reasons": ["errored"]}]}
        assert [s["session_id"] for s in (await client.post("sessions/search", asked))["sessions"]] == [ids[1]]
        assert (await client.call("GET", f"sessions/{ids[0]}")).json()["training_run_ids"] == []
        client.http.headers["X-API-Key"] = OTHER
        assert (await client.call("GET", f"sessions/{ids[0]}")).status_code == 404

    run(tmp_path, test)


def test_the_page_wants_a_key_once(tmp_path: Path):
    async def test(client: Client):
        await client.open(user_metadata={"a": "<script>"})
        del client.http.headers["X-API-Key"]
        assert (await client.http.get("/")).status_code == 401
        assert (await client.http.post("/", content="key=tml-wrong")).status_code == 401
        entered = await client.http.post("/", content=f"key={KEY}")
        assert entered.status_code == 303
        assert KEY not in str(entered.headers)
        shown = await client.http.get("/")  # by the cookie
        assert shown.status_code == 200
        assert client.model in shown.text
        assert (await client.call("GET", "status")).status_code == 401  # which opens nothing else
        client.http.cookies.clear()
        assert (await client.http.get("/", headers={"cookie": "agl_ticket=a.9999999999.b"})).status_code == 401

    run(tmp_path, test)
