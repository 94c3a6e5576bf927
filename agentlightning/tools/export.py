"""`agl ckpt export`: the policy as other tools take it. A checkpoint enters; a PEFT directory or a merged model leaves.

What is exported was verified first. It is prepared under a hidden name beside its place and renamed at the end, so that a model
that is there is whole, and nothing that exists is ever written over.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint.files import fsync_directory, remove, temporary, write_new
from agentlightning.errors import CheckpointError, UserError
from agentlightning.tools.runs import sound_manifest

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
EXPORTED_FILES = tuple(f"actor/{name}" for name in ADAPTER_FILES)  # all that is read of a checkpoint
BASE_KEY = "base_model_name_or_path"
SaveDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What lies at `path` now."""

    path: str
    kind: Literal["adapter", "merged"]
    base: str | None  # the model that the adapter belongs to, or that it was merged into
    bytes: int


def export_adapter(checkpoint: Path, out: Path) -> Exported:
    """Copy the actor's adapter, byte for byte, to the new directory `out`, which `PeftModel.from_pretrained` takes."""
    contents = _adapter(checkpoint)
    with _new_directory(out) as staged:
        _write(staged, contents)
    return Exported(str(out), "adapter", _base_of(contents), _size(out))


def export_merged(checkpoint: Path, out: Path, base: str | None = None, dtype: SaveDtype = "float32") -> Exported:
    """Merge the actor's adapter into its base and save model and tokenizer in the new directory `out`.

    `base` is by default the one that the adapter names. Merging is done in float32; so is the result by default, because a
    16-bit type cannot hold most of what LoRA adds to a weight.
    """
    contents = _adapter(checkpoint)
    source = base or _base_of(contents)
    if not source:
        raise UserError(
            f"{checkpoint / 'actor' / ADAPTER_FILES[0]} names no base model; expected --base PATH, a path or hub name"
        )
    with _new_directory(out) as staged, tempfile.TemporaryDirectory() as adapter:
        _write(Path(adapter), contents)
        _merge(Path(adapter), source, staged, dtype)
    return Exported(str(out), "merged", source, _size(out))


def _adapter(checkpoint: Path) -> dict[str, Any]:
    """The verified bytes of the actor's two files by name. CheckpointError if they are not there, or not as they were saved."""
    try:
        manifest = sound_manifest(checkpoint, None)
        wanted = {relative: manifest["files"].get(relative) for relative in EXPORTED_FILES}
        if missing := [relative for relative, entry in wanted.items() if entry is None]:
            raise CheckpointError(f"it holds no {missing[0]}; expected an adapter in PEFT's layout under actor/")
        contents = manifests.verified_bytes(checkpoint, {**manifest, "files": wanted})
    except OSError as error:
        raise CheckpointError(f"{error.filename or checkpoint} cannot be read ({error.strerror})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} cannot be exported: {error}") from error
    return {Path(relative).name: data for relative, data in contents.items()}


def _base_of(contents: dict[str, Any]) -> str | None:
    config = manifests.decode_json(ADAPTER_FILES[0], bytes(contents[ADAPTER_FILES[0]]))
    return config[BASE_KEY] if isinstance(config, dict) and BASE_KEY in config else None


def _write(directory: Path, contents: dict[str, Any]) -> None:
    for name, data in contents.items():
        write_new(directory / name, data)


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A hidden directory that gets the name `out` if all goes well, and is gone otherwise."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists and is not written over; expected the name of a new directory")
    staged = temporary(out.parent, out.name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        yield staged
        fsync_directory(staged)
        staged.rename(out)
        fsync_directory(out.parent)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}: {error.filename}); expected another OUT"
        ) from error
    finally:
        with suppress(OSError):  # it has its name, or the disk does not let it go
            remove(staged)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _merge(adapter: Path, base: str, out: Path, dtype: SaveDtype) -> None:
    """Save the model at `base` with `adapter` merged in, and its tokenizer, in `out`."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(f"no base model at {base!r}: {_first_line(error)}; expected --base PATH, a path or hub name") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of (missing weights) is checked below
            peft_model = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, KeyError) as error:  # shapes or modules that the base does not have
        raise UserError(
            f"the adapter does not fit the base {base!r}: {_first_line(error)}; expected its own, --base PATH"
        ) from error
    with safe_open(adapter / ADAPTER_FILES[1], framework="pt") as file:
        strangers = set(file.keys()) ^ set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if strangers:
        raise UserError(
            f"the adapter does not fit the base {base!r}: {len(strangers)} weights are on one side only, such as "
            f"{min(strangers)}; expected its own, --base PATH"
        )
    merged: Any = peft_model.merge_and_unload(safe_merge=True)
    merged.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
