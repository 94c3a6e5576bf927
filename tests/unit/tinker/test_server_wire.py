"""The protobuf of the wire, against bytes written by hand and numpy."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from agentlightning.errors import UserError
from agentlightning.tinker.server.wire import (
    MESSAGES,
    decode_forward_backward,
    encode_forward_backward,
    encode_sample,
    numbered_head,
)
from agentlightning.tinker.types import ForwardBackwardOutput, SampledSequence, SampleResponse, TensorData


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field, shorter than 128 bytes, as protobuf's encoding page has it."""
    return bytes([number << 3 | 2, len(data)]) + data


def varint(number: int, value: int) -> bytes:
    return bytes([number << 3, value])


def request(tensor: bytes, tokens: bytes = struct.pack("<3i", 5, 6, 7)) -> bytes:
    chunk = field(1, field(1, tokens))
    return (
        field(1, b"m")
        + varint(2, 9)
        + field(3, field(1, chunk) + field(2, field(1, b"x") + field(2, tensor)))
        + field(4, b"ppo")
    )


def test_a_request_is_read_from_its_bytes():
    dense = field(1, struct.pack("<3f", 0.5, 1.5, -2.0)) + varint(3, 1) + field(4, bytes([3]))
    number = field(7, field(1, b"clip") + field(2, b"\x09" + struct.pack("<d", 0.2)))
    text = field(7, field(1, b"mode") + field(2, field(2, b"fast")))
    read = decode_forward_backward(request(dense) + varint(6, 1) + number + text)
    assert (read.model_id, read.seq_id, read.loss_fn, read.forward_only) == ("m", 9, "ppo", True)
    assert read.loss_fn_config == {"clip": 0.2, "mode": "fast"}
    (datum,) = read.data
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["x"].dtype == "float32"
    assert datum.loss_fn_inputs["x"].tolist() == [0.5, 1.5, -2.0]


@pytest.mark.parametrize("number", [1, 127, 128, 70_000, (1 << 31) - 1])
@pytest.mark.parametrize("name", ["m", "s" * 200 + ":train:0"])
def test_the_head_of_a_request_is_read_without_the_rest(name: str, number: int):
    raw = MESSAGES["ForwardBackwardRequest"](model_id=name, seq_id=number, loss_fn="ppo").SerializeToString()
    assert numbered_head(raw[:-2]) == (name, number)


@pytest.mark.parametrize(
    "raw", [b"", b"\x0a", b"\x0a\x05m", b"\x10\x01", b"\x0a\x01m\x10\x00", b"\x0a\x01\xff\x10\x01", b"xxxx"]
)
def test_what_has_no_head_has_no_number(raw: bytes):
    assert numbered_head(raw) is None


def test_a_sparse_tensor_becomes_dense():
    csr = field(1, struct.pack("<3q", 7, 8, 9)) + field(2, struct.pack("<3q", 0, 1, 3)) + field(3, struct.pack("<3q", 1, 0, 2))
    read = decode_forward_backward(request(field(2, csr) + varint(3, 2) + field(4, bytes([2, 3]))))
    assert read.data[0].loss_fn_inputs["x"].tolist() == [[0, 7, 0], [8, 0, 9]]


def test_bfloat16_and_int32_are_widened():
    half = np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16
    read = decode_forward_backward(request(field(1, half.astype("<u2").tobytes()) + varint(3, 4) + field(4, bytes([2]))))
    assert read.data[0].loss_fn_inputs["x"].tolist() == [1.5, -2.0]
    read = decode_forward_backward(request(field(1, struct.pack("<2i", 3, -4)) + varint(3, 3) + field(4, bytes([2]))))
    assert read.data[0].loss_fn_inputs["x"].dtype == "int64"
    assert read.data[0].loss_fn_inputs["x"].tolist() == [3, -4]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\xff\xff", "no ForwardBackwardRequest"),
        (request(field(1, b"12345") + varint(3, 1)), "multiple of 4"),
        (request(field(1, b"1234") + varint(3, 9)), "dtype 9"),
        (request(field(1, b"1234") + varint(3, 1) + field(4, bytes([2]))), "its shape"),
        (request(b"", tokens=b"123"), "multiple of 4"),
        (request(field(2, field(2, struct.pack("<2q", 0, 5))) + varint(3, 2) + field(4, bytes([1, 3]))), "outside its shape"),
        (request(field(2, field(2, struct.pack("<2q", 0, 0))) + varint(3, 2) + field(4, b"\xff\xff\xff\xff\x07\x01")), "CSR"),
        (field(3, field(1, field(2, b""))), "chunk of image"),
    ],
)
def test_what_is_malformed_is_said(raw: bytes, words: str):
    with pytest.raises(UserError, match=words):
        decode_forward_backward(raw)


def test_outputs_of_different_shapes_leave_in_records_of_their_own():
    outputs = [
        {"logprobs": TensorData([1.0, 2.0], "float32")},
        {"logprobs": TensorData([3.0], "float32")},
        {"logprobs": TensorData(np.ones((2, 3)), "float32")},
    ]
    raw = encode_forward_backward(ForwardBackwardOutput("T", outputs, {"loss:sum": 2.5}))
    message = MESSAGES["ForwardBackwardOutput"].FromString(raw)
    assert dict(message.metrics) == {"loss:sum": 2.5}
    assert [record.num_datums for record in message.loss_fn_outputs] == [2, 1]
    first, second = (record.fields["logprobs"] for record in message.loss_fn_outputs)
    assert np.frombuffer(first.data, "<f4").tolist() == [1, 2, 3]
    assert np.frombuffer(first.offsets, "<i8").tolist() == [0, 8, 12]  # bytes
    assert list(second.trailing_shape) == [3]


def test_a_sample_leaves_with_nan_for_none():
    sequence = SampledSequence("length", [4, 5], [-0.5, -1.0])
    raw = encode_sample(SampleResponse([sequence], [None, -2.0], [None, [(7, -0.25), (8, -3.0)]]))
    message = MESSAGES["SampleResponse"].FromString(raw)
    assert message.sequences[0].stop_reason == 1
    assert np.frombuffer(message.sequences[0].tokens, "<i4").tolist() == [4, 5]
    prompt = np.frombuffer(message.prompt_logprobs, "<f4")
    assert np.isnan(prompt[0])
    assert prompt[1] == -2.0
    topk = message.topk_prompt_logprobs
    assert (topk.k, topk.length) == (2, 2)
    assert np.frombuffer(topk.token_ids, "<i4").tolist() == [0, 0, 7, 8]
    assert np.frombuffer(topk.logprobs, "<f4").tolist() == [-99999.0, -99999.0, -0.25, -3.0]
