"""The bench of the service does the same work both ways, and says what is slower."""

import os

from sdk_programs import load_script

bench = load_script("bench_serve")


class Fixed:
    def __init__(self, rate: float):
        self.rate, self.asked = rate, []

    def run(self, kind: str, clients: int, seconds: float) -> float:
        self.asked.append((kind, clients))
        return self.rate * (clients if kind == "sample" else 1)


def test_the_table_says_what_http_costs(capsys):
    http, own = Fixed(9.0), Fixed(10.0)
    bench.show(bench.measure({"http": http, "own": own, "sdk": Fixed(100.0)}, rounds=2, seconds=0.0))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["train", "1", "9.0", "10.0", "100.0", "10.0", "0.90"]
    assert lines[6][:4] == ["sample", "16", "144.0", "160.0"]
    assert lines[7][-1] == "16.0"
    assert http.asked == own.asked


def test_the_engine_of_this_process_steps_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 4)
    load = bench.in_this_process("tiny", 2, tmp_path)
    assert load.run("train", 2, 0.1) > 0
    assert len(load.training) == 2
    assert load.run("sample", 1, 0.1) > 0


def test_the_sdk_takes_the_answers_of_the_server_that_does_nothing(sdk):
    server = load_script("instant_server").InstantServer(2, bench.LENGTH, bench.SAMPLES, bench.TOKENS)
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-a-key"}
    far = bench.FarLoad(str(sdk / "python"), environment, "tiny", 2)
    try:
        assert far.run("train", 2, 0.1) > 0
        assert far.run("sample", 1, 0.1) > 0
    finally:
        far.close()
        server.close()
