"""Which run or checkpoint a person means. Words of a command line enter; a directory leaves, or an error says what is there.
Those at a URL are for places.py.

Also the policy by which a run keeps checkpoints, read from its own `config.yaml`, so that the tools judge as the run does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint.files import entries
from agentlightning.checkpoint.manifest import MANIFEST, is_whole
from agentlightning.checkpoint.record import RECORD_SUFFIX, list_records
from agentlightning.checkpoint.retention import BEST_KEY, EVERY_KEY, KEEP_KEY, RetentionPolicy
from agentlightning.checkpoint.store import resolve
from agentlightning.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.yaml"
_FILE_URL = "file://"
_OF_RESUMING = "trainer.resume_from_path="  # how `resolve` begins what it says: it was given by the command line here


def open_run(text: str) -> Path:
    """The run directory that `text` names; CheckpointError if there is none."""
    if text.startswith(_FILE_URL):
        raise CheckpointError(f"{text} is a URL of a local directory; expected its path, {text.removeprefix(_FILE_URL)}")
    path = Path(text).expanduser()
    if path.is_dir() and (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is one checkpoint; expected the run directory that it lies in, {path.absolute().parent}")
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise CheckpointError(f"{path} is {found}; expected a run directory, such as trainer.default_local_dir names it")
    return path


def find_checkpoint(text: str, run: Path | None = None) -> Path:
    """The directory of the checkpoint that `text` names.

    With `run`, whatever `trainer.resume_from_path` takes: a step, a name, a directory, a record file. Without it a path that
    ends in one of these (`RUN/40`, `RUN/global_step_40`, `RUN/global_step_40/actor`), or a run directory: its newest.
    """
    path = Path(text).expanduser()
    if run is None and path.is_dir() and not (path / MANIFEST).is_file() and _holds_records(path):
        return _newest(path)
    root, name = (path.parent, path.name) if run is None else (run, text)
    try:
        return resolve(root, name)
    except CheckpointError as error:
        raise CheckpointError(str(error).removeprefix(_OF_RESUMING)) from error


def _holds_records(directory: Path) -> bool:
    return any(name.endswith(RECORD_SUFFIX) and not name.startswith(".") for name in entries(directory))


def _newest(root: Path) -> Path:
    for _, record in list_records(root)[0]:
        if record.digest is not None and is_whole(Path(record.state_path)):
            return Path(record.state_path)
    raise CheckpointError(f"{root} holds no whole checkpoint; `agl ckpt ls {root}` says what is wrong with each")


def sound_manifest(directory: Path, expected_digest: str | None) -> dict[str, Any]:
    """The manifest of a directory, once it is known to be the one of its record; CheckpointError says what is wrong."""
    if not directory.is_dir():
        raise CheckpointError("its directory is missing")
    try:
        manifest = manifests.read(directory)
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    if expected_digest is not None and manifest["digest"] != expected_digest:
        raise CheckpointError("the directory is not the one that its record was written for")
    return manifest


def read_config(root: Path) -> dict[str, Any]:
    """The run's `config.yaml`, empty if there is none; ConfigError if it is no YAML mapping."""
    path = root / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML ({error}); mend it, or move it away to do without it") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}, expected sections; mend it, or move it away to do without it")
    return config


def policy_of(root: Path, keep: int | None = None, best_by: str | None = None, every: int | None = None) -> RetentionPolicy:
    """What the run keeps, by its `config.yaml` (without one everything), with what the other arguments give in its place."""
    config = read_config(root)
    section = config["trainer"] if "trainer" in config and isinstance(config["trainer"], dict) else {}
    policy = RetentionPolicy(
        keep=_number(root, section, KEEP_KEY), best_by=_text(root, section, BEST_KEY), every=_number(root, section, EVERY_KEY)
    )
    given = {"keep": keep, "best_by": best_by, "every": every}
    return replace(policy, **{name: value for name, value in given.items() if value is not None})


def _value(section: dict[str, Any], key: str) -> Any:
    """Of `trainer.<name>`; None where a file of an older version does not have it."""
    name = key.partition(".")[2]
    return section[name] if name in section else None  # noqa: SIM401 (absent and null mean the same, and only here)


def _number(root: Path, section: dict[str, Any], key: str) -> int | None:
    value = _value(section, key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"{root / CONFIG_FILE} has {key}={value!r}; expected a whole number or null")


def _text(root: Path, section: dict[str, Any], key: str) -> str | None:
    value = _value(section, key)
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(f"{root / CONFIG_FILE} has {key}={value!r}; expected a metric's name or null")
