"""What `agl serve` costs beside the same calls in one process: steps a second, and sampled tokens a second.

    python scripts/bench_serve.py --client-python VENV/bin/python             1, 4 and 16 clients, three rounds
    python scripts/bench_serve.py --client-python VENV/bin/python --base-model DIR --rounds 5

VENV holds the tinker SDK (`pip install 'tinker==0.38.*' torch`). Over HTTP: the real SDK in one process, a thread and a model a
client, a real server in another one. In this process: `ServiceClient(backend="inprocess")`, the same threads, the same data.
Both take turns, for each count of clients and in each round, so that a busy machine slows both alike. A step is
forward_backward and optim_step, sent together and waited for together, as loops do; on the embedded base it is made large
enough (`--data`) that it takes about 50 ms. Sampling: each client asks for 4 samples of 64 tokens, again and again.

The figures are medians over rounds. `http/own`: 1.00 is no overhead. The SDK's own work is in it: `sdk ms` is what the same
takes against a server that answers at once (instant_server.py), so that no server could do better.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COUNTS = (1, 4, 16)
SAMPLES, TOKENS = 4, 64
LENGTH = 64  # tokens of a datum


@dataclass
class Load:
    """The same work for either kind of client. `words` is the module with the types."""

    words: Any
    make_training: Callable[[int], Any]
    make_sampling: Callable[[], Any]
    data: int  # in a step
    training: list[Any] = field(default_factory=list)
    sampling: list[Any] = field(default_factory=list)

    def run(self, kind: str, clients: int, seconds: float) -> float:
        """Steps or tokens a second of all clients together."""
        made, make = (self.training, self._trainer) if kind == "train" else (self.sampling, self._sampler)
        while len(made) < clients:
            made.append(make(len(made)))
        work = self._step if kind == "train" else self._sample
        done, started = [0] * clients, time.monotonic()

        def loop(number: int) -> None:
            while time.monotonic() < started + seconds:
                done[number] += work(made[number])

        threads = [threading.Thread(target=loop, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / (time.monotonic() - started)

    def _trainer(self, number: int) -> Any:
        client = self.make_training(number)
        self._step(client)
        return client

    def _sampler(self, number: int) -> Any:
        client = self.make_sampling()
        self._sample(client)
        return client

    def _step(self, client: Any) -> int:
        gradient = client.forward_backward([self._datum(i) for i in range(self.data)], "cross_entropy")
        update = client.optim_step(self.words.AdamParams(learning_rate=1e-4))
        gradient.result()
        update.result()
        return 1

    def _datum(self, number: int) -> Any:
        tokens = [32 + (7 * number + i * i) % 90 for i in range(LENGTH + 1)]
        inputs = {
            "target_tokens": self.words.TensorData(data=tokens[1:], dtype="int64"),
            "weights": self.words.TensorData(data=[1.0] * LENGTH, dtype="float32"),
        }
        return self.words.Datum(model_input=self.words.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)

    def _sample(self, client: Any) -> int:
        params = self.words.SamplingParams(max_tokens=TOKENS, temperature=1.0, stop=[])
        prompt = self.words.ModelInput.from_ints([40 + i for i in range(32)])
        answer = client.sample(prompt, num_samples=SAMPLES, sampling_params=params).result()
        return sum(len(sequence.tokens) for sequence in answer.sequences)


def over_http(base_model: str, data: int) -> Load:
    """The SDK's clients; the address is in the environment."""
    import tinker  # pyright: ignore[reportMissingImports]

    service = tinker.ServiceClient()
    return Load(
        tinker.types,
        lambda number: service.create_lora_training_client(base_model, rank=8, seed=number).result(),
        lambda: service.create_sampling_client(base_model=base_model).result(),
        data,
    )


def in_this_process(base_model: str, data: int, root: Path) -> Load:
    """Door 2's clients over an engine of this process."""
    from agentlightning import tinker
    from agentlightning.tinker import types

    service = tinker.ServiceClient(backend="inprocess", root=root, num_threads=1)
    return Load(
        types,
        lambda number: service.create_lora_training_client(base_model, rank=8, seed=number),
        lambda: service.create_sampling_client(base_model=base_model),
        data,
    )


class FarLoad:
    """A `Load` in the SDK's process: one JSON line there for each call, one back."""

    def __init__(self, python: str, environment: dict[str, str], base_model: str, data: int) -> None:
        command = [python, __file__, "--far", "--base-model", base_model, "--data", str(data)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, kind: str, clients: int, seconds: float) -> float:
        """See `Load`. RuntimeError if the process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, clients, seconds]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client process has ended, exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def serve_far_load(base_model: str, data: int) -> None:
    """The SDK's process."""
    warnings.simplefilter("ignore", FutureWarning)
    load = over_http(base_model, data)
    for line in sys.stdin:
        print(json.dumps(load.run(*json.loads(line))), flush=True)


Rates = dict[tuple[str, int, str], list[float]]


def measure(loads: dict[str, Any], rounds: int, seconds: float, counts: Sequence[int] = COUNTS) -> Rates:
    """By kind of work, count of clients and way, a rate a round; the first way takes the first turn every other time."""
    rates: Rates = {}
    for load in loads.values():  # clients are made, and everything is warm
        for kind in ("train", "sample"):
            load.run(kind, max(counts), 0.5)
    for number in range(rounds):
        for kind in ("train", "sample"):
            for clients in counts:
                for way in sorted(loads, reverse=bool(number % 2)):
                    rates.setdefault((kind, clients, way), []).append(loads[way].run(kind, clients, seconds))
    return rates


def show(rates: Rates) -> None:
    """A line for each count of clients."""
    counts = sorted({clients for _, clients, _ in rates})
    print(f"{'work':8} {'clients':>7} {'http/s':>10} {'own/s':>10} {'own ms':>8} {'sdk ms':>8} {'http/own':>9}")
    median = {key: statistics.median(values) for key, values in rates.items()}
    for kind in ("train", "sample"):
        for clients in counts:
            http, own = median[kind, clients, "http"], median[kind, clients, "own"]
            of_rounds = zip(rates[kind, clients, "http"], rates[kind, clients, "own"], strict=True)
            ratio = statistics.median(a / b for a, b in of_rounds)
            work = 1000 if kind == "train" else 1000 * SAMPLES * TOKENS
            times = f"{work / own:8.1f} {work / median[kind, clients, 'sdk']:8.1f}"
            print(f"{kind:8} {clients:7} {http:10.1f} {own:10.1f} {times} {ratio:9.2f}")
    gain = median["sample", max(counts), "http"] / median["sample", min(counts), "http"]
    print(f"sampled tokens/s over HTTP, {max(counts)} clients to {min(counts)}: {gain:.1f}")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client-python", help="the python of an environment that has the tinker SDK")
    parser.add_argument("--base-model", default="tiny")
    parser.add_argument("--data", type=int, default=32, help=f"data of {LENGTH} tokens in a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=COUNTS, metavar="N", help="counts (default: 1 4 16)")
    parser.add_argument("--far", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.far:
        serve_far_load(arguments.base_model, arguments.data)
        return 0
    if arguments.client_python is None:
        parser.error("--client-python is missing")
    from chaos_serve import ServeProcess
    from instant_server import InstantServer

    with tempfile.TemporaryDirectory() as folder:
        server = ServeProcess(Path(folder) / "root", base_model=arguments.base_model)
        server.start()
        instant = InstantServer(arguments.data, LENGTH, SAMPLES, TOKENS)
        far: list[FarLoad] = []
        try:
            server.wait_ready()
            environment = server.client_environment()
            for there in (environment, {**environment, "TINKER_BASE_URL": instant.url}):
                far.append(FarLoad(arguments.client_python, there, arguments.base_model, arguments.data))
            own = in_this_process(arguments.base_model, arguments.data, Path(folder) / "own")
            loads = {"http": far[0], "own": own, "sdk": far[1]}
            show(measure(loads, arguments.rounds, arguments.seconds, arguments.clients))
        finally:
            server.kill()
            instant.close()
            for load in far:
                load.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
