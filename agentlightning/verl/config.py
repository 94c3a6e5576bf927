"""From overrides to a checked `Config`, once, before anything heavy is imported.

hydra's `key=value` words (or a composed DictConfig) go in; a frozen `Config` comes out, or a `ConfigError` that says which key,
what was given, what was expected, and the override that mends it. It imports neither torch nor ray, so that a typing mistake is
answered in half a second.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

import agentlightning
from agentlightning.errors import ConfigError
from agentlightning.verl.refused import why_not_here
from agentlightning.verl.rules import check_rules
from agentlightning.verl.schema import Config

__all__ = ["Config", "check_overrides", "config_dir", "leaf_keys", "load_config", "validate"]

CONFIG_NAME = "trainer"
FREE_DICTS = (  # sections whose keys are somebody else's, or the user's own
    "ray_kwargs.ray_init",
    "data.mixture",
    "reward.functions",
    "actor_rollout_ref.model.override_config",
)
_PLAIN_WORDS = {
    "bool_type": "true or false",
    "dict_type": "a section of keys",
    "float_type": "a number",
    "int_type": "an integer",
    "model_type": "a section of keys",
    "missing": "a longer list",
    "none_required": "null",
    "string_pattern_mismatch": "pkg.mod:fn",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_short": "a list that is not empty",
    "tuple_type": "a list",
}
_PACKAGE = Path(agentlightning.__file__).resolve().parent

# `${asset:train.jsonl}`: the files of the embedded calculator, wherever the package is installed.
OmegaConf.register_new_resolver("asset", lambda name: str(_PACKAGE / "calculator" / name), replace=True)


def config_dir() -> Path:
    """The folder of the YAML files: inside the installed package, or beside it in a checkout."""
    for candidate in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (candidate / f"{CONFIG_NAME}.yaml").is_file():
            return candidate
    raise ConfigError(
        f"configs/{CONFIG_NAME}.yaml is neither in {_PACKAGE} nor in {_PACKAGE.parent}; install the package again"
    )


def leaf_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the tree that holds a value, dotted, in the order of the schema."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += leaf_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Compose configs/trainer.yaml with `overrides` (hydra's words) and check it.

    Example: `load_config(["model=tiny", "trainer.seed=2"]).trainer.seed == 2`.
    """
    check_overrides(overrides)
    return validate(_compose(overrides))


def validate(composed: DictConfig) -> Config:
    """Check what hydra composed: types, ranges, unknown keys, then the rules that span keys."""
    try:
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _composition_error(error) from error
    try:
        config = Config.model_validate(_lists_to_tuples(tree))
    except ValidationError as error:
        raise ConfigError(_worded(error, composed)) from error
    check_rules(config)
    return config


def check_overrides(overrides: Sequence[str]) -> None:
    """Answer a mistyped key or `model=` with the nearest real one, before hydra composes anything."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(
            f"cannot read the override: {_first_line(error)}; expected key=value, such as trainer.seed=2"
        ) from error
    for override in parsed:
        _check_override(override)


def _check_override(override: Override) -> None:
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return
    if key == "model":
        _check_model_choice(override)
        return
    leaves = leaf_keys()
    sections = {leaf[:dot] for leaf in leaves for dot in range(len(leaf)) if leaf[dot] == "."}
    adds = override.is_add() or override.is_force_add()
    if key in FREE_DICTS and not adds and not override.is_delete() and isinstance(override.value(), dict) and override.value():
        raise ConfigError(f"{key}: its keys are added with a plus: '+{override.input_line}'")
    if key in leaves or key in sections:
        if override.is_delete():
            raise ConfigError(f"{override.input_line}: a key cannot be removed, only set; see --cfg job for what there is")
        return
    for free in FREE_DICTS:
        if key.startswith(f"{free}."):
            if not adds:
                raise ConfigError(f"{key}: keys of {free} are added with a plus: +{override.input_line}")
            return
    raise ConfigError(_unknown_key(key, [*leaves, "model"]))


def _check_model_choice(override: Override) -> None:
    names = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
    given = override.value()
    if given in names or override.is_sweep_override():
        return
    nearest = difflib.get_close_matches(str(given), names, n=1, cutoff=0.0)[0]
    known = ", ".join(names)
    raise ConfigError(
        f"model: given {given!r}, expected one of {known}; did you mean model={nearest}? "
        f"For weights of your own: model={nearest} actor_rollout_ref.model.path=<directory or hub name>"
    )


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that `key` is not there, and why not or which one is nearest."""
    reason = why_not_here(key)
    if reason is not None:
        return f"{key} is a key of verl's that is not here: {reason}. All keys: python -m agentlightning.verl --cfg job"
    return f"unknown key {key!r}; did you mean {_nearest(key, known)!r}? All keys: python -m agentlightning.verl --cfg job"


def _nearest(key: str, known: Sequence[str]) -> str:
    """The key that was probably meant: the same last word elsewhere, else a like name, else a like last word, else anything."""
    last_word = {leaf: leaf.rpartition(".")[2] for leaf in known}
    section, _, given = key.rpartition(".")
    elsewhere = [leaf for leaf in known if last_word[leaf] == given]
    if elsewhere:
        return next((leaf for leaf in elsewhere if section and leaf.startswith(section)), elsewhere[0])
    alike = difflib.get_close_matches(given, last_word.values(), n=1, cutoff=0.6)
    words_alike = [leaf for leaf in known if last_word[leaf] in alike]
    by_name = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return (by_name or words_alike or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return compose(CONFIG_NAME, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition_error(error) from error


def _composition_error(error: Exception) -> ConfigError:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return ConfigError(
        f"the configuration cannot be composed: {_first_line(cause)}; see --cfg job for the tree and its defaults"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _lists_to_tuples(value: Any) -> Any:
    """YAML's lists as the tuples that the frozen schema holds."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def _worded(error: ValidationError, composed: DictConfig) -> str:
    """pydantic's errors, one line a key: what was given, what is expected, what mends it."""
    known = leaf_keys()
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_key_of(detail["loc"], known), []).append(detail)
    # A key that takes its value from another one is wrong because that one is: only the source is named.
    sources = {key: details for key, details in by_key.items() if not _is_interpolation(composed, key)}
    defaults = _defaults()
    return "\n".join(_worded_key(key, details, known, defaults) for key, details in (sources or by_key).items())


@lru_cache(maxsize=1)
def _defaults() -> Any:
    return OmegaConf.to_container(_compose([]), resolve=True)


def _is_interpolation(composed: DictConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(composed, section) if section else composed
    return isinstance(parent, DictConfig) and name in parent and OmegaConf.is_interpolation(parent, name)


def _key_of(loc: Iterable[int | str], known: Sequence[str]) -> str:
    """The dotted key of an error; the names of union members and positions in lists, which follow the leaf, are dropped."""
    key = ""
    for part in loc:
        key = f"{key}.{part}" if key else str(part)
        if key in known:
            break
    return key


def _worded_key(key: str, details: Sequence[ErrorDetails], known: Sequence[str], defaults: Any) -> str:
    if details[0]["type"] == "extra_forbidden":
        return _unknown_key(key, known)
    given = details[0]["input"]
    if details[0]["type"] == "missing" and len(details[0]["loc"]) == key.count(".") + 1:
        return f"{key}: not given; set it with {key}={_as_override(_lookup(defaults, key))}"
    # A value that fits one member of a union but is out of its range is told about the range, not about the other members.
    kinds = ("literal_error", "string_pattern_mismatch")
    ranged = [d for d in details if d["type"] not in kinds and not d["type"].endswith("_type")] or list(details)
    expected = dict.fromkeys(_PLAIN_WORDS.get(detail["type"], _message(detail)) for detail in ranged)
    mended = _as_override(_lookup(defaults, key))
    return f"{key}: given {_shown(given)}, expected {' or '.join(expected)}; mend it with {key}={mended} (the default)"


def _message(detail: ErrorDetails) -> str:
    """pydantic's words for what it expected, in the ones that hydra's command line uses."""
    text = detail["msg"].removeprefix("Input should be ").replace("True or False", "true or false")
    text = text.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return text.replace("greater than", "more than")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else _as_override(value)


def _lookup(tree: Any, key: str) -> Any:
    """The value at a dotted key of plain dicts, or None where the key names nothing."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _as_override(value: Any) -> str:
    """`value` as hydra's command line spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(_as_override(item) for item in value) + "]"
    return str(value)
