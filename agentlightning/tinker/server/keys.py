"""Who may come in. API keys enter; only their SHA-256 leaves, which is also the owner's name in the records and the log.

The keys given on the command line hold, and are remembered. Without any, those of the last start hold, so that a service that
is started again still knows its clients; a first start makes one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from urllib.parse import quote

from agentlightning.errors import UserError
from agentlightning.tinker.server.journal import Journal

PREFIX = "tml-"  # the SDK refuses any other
_OWNER_DIGITS = 16
_KEYS, _SECRET = "keys", "url_secret"
_SECRET_TEXT = re.compile(r"(tml-|eyJ|signature=)[A-Za-z0-9._~+/=-]*")


class Keys:
    """Which keys are valid, and what may be fetched without one. UserError for a key that the SDK would not send."""

    def __init__(self, journal: Journal, given: Sequence[str]) -> None:
        self.made: str | None = None  # to be shown once
        for key in given:
            if not key.startswith(PREFIX) or len(key) < len(PREFIX) + 4 or not key.isascii() or not key.isprintable():
                raise UserError(
                    f"an --api-key does not begin with {PREFIX} or is too short; expected one like {PREFIX}<32 letters>"
                )
        hashes = [_hash(key) for key in given]
        if not hashes and _KEYS in journal.secrets:
            hashes = json.loads(journal.secrets[_KEYS])
        if not hashes:
            self.made = PREFIX + secrets.token_urlsafe(32)
            hashes = [_hash(self.made)]
        self._hashes: list[str] = hashes
        if _KEYS not in journal.secrets or journal.secrets[_KEYS] != json.dumps(hashes):
            journal.remember(_KEYS, json.dumps(hashes))
        if _SECRET not in journal.secrets:
            journal.remember(_SECRET, secrets.token_hex(32))
        self._secret = journal.secrets[_SECRET].encode()

    def owner(self, key: str) -> str | None:
        """The name of a valid key's owner, else None. The time that it takes tells nothing about the keys."""
        digest, found = _hash(key), None
        for known in self._hashes:
            if hmac.compare_digest(digest, known):
                found = known[:_OWNER_DIGITS]
        return found

    def sign(self, path: str, seconds: int) -> str:
        """`path?expires=..&signature=..`: whoever has it may fetch it so long."""
        expires = int(time.time()) + seconds
        return f"{quote(path)}?expires={expires}&signature={self._signature(path, expires)}"

    def ticket(self, owner: str, seconds: int) -> str:
        """What a browser keeps in place of a key; it opens the page alone."""
        expires = int(time.time()) + seconds
        return f"{owner}.{expires}.{self._signature(owner, expires)}"

    def ticket_owner(self, ticket: str) -> str | None:
        """Whose it is, if it still holds and the owner's key is still valid."""
        owner, _, rest = ticket.partition(".")
        expires, _, signature = rest.partition(".")
        known = any(digest.startswith(owner) for digest in self._hashes) and len(owner) == _OWNER_DIGITS
        return owner if known and self.is_signed(owner, expires, signature) else None

    def is_signed(self, path: str, expires: str, signature: str) -> bool:
        """Whether `sign` made it, and it still holds."""
        if not re.fullmatch(r"\d{1,12}", expires) or int(expires) < time.time():
            return False
        return hmac.compare_digest(self._signature(path, int(expires)).encode(), signature.encode())

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._secret, f"{expires} {path}".encode(), hashlib.sha256).hexdigest()


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class HideSecrets(logging.Filter):
    """Whatever is logged, no key and no signature is in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True; the record's text is changed."""
        record.msg, record.args = hide(record.getMessage()), ()
        return True


def hide(text: str) -> str:
    """Keys and signatures as stars."""
    return _SECRET_TEXT.sub(r"\1***", text)
