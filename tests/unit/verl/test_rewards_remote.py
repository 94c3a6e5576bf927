"""A reward server over HTTP, against a real one in a thread."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from agentlightning.errors import ConfigError, RewardError
from agentlightning.types import Completion, Prompt
from agentlightning.verl import reward_remote
from agentlightning.verl.config import load_config
from agentlightning.verl.rewards import Rewards

PROMPTS = [Prompt("train:0", ({"role": "user", "content": "?"},), (1,), "sums", "4", {"index": 0})]
EMPTY = np.zeros(0, dtype=np.float32)
COMPLETIONS = [
    Completion(
        "train:0", i, EMPTY.astype(np.int32), EMPTY.astype(bool), EMPTY, ({"role": "assistant", "content": str(i)},), "stop", 0
    )
    for i in range(40)
]


def _right(samples):
    return 200, {"scores": [{"score": float(s["solution_str"]), "acc": 1} for s in samples]}


@pytest.fixture
def server():
    """Answers each request by `server.answers`, one after the other, the last one for ever; keeps what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append((self.path, dict(self.headers), body))
                answer = server.answers[0] if len(server.answers) == 1 else server.answers.pop(0)
            status, content = answer(body["samples"])
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.lock, server.requests, server.answers, server.release = threading.Lock(), [], [_right], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def score(monkeypatch):
    monkeypatch.setattr(reward_remote, "BACKOFF_S", 0.01)

    def score(url, *overrides, completions=COMPLETIONS):
        with Rewards.from_config(load_config([f"custom_reward_function.name={url}", *overrides])) as rewards:
            return rewards.score(PROMPTS, completions)

    return score


def test_samples_go_out_in_batches_and_scores_keep_their_order(server, score, monkeypatch):
    monkeypatch.setenv("AGL_REWARD_API_KEY", "key-of-mine")
    result = score(server.url)
    assert result.score_B.tolist() == [float(i) for i in range(40)]
    assert result.extra == {"acc": [1.0] * 40}
    assert sorted(len(body["samples"]) for _, _, body in server.requests) == [8, 16, 16]
    path, headers, _ = server.requests[0]
    assert (path, headers["Authorization"]) == ("/score", "Bearer key-of-mine")
    sample = next(sample for _, _, body in server.requests for sample in body["samples"] if sample["solution_str"] == "3")
    assert sample == {
        "data_source": "sums",
        "solution_str": "3",
        "ground_truth": "4",
        "extra_info": {
            "index": 0,
            "num_turns": 1,
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}],
        },
    }


def test_an_error_of_the_server_is_tried_again(server, score):
    server.answers = [lambda samples: (500, b"no"), lambda samples: (429, b"later"), _right]
    result = score(server.url, "reward.retries=2", completions=COMPLETIONS[:3])
    assert result.score_B.tolist() == [0.0, 1.0, 2.0]
    assert len(server.requests) == 3


def test_the_server_keeps_failing(server, score, monkeypatch):
    monkeypatch.setenv("AGL_REWARD_API_KEY", "key-of-mine")
    server.answers = [lambda samples: (503, b"you are key-of-mine")]
    with pytest.raises(RewardError) as error:
        score(server.url, "reward.retries=1", completions=COMPLETIONS[:3])
    assert "answered 503 for a batch of 3 samples, sample 0 of train:0 the first: 'you are ***'" in str(error.value)
    assert "key-of-mine" not in str(error.value)
    assert len(server.requests) == 2


def test_what_the_client_did_wrong_is_not_tried_again(server, score):
    server.answers = [lambda samples: (404, b"where?")]
    with pytest.raises(RewardError, match="answered 404"):
        score(server.url, "reward.retries=5", completions=COMPLETIONS[:1])
    assert len(server.requests) == 1


def test_a_slow_server(server, score):
    def slow(samples):
        server.release.wait(30)
        return _right(samples)

    server.answers = [slow, _right]
    result = score(server.url, "reward.timeout_s=0.2", "reward.retries=1", completions=COMPLETIONS[:2])
    assert result.score_B.tolist() == [0.0, 1.0]
    server.answers = [slow]
    with pytest.raises(RewardError, match=r"took longer than 0.2 s \(reward.timeout_s\)"):
        score(server.url, "reward.timeout_s=0.2", completions=COMPLETIONS[:2])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no json", "answered 'no json'"),
        ([1, 2], r"answered '\[1, 2\]' for .*, expected \{\"scores\": \[2 numbers\]\}"),
        ({"scores": 3}, "expected"),
        ({"scores": [1.0]}, "a list of 1 for .*, expected a list of 2 scores"),
        ({"scores": [1.0, "2"]}, "returned '2' for sample 1 of train:0, expected a finite number"),
        ({"scores": [float("nan"), 1.0]}, "returned nan for sample 0 of train:0"),
        ({"scores": [{"acc": 1}, 1.0]}, "expected a number or a dict"),
        (b"[" * 200_000, "answered"),
        (b" " * (5 << 20), "more than 4 MiB"),
    ],
)
def test_answers_that_are_no_scores(server, score, content, words):
    server.answers = [lambda samples: (200, content)]
    with pytest.raises(RewardError, match=words):
        score(server.url, completions=COMPLETIONS[:2])


def test_nobody_listens(score):
    with pytest.raises(RewardError, match="could not be reached for sample 0 of train:0: ConnectError"):
        score("http://127.0.0.1:9/score", completions=COMPLETIONS[:1])


def test_a_server_that_fails_costs_only_its_samples(server, score):
    server.answers = [lambda samples: (500, b"no") if samples[0]["solution_str"] == "16" else _right(samples)]
    result = score(server.url, "reward.on_error=mask")
    assert result.masked_B.tolist() == [False] * 16 + [True] * 16 + [False] * 8
    assert "16 of 40 samples have no reward" in result.warnings[0]


def test_a_redirect_is_not_followed(server, score):
    server.answers = [lambda samples: (302, b"")]
    with pytest.raises(RewardError, match="answered 302"):
        score(server.url, completions=COMPLETIONS[:1])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["custom_reward_function.name='http://me:secret@host/score'"], "AGL_REWARD_API_KEY"),
        (["custom_reward_function.name='http://host/score?version=2&api_key=secret'"], "AGL_REWARD_API_KEY"),
        (["custom_reward_function.name='http://'"], "custom_reward_function.name=http://host:port/path"),
        (
            ["custom_reward_function.name='http://host/'", "custom_reward_function.path=f.py"],
            "custom_reward_function.path=null",
        ),
    ],
)
def test_urls_that_are_none(overrides, words):
    with pytest.raises(ConfigError) as error:
        Rewards.from_config(load_config(overrides))
    assert words in str(error.value)
    assert "secret" not in str(error.value)


def test_a_query_without_a_secret_is_welcome():
    with Rewards.from_config(load_config(["custom_reward_function.name='http://host/score?max_tokens=5&tokenizer=a'"])):
        pass


def test_a_key_that_is_no_header(monkeypatch):
    monkeypatch.setenv("AGL_REWARD_API_KEY", "secret\n")
    with pytest.raises(ConfigError, match="AGL_REWARD_API_KEY: expected printable") as error:
        Rewards.from_config(load_config(["custom_reward_function.name='http://host/'"]))
    assert "secret" not in str(error.value)
