"""`agl ckpt prune`: what a run would remove at its next save. A directory or URL and a policy enter; the names that went leave.

Only a run directory that no run holds is changed; looking at what would go disturbs nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentlightning.checkpoint.lease import Lease
from agentlightning.checkpoint.retention import RetentionPolicy, prune
from agentlightning.errors import CheckpointError
from agentlightning.tools.listing import list_checkpoints
from agentlightning.tools.remote import RemoteRun


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
    sizes = _sizes(root, policy)
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


def prune_remote(run: RemoteRun, policy: RetentionPolicy, dry_run: bool) -> Pruned:
    """Apply `policy` at a URL that was looked at; CheckpointError if a run holds it, or the server refuses.

    What goes is chosen while nobody else can save there. Records go first; what is half removed is known by its marker, and
    goes away at the next start of its run.
    """
    if dry_run:
        gone = prune(run.root, policy, None, dry_run=True)
    else:
        with run.held() as mirror:
            run.look()
            wanted = prune(run.root, policy, None, dry_run=True)
            mirror.discard(wanted)
            gone = run.gone(wanted)  # the mirror keeps the newest by its name, whatever step its record tells
    sizes = _sizes(run.root, policy)
    return Pruned(run.url, dry_run, policy, tuple(gone), sum(sizes[name] for name in gone if name in sizes))


def _sizes(root: Path, policy: RetentionPolicy) -> dict[str, int]:
    return {row.name: row.bytes or 0 for row in list_checkpoints(root, policy).rows}
