"""A run whose directory is a URL: killed, its local files lost, it goes on from what lies there."""

import shutil
import signal
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A bucket `runs`; the environment by which a run finds it."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-that-nobody-prints",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=environment["FSSPEC_S3_ENDPOINT_URL"]).create_bucket(Bucket="runs")
    yield environment
    server.stop()


def test_killed_and_bereft_of_its_disk_it_goes_on_from_the_url(references, new_run, s3) -> None:
    run = new_run("trainer.backend=inprocess", "trainer.default_local_dir=s3://runs/a/run", "trainer.staging_dir=staging", **s3)
    staging = run.cwd / "staging"
    run.stop_at("reward", 4, "hold", metrics="staging/*/metrics.jsonl").start()
    run.wait_until(run.plan.with_suffix(".reached").exists, "the reward of step 4")
    run.wait_until(lambda: list(staging.glob("*/global_step_3.pt")), "the checkpoint of step 3")
    second = new_run(*run.overrides[:2], "trainer.staging_dir=elsewhere", **s3).start().ends(2)
    assert f"s3://runs/a/run is in use by pid {run.process.pid} on " in second.stderr
    run.kill()
    run.ends(-signal.SIGKILL)
    shutil.rmtree(staging)

    run.again()
    assert "resumed from" in run.stdout
    assert "s3://runs/a/run" in run.stdout
    assert "secret-that-nobody-prints" not in run.output
    (found,) = staging.iterdir()
    found.rename(run.directory)
    run.equals(references["inprocess"])
