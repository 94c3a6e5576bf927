"""An engine without a model, for what the clients promise: it writes down what it is asked, and can be held up."""

import json
import threading
from dataclasses import dataclass, field

import numpy as np

from agentlightning.errors import UserError
from agentlightning.tinker.engine_api import BaseModelInfo
from agentlightning.tinker.engine_saved import STATE_FILE, SavedModel
from agentlightning.tinker.types import (
    ForwardBackwardOutput,
    SampledSequence,
    SampleResponse,
    TensorData,
)


@dataclass
class WritingEngine:
    """A model is (lora, steps). A datum's log-probability at each position is -1; the gradient is not kept."""

    calls: list[tuple] = field(default_factory=list)
    models: dict[str, list] = field(default_factory=dict)
    samplers: dict[str, object] = field(default_factory=dict)
    go_on: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)  # a call waits for `go_on`
    closed: bool = False

    def base_model(self):
        return BaseModelInfo("toy", "toy", "/toy", 64)

    def create_model(self, model_id, lora):
        self.models[model_id] = [lora, 0]

    def forward_backward(self, model_id, data, loss_fn, loss_fn_config=None, forward_only=False):
        if loss_fn == "wait":
            self.entered.set()
            assert self.go_on.wait(30)
        if loss_fn == "unknown":
            raise UserError("loss_fn='unknown'")
        self.calls.append(("forward" if forward_only else "forward_backward", loss_fn, data))
        outputs = [{"logprobs": TensorData(np.full(d.loss_fn_inputs["target_tokens"].shape, -1.0), "float32")} for d in data]
        return ForwardBackwardOutput("toy", outputs, {"loss:sum": float(len(data))})

    def optim_step(self, model_id, adam):
        self.models[model_id][1] += 1
        self.calls.append(("optim_step", adam.learning_rate))
        return {"grad_norm:mean": 0.0}

    def save_state(self, model_id, directory):
        lora, steps = self.models[model_id]
        directory.mkdir()  # like the store: the directory above is there, and the name is new
        (directory / STATE_FILE).write_text(json.dumps(SavedModel("toy", "digest", lora, steps, 0).json()))
        directory.with_name(directory.name + ".pt").write_text("record")
        return 1

    save_sampler = save_state

    def load_state(self, model_id, directory, optimizer):
        self.calls.append(("load_state", str(directory), optimizer))

    def add_sampler(self, sampler_id, source):
        self.samplers[sampler_id] = source

    def drop_sampler(self, sampler_id):
        del self.samplers[sampler_id]

    def sample(self, requests):
        self.calls.append(("sample", [request.stream for request in requests]))
        if any(request.prompt.to_ints() == [13] for request in requests):
            raise UserError("an unlucky token")
        assert all(request.sampler_id in self.samplers for request in requests)
        return [self._response(request) for request in requests]

    def _response(self, request):
        tokens = request.prompt.to_ints()
        prompt_logprobs = [None, *[-0.5] * (len(tokens) - 1)] if request.prompt_logprobs else None
        return SampleResponse([SampledSequence("stop", tokens, [-1.0] * len(tokens))] * request.num_samples, prompt_logprobs)

    def close(self):
        self.closed = True

    @property
    def names(self):
        return [call[0] for call in self.calls]
