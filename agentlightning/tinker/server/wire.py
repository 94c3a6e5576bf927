"""The three protobuf messages of the Tinker wire. Bytes enter and leave as the plain types of `tinker/types.py`.

The schema (package tinker_public, proto3) is built here from a table and kept in a pool of its own, so that it does not collide
with the SDK's when both are imported. Fields that we neither read nor write are left out: protobuf skips them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from agentlightning.errors import UserError
from agentlightning.tinker.types import (
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ModelInput,
    SampledSequence,
    SampleResponse,
    TensorData,
)

CONTENT_TYPE = "application/x-protobuf"
_PACKAGE = "tinker_public"
_FLOAT32, _INT64, _INT32, _BFLOAT16 = 1, 2, 3, 4
_NUMPY: dict[int, type[np.generic]] = {_FLOAT32: np.float32, _INT64: np.int64, _INT32: np.int32, _BFLOAT16: np.uint16}
_STOP_REASONS = {"stop": 0, "length": 1}
_NO_LOGPROB = -99999.0  # with token 0: an empty place in a matrix of the most likely tokens
_MAX_CELLS = 1 << 28  # of one dense tensor made from a sparse one: a few bytes must not ask for all memory

# message -> (field, number, type); "repeated T", "map<string,T>", or "T" with "/name" for a member of that oneof
_MESSAGES: dict[str, tuple[tuple[str, int, str], ...]] = {
    "SparseCsr": (("values", 1, "bytes"), ("crow_indices", 2, "bytes"), ("col_indices", 3, "bytes")),
    "Tensor": (
        ("dense", 1, "bytes/encoding"),
        ("sparse_csr", 2, "SparseCsr/encoding"),
        ("dtype", 3, "int32"),  # an enum: the same on the wire
        ("shape", 4, "repeated int64"),
    ),
    "EncodedTextChunk": (("tokens", 1, "bytes"),),
    "OtherChunk": (),
    "Chunk": (("encoded_text", 1, "EncodedTextChunk/chunk"), ("image", 2, "OtherChunk/chunk"), ("dmel", 3, "OtherChunk/chunk")),
    "Datum": (("model_input", 1, "repeated Chunk"), ("loss_fn_inputs", 2, "map<string,Tensor>")),
    "LossConfigValue": (("number", 1, "double/value"), ("text", 2, "string/value")),
    "ForwardBackwardRequest": (
        ("model_id", 1, "string"),
        ("seq_id", 2, "int32"),
        ("data", 3, "repeated Datum"),
        ("loss_fn", 4, "string"),
        ("loss_fn_config", 5, "map<string,double>"),
        ("forward_only", 6, "bool"),
        ("loss_fn_config_v2", 7, "map<string,LossConfigValue>"),
    ),
    "BatchedTensor": (
        ("data", 1, "bytes"),
        ("offsets", 2, "bytes"),
        ("dtype", 3, "int32"),
        ("trailing_shape", 4, "repeated int64"),
    ),
    "ArrayRecord": (("type_tag", 1, "string"), ("fields", 2, "map<string,BatchedTensor>"), ("num_datums", 3, "int64")),
    "ForwardBackwardOutput": (
        ("loss_fn_output_type", 1, "string"),
        ("loss_fn_outputs", 2, "repeated ArrayRecord"),
        ("metrics", 3, "map<string,double>"),
    ),
    "TopkLogprobs": (("token_ids", 1, "bytes"), ("logprobs", 2, "bytes"), ("k", 3, "uint32"), ("length", 4, "uint32")),
    "SampledSequence": (
        ("stop_reason", 1, "int32"),
        ("tokens", 2, "bytes"),
        ("logprobs", 3, "bytes"),
        ("topk_sampled_logprobs", 4, "TopkLogprobs"),
    ),
    "PromptAltTokens": (("tokens", 1, "Tensor"), ("logprobs", 2, "Tensor")),
    "SampleResponse": (
        ("sequences", 1, "repeated SampledSequence"),
        ("prompt_logprobs", 2, "bytes"),
        ("topk_prompt_logprobs", 3, "TopkLogprobs"),
        ("target_prompt_logprobs", 5, "Tensor"),
        ("prompt_alt_tokens", 6, "PromptAltTokens"),
    ),
}
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bytes": _Field.TYPE_BYTES,
    "string": _Field.TYPE_STRING,
    "double": _Field.TYPE_DOUBLE,
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "uint32": _Field.TYPE_UINT32,
    "int64": _Field.TYPE_INT64,
}


@dataclass(frozen=True, slots=True)
class ForwardBackwardRequest:
    """What one forward_backward asks for."""

    model_id: str
    seq_id: int
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None
    forward_only: bool


# ---- the schema


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


def _add_field(message: Any, name: str, number: int, kind: str) -> None:
    kind, _, oneof = kind.partition("/")
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind.startswith("repeated "):
        field.label, kind = _Field.LABEL_REPEATED, kind.removeprefix("repeated ")
    if kind.startswith("map<string,"):  # a map is a repeated message of key and value
        entry = message.nested_type.add(name="".join(word.title() for word in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _set_type(entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL), "string")
        _set_type(entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL), kind[len("map<string,") : -1])
        field.label, kind = _Field.LABEL_REPEATED, f"{message.name}.{entry.name}"
    if oneof:
        if oneof not in [declared.name for declared in message.oneof_decl]:
            message.oneof_decl.add(name=oneof)
        field.oneof_index = 0  # none of the messages has two
    _set_type(field, kind)


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="agentlightning/tinker_public.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, *field)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES}


_HEAD = re.compile(rb"\x0a([\x80-\xff]?[\x00-\x7f])", re.DOTALL)  # field 1, length-delimited
_NUMBER = re.compile(rb"\x10([\x80-\xff]{0,3}[\x00-\x7f]|[\x80-\xff]{4}[\x00-\x07])", re.DOTALL)  # field 2, a varint of 31 bits
MESSAGES = _classes()  # name -> class, for tests too


# ---- requests


def parse_forward_backward(raw: bytes) -> Any:
    """The message itself. UserError if the bytes are none."""
    message = MESSAGES["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise UserError(f"the body is no ForwardBackwardRequest ({error}); expected protobuf of the tinker SDK") from error
    return message


def numbered_head(raw: bytes) -> tuple[str, int] | None:
    """The model and the number that a ForwardBackwardRequest begins with, whatever comes behind; None if they are not there."""
    match = _HEAD.match(raw)
    if match is None:
        return None
    size, start = _varint(match[1]), match.end()
    number = _NUMBER.match(raw, start + size)
    if number is None or _varint(number[1]) < 1 or not raw[start : start + size].isascii():
        return None
    return raw[start : start + size].decode(), _varint(number[1])


def _varint(digits: bytes) -> int:
    return sum((digit & 0x7F) << 7 * place for place, digit in enumerate(digits))


def decode_forward_backward(raw: bytes) -> ForwardBackwardRequest:
    """UserError for what is malformed: bytes, tensors whose data do not fill their shape, images."""
    message = parse_forward_backward(raw)
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    data = [_datum(index, datum) for index, datum in enumerate(message.data)]
    return ForwardBackwardRequest(message.model_id, message.seq_id, data, message.loss_fn, config or None, message.forward_only)


def _datum(index: int, message: Any) -> Datum:
    chunks = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(f"datum {index} holds a chunk of {kind}; expected encoded_text: this base reads tokens alone")
        chunks.append(EncodedTextChunk(_array(f"datum {index}: tokens", chunk.encoded_text.tokens, np.int32).tolist()))
    inputs = {name: _tensor(f"datum {index}: {name}", tensor) for name, tensor in message.loss_fn_inputs.items()}
    return Datum(ModelInput(chunks), inputs)


def _array(what: str, data: bytes, dtype: type[np.generic]) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise UserError(f"{what} has {len(data)} bytes; expected a multiple of {size}, for {np.dtype(dtype).name}")
    return np.frombuffer(data, dtype)


def _tensor(what: str, message: Any) -> TensorData:
    if message.dtype not in _NUMPY:
        raise UserError(f"{what} has dtype {message.dtype}; expected float32, int64, int32 or bfloat16")
    sparse = message.WhichOneof("encoding") == "sparse_csr"
    values = _array(what, message.sparse_csr.values if sparse else message.dense, _NUMPY[message.dtype])
    if message.dtype == _BFLOAT16:  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    shape = tuple(message.shape) or (values.size,)
    if sparse:
        values = _dense(what, message.sparse_csr, values, shape)
    if any(size < 0 for size in shape) or values.size != int(np.prod(shape, dtype=np.float64)):
        raise UserError(f"{what} has {values.size} values; expected as many as its shape {list(shape)} holds")
    return TensorData(values.reshape(shape), "int64" if values.dtype.kind == "i" else "float32")


def _dense(what: str, csr: Any, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = (_array(what, data, np.int64) for data in (csr.crow_indices, csr.col_indices))
    fits = len(shape) == 2 and min(shape) >= 0 and shape[0] * shape[1] <= _MAX_CELLS
    if not fits or rows.size != shape[0] + 1 or columns.size != values.size:
        raise UserError(f"{what} is sparse with shape {list(shape)}; expected CSR of two dimensions that fits it")
    counts = np.diff(rows)
    inside = columns.size == 0 or (columns.min() >= 0 and columns.max() < shape[1])
    if rows[0] != 0 or rows[-1] != values.size or (counts < 0).any() or not inside:
        raise UserError(f"{what} is sparse with indices outside its shape {list(shape)}")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


# ---- results


def encode_forward_backward(output: ForwardBackwardOutput) -> bytes:
    """One record a run of data that have the same fields, types and trailing shapes: a batched tensor must be rectangular."""
    message = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type=output.loss_fn_output_type)
    for name, value in output.metrics.items():
        message.metrics[name] = value
    start = 0
    outputs = output.loss_fn_outputs
    for end in range(1, len(outputs) + 1):
        if end == len(outputs) or _form(outputs[end]) != _form(outputs[start]):
            _add_record(message, output.loss_fn_output_type, outputs[start:end])
            start = end
    return message.SerializeToString(deterministic=True)


def _form(fields: Mapping[str, TensorData]) -> list[tuple[str, str, tuple[int, ...]]]:
    return sorted((name, tensor.dtype, tensor.array.shape[1:]) for name, tensor in fields.items())


def _add_record(message: Any, tag: str, outputs: Sequence[Mapping[str, TensorData]]) -> None:
    record = message.loss_fn_outputs.add(type_tag=tag, num_datums=len(outputs))
    for name, first in outputs[0].items():
        pieces = [fields[name].array.tobytes() for fields in outputs]
        batched = record.fields[name]
        batched.data = b"".join(pieces)
        batched.offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64).tobytes()
        batched.dtype = _FLOAT32 if first.dtype == "float32" else _INT64
        batched.trailing_shape.extend(first.array.shape[1:])


def encode_sample(response: SampleResponse) -> bytes:
    """A log-probability that is None leaves as NaN."""
    message = MESSAGES["SampleResponse"]()
    for sequence in response.sequences:
        message.sequences.append(_sequence(sequence))
    if response.prompt_logprobs is not None:
        values = [np.nan if value is None else value for value in response.prompt_logprobs]
        message.prompt_logprobs = np.asarray(values, np.float32).tobytes()
    if response.topk_prompt_logprobs is not None:
        _set_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs)
    if response.target_prompt_logprobs is not None:
        _set_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
    if response.prompt_alt_tokens is not None:
        _set_tensor(message.prompt_alt_tokens.tokens, response.prompt_alt_tokens.tokens)
        _set_tensor(message.prompt_alt_tokens.logprobs, response.prompt_alt_tokens.logprobs)
    return message.SerializeToString(deterministic=True)


def _sequence(sequence: SampledSequence) -> Any:
    message = MESSAGES["SampledSequence"](stop_reason=_STOP_REASONS[sequence.stop_reason])
    message.tokens = np.asarray(sequence.tokens, np.int32).tobytes()
    if sequence.logprobs is not None:
        message.logprobs = np.asarray(sequence.logprobs, np.float32).tobytes()
    if sequence.topk_logprobs is not None:
        _set_topk(message.topk_sampled_logprobs, sequence.topk_logprobs)
    return message


def _set_tensor(message: Any, tensor: TensorData) -> None:
    message.dtype = _FLOAT32 if tensor.dtype == "float32" else _INT64
    message.shape.extend(tensor.shape)
    if tensor.sparse_crow_indices is None:
        message.dense = tensor.array.tobytes()
    else:
        message.sparse_csr.values = tensor.array.tobytes()
        message.sparse_csr.crow_indices = np.asarray(tensor.sparse_crow_indices, np.int64).tobytes()
        message.sparse_csr.col_indices = np.asarray(tensor.sparse_col_indices, np.int64).tobytes()


def _set_topk(message: Any, rows: Sequence[Sequence[tuple[int, float]] | None]) -> None:
    k = max((len(row) for row in rows if row is not None), default=0)
    token_ids, logprobs = np.zeros((len(rows), k), np.int32), np.full((len(rows), k), _NO_LOGPROB, np.float32)
    for i, row in enumerate(rows):
        for j, (token, logprob) in enumerate(row or ()):
            token_ids[i, j], logprobs[i, j] = token, logprob
    message.token_ids, message.logprobs, message.k, message.length = token_ids.tobytes(), logprobs.tobytes(), k, len(rows)
