"""`agl serve --status`: asks a running server how it is. Its address and a key enter, what `views.state_view` says leaves."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from agentlightning.errors import AgentLightningError, UserError

_TIMEOUT_S = 10


class ServerError(AgentLightningError):
    """The server cannot be reached, or is in trouble."""


def fetch_state(url: str, key: str) -> dict[str, Any]:
    """UserError for a wrong address or key, ServerError if there is no answer."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url is {url!r}; expected one like http://127.0.0.1:8000")
    request = urllib.request.Request(f"{url.rstrip('/')}/api/v1/status", headers={"X-API-Key": key})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UserError(f"{url} does not know this key; expected one of the server's: give --api-key KEY") from error
        raise ServerError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        raise ServerError(f"{url} gave no answer ({error}); is `agl serve` running there?") from error
