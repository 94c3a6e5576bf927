"""The bench of checkpoints gives every figure of its table."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_checkpoint.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "USUAL_STEPS", 5)
    monkeypatch.setattr(bench.Bench, "settle", lambda self: None)  # it waits for all that others write
    threads = bench.torch.get_num_threads()
    bench.torch.set_num_threads(1)
    yield bench.bench(3_000_000, 1, tmp_path, step_seconds=0.04)
    bench.torch.set_num_threads(threads)


def test_every_figure_is_there_and_finite_and_nothing_is_left(bench, run, tmp_path):
    size, samples = run
    assert 2_500_000 < size < 3_500_000
    assert set(samples) == set(bench.FIGURES)
    assert {"clone", "DCP async", "ours"} == set(samples["blocked"])
    assert {"safetensors", "torch.save", "DCP", "ours"} == set(samples["durable"])
    for figure in bench.FIGURES:
        assert all(len(values) == 1 and math.isfinite(values[0]) for values in samples[figure].values()), figure
    lines = bench.table(samples).splitlines()
    assert len(lines) == 1 + len(bench.FIGURES)
    assert all(figure.name in line for figure, line in zip(bench.FIGURES.values(), lines[1:], strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [200_000_000, 2_000_000_000])
def test_the_state_has_about_the_size_that_was_asked_for(bench, size, monkeypatch):
    import torch

    for make in ("rand", "rand_like"):
        real = getattr(torch, make)
        monkeypatch.setattr(bench.torch, make, lambda *a, real=real: real(*a, device="meta"))
    state = bench.make_state(size)
    total = sum(tensor.numel() * tensor.element_size() for tensors in state.values() for tensor in tensors.values())
    assert abs(total / size - 1) < 0.05


def test_a_figure_says_whether_its_goal_is_met(bench):
    at_most, at_least = bench.Figure("a", 1.2), bench.Figure("b", 0.5, at_least=True)
    assert at_most.verdict([1.0, 1.1, 9.0]) == ("at most 1.2", "yes")
    assert at_most.verdict([1.3]) == ("at most 1.2", "NO")
    assert at_least.verdict([0.6]) == ("at least 0.5", "yes")
    assert at_least.verdict([0.4]) == ("at least 0.5", "NO")
