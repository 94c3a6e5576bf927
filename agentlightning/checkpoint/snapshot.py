"""The blocking half of a save: live tensors enter, a host buffer that is laid out as the files will be leaves.

The copy is all that a training step waits for. The buffer is made, and its pages touched, at the first copy, so that later ones
are a plain memory copy; on a GPU it is pinned, so that the copy runs at the bus's speed. Writing it is `write`, which any
thread may do later, while the tensors train on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agentlightning.checkpoint.layout import Layout
from agentlightning.checkpoint.manifest import FileEntry, check_relative, write_file

Tensors = Mapping[str, Any]  # name -> torch.Tensor on any device; this room imports torch only where it copies


class HostSnapshot:
    """One buffer for the tensors of one checkpoint, or of one worker's share of it.

    Example: `snapshot.copy_from({"actor/adapter_model.safetensors": parameters})`, and then, behind the next step,
    `snapshot.write(staging, "xxh3_128")`.
    """

    def __init__(self) -> None:
        self._layouts: dict[str, Layout] = {}
        self._shapes: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...]]]] = {}
        self._buffers: dict[str, np.ndarray] = {}
        self._targets: list[Any] = []  # views of the buffers as tensors
        self._pinned = False

    @property
    def bytes(self) -> int:
        """Bytes of the files."""
        return sum(layout.size for layout in self._layouts.values())

    def copy_from(self, files: Mapping[str, Tensors]) -> None:
        """Take the present values of `files` (relative path -> name -> tensor, of types that numpy has).

        Blocks until they are all in the buffer. The buffer is made anew only if names, types or shapes are not as before.
        """
        import torch

        sources = [tensor for tensors in files.values() for tensor in tensors.values()]
        shapes = {relative: {name: _plain(tensor) for name, tensor in tensors.items()} for relative, tensors in files.items()}
        on_gpu = any(source.is_cuda for source in sources)
        if shapes != self._shapes or on_gpu != self._pinned:
            self._allocate(shapes, on_gpu)
        if not sources:  # more writers than there is to write
            return
        # One call for all tensors: thousands of small ones would otherwise cost more in Python than in bytes.
        with torch.no_grad():
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage] - optimizers and FSDP use it, there is no other
                self._targets, sources, non_blocking=on_gpu
            )
        if on_gpu:
            torch.cuda.synchronize()

    def write(self, staging: Path, algorithm: str) -> dict[str, FileEntry]:
        """Write the files below `staging`, durably; returns size and digest of each. The buffer must not change meanwhile."""
        entries: dict[str, FileEntry] = {}
        for relative, buffer in self._buffers.items():
            path = staging / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            entries[relative] = write_file(path, [buffer.data], algorithm)
        return entries

    def files(self) -> Mapping[str, np.ndarray]:
        """The bytes of each file (uint8), for whoever writes them elsewhere."""
        return self._buffers

    def _allocate(self, shapes: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...]]]], pinned: bool) -> None:
        import torch

        # The old buffer first: two of them at once may be what does not fit.
        self._targets, self._buffers, self._layouts = [], {}, {}
        self._shapes, self._pinned = shapes, pinned
        for relative, tensors in shapes.items():
            layout = Layout.of(tensors)
            # numpy asks for huge pages, which torch does not: with them a copy was faster in some runs and never slower.
            whole = (
                torch.empty(layout.size, dtype=torch.uint8, pin_memory=True).numpy() if pinned else np.empty(layout.size, "u1")
            )
            whole.fill(0)
            whole[: len(layout.header)] = np.frombuffer(layout.header, np.uint8)
            self._layouts[check_relative(relative)], self._buffers[relative] = layout, whole
            self._targets += [torch.from_numpy(layout.slots[name].view(whole)) for name in tensors]


def _plain(tensor: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """numpy's type, and the shape."""
    return _numpy_type(tensor.dtype), tuple(tensor.shape)


@functools.cache
def _numpy_type(dtype: Any) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))
