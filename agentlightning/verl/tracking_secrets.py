"""What must not leave the machine with a run's configuration: passwords in URLs, and values whose key names a secret.

A tree of plain values goes in, the same tree with `***` in those places comes out. It exists because loggers show the whole
configuration to everybody who sees the run, and `ray_kwargs` or a URL may hold credentials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(r"key|token|secret|passw|passphrase|credential|authorization", re.IGNORECASE)
_EVEN_A_NUMBER = re.compile(r"secret|passw|passphrase", re.IGNORECASE)  # token_len=512 and num_key_value_heads=8 are no secrets
_NOT_SECRET = ("prompt_key", "reward_fn_key", "tokenizer_path")  # keys of configs/trainer.yaml with a text that look like one
_USER_INFO = re.compile(r"(?<=://)[^\s/]*@")
_SECRET_IN_QUERY = re.compile(
    r"(?P<name>[?&][^=&\s]*(?:key|token|secret|passw|credential|sig)[^=&\s]*=)[^&\s#]+", re.IGNORECASE
)
_NAME_AND_VALUE = re.compile(r"(?P<name>[\w.-]+)['\"]?\s*[:=]\s*['\"]?(?P<value>[^\s,}'\"]+)")


def without_secrets(value: Any) -> Any:
    """A copy of a tree of dicts, lists and scalars in which each secret reads `***`.

    Hidden are the user's name and password in a URL, secrets in its query, and whatever stands under a name that holds key,
    token, secret, password, credential and the like. A number under a name with key or token is shown, for it counts something.
    """
    if isinstance(value, Mapping):
        return {name: HIDDEN if _is_secret(str(name), item) else without_secrets(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        return _SECRET_IN_QUERY.sub(rf"\g<name>{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", value))
    return value


def tell_secrets(words: Sequence[str]) -> bool:
    """Whether a command line holds a secret: `+ray_kwargs.ray_init.runtime_env.env_vars={API_KEY: abc}` does."""
    for word in words:
        pairs = [(match["name"].rpartition(".")[2], match["value"]) for match in _NAME_AND_VALUE.finditer(word)]
        if without_secrets(word) != word or any(_is_secret(name, _number_or_text(value)) for name, value in pairs):
            return True
    return False


def _is_secret(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool) or name in _NOT_SECRET:
        return False
    return bool((_EVEN_A_NUMBER if isinstance(value, int | float) else _SECRET_NAME).search(name))


def _number_or_text(word: str) -> float | str | None:
    """A value of the command line as what it becomes, as far as secrets need to know."""
    if word in ("null", "true", "false"):
        return None
    try:
        return float(word)
    except ValueError:
        return word
