"""A reward server: samples go out over HTTP, scores come back.

`custom_reward_function.name=http://host:port/path` gets POST requests with the JSON object {"samples": [{"data_source",
"solution_str", "ground_truth", "extra_info"}, ...]} and answers {"scores": [...]}, a number or an object with "score" and
further numbers for each sample, in order. AGL_REWARD_API_KEY in the environment is sent as a bearer token, and shown nowhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx

from agentlightning.errors import ConfigError, RewardError
from agentlightning.verl.reward_functions import CallError, Outcome, Sample, as_json, checked_answers, names_of

API_KEY = "AGL_REWARD_API_KEY"
SAMPLES_PER_REQUEST = 16
TIMEOUT_S = 60.0  # of a request, where reward.timeout_s=null
BACKOFF_S = 0.5
_MAX_BYTES = 4 << 20  # of an answer
_SHOWN = 200  # characters of an answer that is quoted
_SECRET = re.compile(r"(^|[_-])(auth|credential|key|passw(or)?d|secret|sig|signature|token)$", re.IGNORECASE)  # in a query


class RewardServer:
    """One server. `score` belongs to the event loop it is first called on."""

    def __init__(self, url: str, key: str) -> None:
        """Raises `ConfigError` if `url` is none that can be posted to, or holds a password."""
        parts = urlsplit(url)
        if not parts.hostname:
            raise ConfigError(f"{key}.name: given {url!r}; mend it with {key}.name=http://host:port/path")
        if parts.username or parts.password or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query)):
            raise ConfigError(
                f"{key}.name: the URL holds a user, a password or a key, which would be written to config.yaml; mend it with "
                f"{key}.name=<the URL without> and the environment variable {API_KEY}, sent as a bearer token"
            )
        self._api_key = os.environ.get(API_KEY)
        if self._api_key and not re.fullmatch(r"[!-~]+", self._api_key):  # an HTTP library would show it in its complaint
            raise ConfigError(f"{API_KEY}: expected printable ASCII without spaces or line ends; mend the environment variable")
        self._url = url
        self._client: httpx.AsyncClient | None = None

    async def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample. Raises `CallError` where another try may help, `RewardError` where it cannot."""
        body = as_json(samples, {"samples": [dict(sample.arguments) for sample in samples]})
        try:
            status, content = await self._post(body)
        except httpx.HTTPError as error:
            raise CallError(f"could not be reached for {names_of(samples)}: {type(error).__name__} {error}") from error
        if status >= 500 or status in (408, 429):
            raise CallError(f"answered {status} for {names_of(samples)}: {self._quoted(content)}")
        if status != 200:
            return [RewardError(f"answered {status} for {names_of(samples)}: {self._quoted(content)}")] * len(samples)
        scores = _scores(content)
        if scores is None:
            given = self._quoted(content)
            error = RewardError(f'answered {given} for {names_of(samples)}, expected {{"scores": [{len(samples)} numbers]}}')
            return [error] * len(samples)
        return checked_answers(scores, samples)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        if self._client is None:  # without its own time-outs: the caller cancels
            self._client = httpx.AsyncClient(timeout=None)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        async with self._client.stream("POST", self._url, content=body, headers=headers) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > _MAX_BYTES:
                    raise httpx.DecodingError(f"an answer of more than {_MAX_BYTES >> 20} MiB")
            return response.status_code, bytes(content)

    def _quoted(self, content: bytes) -> str:
        text = content.decode(errors="replace")
        return repr((text.replace(self._api_key, "***") if self._api_key else text)[:_SHOWN])


def _scores(content: bytes) -> list[Any] | None:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    return scores if isinstance(scores, list) else None
