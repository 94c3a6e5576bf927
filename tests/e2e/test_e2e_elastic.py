"""The real program over two, one and three workers: killed between, it ends with the bits of a run that nobody stopped."""

import signal

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
EXACT = ("trainer.exact_elastic=true", "trainer.logical_shards=4", "trainer.total_training_steps=3")


def test_two_workers_then_one_then_three_are_one_run(new_run):
    reference = new_run(*EXACT, "trainer.backend=inprocess").start().ends()
    assert "the same on 1 to 4 workers (4 logical shards)" in reference.stdout
    run = new_run(*EXACT)
    run.overrides = (*EXACT, "trainer.n_gpus_per_node=2")
    run.hold_in("tool", step=2)
    run.kill(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert run.steps == [1]

    run.overrides = (*EXACT, "trainer.n_gpus_per_node=auto")
    run.hold_in("tool", step=3)
    run.kill(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert run.steps == [1, 2]

    run.overrides = (*EXACT, "trainer.n_gpus_per_node=3")
    run.again()
    assert run.steps == [1, 2, 3]
    assert run.numbers == reference.numbers
    mine, theirs = (tensors(each.files(3)) for each in (run, reference))
    assert mine == theirs
    assert any("optimizer" in name or "exp_avg" in name for name in mine)


def tensors(files: dict[str, bytes]) -> dict[str, bytes]:
    """Every tensor by its name, whatever number of files they are spread over."""
    from safetensors.numpy import load

    return {
        f"{path.split('/')[0]} {name}": array.tobytes()
        for path, content in files.items()
        if path.endswith(".safetensors")
        for name, array in load(content).items()
    }
