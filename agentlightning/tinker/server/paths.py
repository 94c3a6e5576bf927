"""`tinker://` paths and the names in them. Text from outside enters; what leaves cannot point out of its root.

A path has three segments: `tinker://<run>/<weights|sampler_weights|external_weights>/<name>`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from agentlightning.errors import UserError

SCHEME = "tinker://"
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}")


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """Example: `tinker://0123:train:0/weights/final`."""

    model_id: str
    kind: str  # a key of KINDS
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.model_id}/{self.kind}/{self.name}"


def check_name(name: str | None) -> str:
    """One segment that is safe as a directory's name. UserError else."""
    if name is None or not _NAME.fullmatch(name):
        raise UserError(
            f"the checkpoint's name is {str(name)[:100]!r}; expected one segment of letters, digits and _ . = + -, "
            "at most 200, not beginning with a dot: give another name"
        )
    return name


def parse_path(text: str) -> TinkerPath:
    """UserError if it is not a path of three segments with a known kind."""
    parts = text.removeprefix(SCHEME).split("/")
    if not text.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS or not parts[0]:
        raise UserError(f"the path is {text[:200]!r}; expected {SCHEME}<run>/<{'|'.join(KINDS)}>/<name>")
    return TinkerPath(parts[0], parts[1], check_name(parts[2]))


def folder_of(model_id: str) -> str:
    """The directory of a model below `models/`. Its id is ours: a session's hex digits, `:train:`, a number."""
    return model_id.replace(":", "-")


def inside(root: Path, relative: str) -> Path:
    """`root / relative`. UserError if that is not a place below `root`."""
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()) or path == root.resolve():
        raise UserError(f"the file is {relative[:200]!r}; expected one inside the checkpoint")
    return path
