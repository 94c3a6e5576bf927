"""The store: state in, a directory that survives anything out. It knows arrays and JSON, no trainer, no ray, no config.

`CheckpointManager` is for a run; `save`, `load`, `find_valid` and `resolve` are for one checkpoint.
Importing this does not import torch.
"""

from agentlightning.checkpoint.fingerprint import compare_fingerprints
from agentlightning.checkpoint.lease import Lease, LeaseLostError
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.record import CheckpointRecord, read_record, write_record
from agentlightning.checkpoint.retention import RetentionPolicy, set_aside
from agentlightning.checkpoint.store import CheckpointFiles, LoadedCheckpoint, SavedCheckpoint, find_valid, load, resolve, save

__all__ = [
    "CheckpointFiles",
    "CheckpointManager",
    "CheckpointRecord",
    "Lease",
    "LeaseLostError",
    "LoadedCheckpoint",
    "RetentionPolicy",
    "SavedCheckpoint",
    "compare_fingerprints",
    "find_valid",
    "load",
    "read_record",
    "resolve",
    "save",
    "set_aside",
    "write_record",
]
