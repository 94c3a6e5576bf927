"""Runs at URLs as the manager leaves them, and what lies there."""

from __future__ import annotations

from pathlib import Path

import fsspec

from agentlightning.checkpoint.record import list_records
from agentlightning.checkpoint.remote import SMALL_FILES, Mirror

BUCKET = "runs"


def push(root: Path, url: str) -> str:
    """Put a run at a URL, as its manager does; returns the URL."""
    with Mirror(url, root) as mirror:
        for _, record in reversed(list_records(root)[0]):
            mirror.push(record.name, SMALL_FILES)
        mirror.push_files(SMALL_FILES)
    return url


def objects(url: str) -> dict[str, bytes]:
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return {full[len(root) + 1 :]: fs.cat_file(full) for full in fs.find(root)}


def put(url: str, name: str, data: bytes) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/{name}", data)


def remove(url: str, name: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    fs.rm(f"{root}/{name}", recursive=True)
