"""Where each tensor lies in a safetensors file. Names, dtypes and shapes enter; a header and offsets leave, and back.

The library reads and writes whole files from and to objects of its own. A save that must block for one copy only needs the file
laid out beforehand, and a load that must not copy needs views of the bytes that were verified; that is all this module does.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data without gaps).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentlightning.errors import CheckpointError

# The format's names of the types that numpy has. bfloat16, which it has not, is never trained here: adapters are float32.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a file: its type and shape, and the byte where it begins, counted from the beginning of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    def view(self, buffer: np.ndarray) -> np.ndarray:
        """The tensor in a uint8 buffer that holds the file; shares its memory."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """A safetensors file before its tensors are in it."""

    header: bytes  # length and JSON, padded: the data begins behind it
    slots: Mapping[str, Slot]
    size: int  # bytes of the whole file

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> Layout:
        """The layout of these types and shapes, by name. ValueError for a type that the format or numpy does not have."""
        # Wider types first, as the library does it: then every tensor is aligned.
        order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
        table: dict[str, Any] = {_METADATA: {"format": "pt"}}
        slots: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
        at = 0
        for name in order:
            dtype, shape = tensors[name]
            if dtype not in _NAMES or name == _METADATA:
                raise ValueError(f"tensor {name!r} of type {dtype} cannot be kept; expected one of {', '.join(DTYPES)}")
            size = math.prod(shape) * dtype.itemsize
            table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            slots.append((name, dtype, shape, at))
            at += size
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        return cls(
            header, {name: Slot(dtype, shape, len(header) + start) for name, dtype, shape, start in slots}, len(header) + at
        )


def views(relative: str, buffer: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors in the uint8 bytes of a safetensors file, without copies. CheckpointError if it is none.

    The bytes were written by whoever made the manifest, so nothing in them is believed: types, shapes and offsets must fit.
    """
    try:
        length = int.from_bytes(bytes(buffer[:_LENGTH_BYTES]), "little")
        data = _LENGTH_BYTES + length
        if len(buffer) < _LENGTH_BYTES or data > len(buffer):
            raise ValueError(f"a header of {length} bytes in a file of {len(buffer)}")
        table = json.loads(bytes(buffer[_LENGTH_BYTES:data]))
        entries = {name: entry for name, entry in table.items() if name != _METADATA}
        spans = [_span(entry, len(buffer) - data) for entry in entries.values()]
        at = 0
        for start, stop in sorted(spans):
            if start != at:
                raise ValueError(f"the tensors leave a gap or overlap at byte {at} of the data")
            at = stop
        if at != len(buffer) - data:
            raise ValueError(f"{len(buffer) - data - at} bytes belong to no tensor")
        return {
            name: Slot(DTYPES[entry["dtype"]], tuple(entry["shape"]), data + start).view(buffer)
            for (name, entry), (start, _) in zip(entries.items(), spans, strict=True)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{relative} is no safetensors file of numpy arrays ({error})") from error


def _span(entry: Mapping[str, Any], available: int) -> tuple[int, int]:
    """Begin and end of a tensor's bytes. ValueError, KeyError or TypeError if they do not fit its type and shape."""
    start, stop = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"offsets {start}, {stop} and shape {shape} are not all whole numbers")
    if stop > available or stop - start != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"{stop - start} bytes at {start} for {entry['dtype']} {shape}")
    return start, stop
