"""A server that answers the tinker SDK at once and does nothing: what is left of a step is the SDK's own work.

For bench_serve.py. Answers are made once, in the sizes that a real server's have, and it runs in a thread.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from agentlightning.tinker.server import wire
from agentlightning.tinker.types import ForwardBackwardOutput, SampledSequence, SampleResponse, TensorData

MODEL = "session:train:0"
_INFO = {"model_id": MODEL, "is_lora": True, "lora_rank": 8, "model_name": "tiny", "model_data": {"model_name": "tiny"}}


class InstantServer:
    """`url`, then `close`. Answers are for steps of `data` data of `length` tokens, and for `samples` of `tokens` tokens."""

    def __init__(self, data: int, length: int, samples: int, tokens: int) -> None:
        logprobs = TensorData(np.zeros(length, np.float32), "float32")
        trained = ForwardBackwardOutput("stub", [{"logprobs": logprobs}] * data, {"loss:sum": 0.0})
        sampled = SampleResponse([SampledSequence("length", [32] * tokens, [-1.0] * tokens)] * samples)
        results = {
            "create_model": {"type": "create_model", "model_id": MODEL},
            "forward_backward": wire.encode_forward_backward(trained),
            "optim_step": {"metrics": {}, "type": "optim_step"},
            "asample": wire.encode_sample(sampled),
        }
        replies: dict[str, dict[str, object]] = {kind: {"request_id": kind, "model_id": MODEL} for kind in results}
        replies["asample"]["sample_sequence_ids"] = [f"sequence-{i}" for i in range(samples)]
        replies["create_session"] = {"type": "create_session", "session_id": "session"}
        replies["get_info"] = {"type": "get_info", **_INFO}
        replies["create_sampling_session"] = {"type": "create_sampling_session", "sampling_session_id": "session:sample:0"}
        replies["session_heartbeat"] = {"type": "session_heartbeat"}
        replies["telemetry"] = {"status": "accepted"}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(replies, results))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()


def _handler(
    replies: Mapping[str, Mapping[str, object]], results: Mapping[str, Mapping[str, object] | bytes]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            name = self.path.rpartition("/")[2]
            answer = results[json.loads(body)["request_id"]] if name == "retrieve_future" else replies.get(name, {})
            media, raw = (wire.CONTENT_TYPE, answer) if isinstance(answer, bytes) else ("application/json", _raw(answer))
            self.send_response(200)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    return Handler


def _raw(answer: Mapping[str, object]) -> bytes:
    return json.dumps(answer).encode()
