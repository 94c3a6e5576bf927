"""`agl ckpt prune`: what a run would remove at its next save. A directory and a policy enter; the names that went leave.

Only a directory that no run holds is changed; looking at what would go disturbs nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentlightning.checkpoint.lease import Lease
from agentlightning.checkpoint.retention import RetentionPolicy, prune
from agentlightning.errors import CheckpointError
from agentlightning.tools.listing import list_checkpoints


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, or with `dry_run` would go."""

    run: str
    dry_run: bool
    policy: RetentionPolicy
    gone: tuple[str, ...]
    bytes: int  # that they hold


def prune_run(root: Path, policy: RetentionPolicy, dry_run: bool) -> Pruned:
    """Apply `policy`; CheckpointError if a run holds the directory, or the file system refuses."""
    sizes = {row.name: row.bytes or 0 for row in list_checkpoints(root, policy).rows}
    try:
        if dry_run:
            gone = prune(root, policy, None, dry_run=True)
        else:
            with Lease(root):
                gone = prune(root, policy, None)
    except OSError as error:
        raise CheckpointError(
            f"the run directory {root} cannot be pruned ({error.strerror or error}: {error.filename}); what is half removed "
            "goes away at the next start of its run"
        ) from error
    return Pruned(str(root), dry_run, policy, tuple(gone), sum(sizes[name] for name in gone if name in sizes))
