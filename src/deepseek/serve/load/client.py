"""A user of an OpenAI-compatible server: sends a request, reads the stream, takes the times.

On aiohttp, whose parser is compiled: the generator shares its cores with the server it measures,
and httpx takes two and a half times the processor time for a piece of an answer (see docs/log.md).
Each request has a connection of its own, as separate users have.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

from deepseek.errors import BackendError, ConfigError, FormatError, describe, missing_extra
from deepseek.serve.load.dialect import DONE, error_words, read_event
from deepseek.serve.load.outcome import Outcome
from deepseek.serve.load.sse import EventReader

if TYPE_CHECKING:
    import aiohttp

Endpoint = Literal["chat", "completions"]
Message = Mapping[str, str]

CONNECT_S = 10.0
LONGEST_WAIT_S = 30.0
"""Seconds that a `Retry-After` is obeyed for."""
_AGAIN = (429, 503)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A server and how it is asked.

    Raises:
        ConfigError: an address that is none.
    """

    url: str
    """Where its API is; `/v1` is added to an address without a path."""
    model: str = ""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    endpoint: Endpoint = "completions"
    natural_end: bool = False
    """Answers end where the model ends them; else `ignore_eos` is sent, which OpenAI has not but
    servers for one's own models have."""
    timeout_s: float = 600.0
    """Seconds that an answer may take."""
    max_retries: int = 0
    """Times that a request is sent again which was refused with a `Retry-After`."""

    def __post_init__(self) -> None:
        """Check the address."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            must = "an address like http://127.0.0.1:8000"
            raise ConfigError(describe("URL", "bench serve", must, self.url))

    @property
    def base(self) -> str:
        """The address that paths are put behind."""
        address = self.url.rstrip("/")
        return address if urlsplit(address).path else f"{address}/v1"

    def headers(self) -> dict[str, str]:
        """Return the headers of every request."""
        given = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.api_key is not None:
            given["Authorization"] = f"Bearer {self.api_key}"
        return given

    def body(self, messages: Sequence[Message], max_tokens: int) -> bytes:
        """Return the body of a request for the answer to messages."""
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self.natural_end:
            asked["ignore_eos"] = True
        if self.endpoint == "chat":
            asked["messages"] = list(messages)
        else:
            asked["prompt"] = "\n".join(message["content"] for message in messages)
        return json.dumps(asked).encode()


class Client:
    """Asks a server. To be entered before it is used.

    Args:
        target: the server.
        clock: seconds, for every time that is taken.

    Raises:
        MissingExtra: aiohttp is not installed.
    """

    def __init__(self, target: Target, clock: Callable[[], float] = time.perf_counter) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise missing_extra("aiohttp", "serve", "to send requests") from error
        self.target = target
        self.clock = clock
        self._http = aiohttp
        self._path = "/chat/completions" if target.endpoint == "chat" else "/completions"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open it."""
        http = self._http
        self._session = http.ClientSession(
            connector=http.TCPConnector(limit=0, force_close=True),
            timeout=http.ClientTimeout(total=self.target.timeout_s, sock_connect=CONNECT_S),
            headers=self.target.headers(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        if self._session is not None:
            await self._session.close()

    async def first_model(self) -> str:
        """Return the name of the first model that the server lists.

        Raises:
            BackendError: there is none, or no answer.
        """
        assert self._session is not None
        url = f"{self.target.base}/models"
        step, got = "Give its name by --model, or start the server", ""
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                got = f"HTTP {response.status}"
                listed = json.loads(await response.read())
                return str(listed["data"][0]["id"])
        except (self._http.ClientError, TimeoutError) as error:
            got, cause = f"{type(error).__name__}: {error}", error
        except (ValueError, LookupError, TypeError) as error:
            cause = error
        must = f"a server that lists its models at {url}"
        raise BackendError(describe("URL", "bench serve", must, got, step)) from cause

    async def ask(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        outcome: Outcome,
        hang_up_after: int | None = None,
    ) -> None:
        """Send a request and write into `outcome` what becomes of it; no failure is raised.

        Args:
            messages: what was said so far.
            max_tokens: most tokens of the answer.
            outcome: is filled; `sent_s` too.
            hang_up_after: pieces of text after which the connection is closed.
        """
        body = self.target.body(messages, max_tokens)
        outcome.sent_s = self.clock()
        try:
            while (wait_s := await self._try(body, outcome, hang_up_after)) is not None:
                await asyncio.sleep(wait_s)
                outcome.retries += 1
                outcome.error, outcome.detail = None, ""
        except self._http.ClientConnectorError as error:
            outcome.error, outcome.detail = "refused", str(error)
        except TimeoutError:
            outcome.error = "timeout"
            outcome.detail = f"not done in {self.target.timeout_s:g} s"
        except (self._http.ClientError, ConnectionError) as error:
            outcome.error, outcome.detail = "dropped", f"{type(error).__name__}: {error}"
        except FormatError as error:
            outcome.error, outcome.detail = "bad_event", str(error)
        outcome.ended_s = self.clock()

    async def _try(self, body: bytes, outcome: Outcome, hang_up_after: int | None) -> float | None:
        """Send it once; return the seconds after which to send it again, or None."""
        assert self._session is not None
        url = self.target.base + self._path
        async with self._session.post(url, data=body, allow_redirects=False) as response:
            if response.status != 200:
                words = _words(await response.content.read(4096))
                outcome.error, outcome.detail = f"http_{response.status}", words
                return self._wait_s(response, outcome)
            if response.content_type != "text/event-stream":
                outcome.error = "not_a_stream"
                outcome.detail = f"the answer is {response.content_type}"
                return None
            await self._read(response, outcome, hang_up_after)
        return None

    def _wait_s(self, response: aiohttp.ClientResponse, outcome: Outcome) -> float | None:
        if response.status not in _AGAIN or outcome.retries >= self.target.max_retries:
            return None
        given = response.headers.get("Retry-After", "")
        return min(float(given), LONGEST_WAIT_S) if given.isdecimal() else None

    async def _read(
        self, response: aiohttp.ClientResponse, outcome: Outcome, hang_up_after: int | None
    ) -> None:
        """Read the stream to its end, or until the user has had enough."""
        reader = EventReader()
        is_done = False
        if hang_up_after == 0:
            outcome.hung_up = True
            response.close()
            return
        async for received in response.content.iter_any():
            now_s = self.clock()
            for data in reader.feed(received):
                if data.strip() == DONE:
                    is_done = True
                    break
                read_event(data, outcome, now_s)
            if is_done or outcome.error is not None:
                break
            if hang_up_after is not None and len(outcome.piece_times_s) >= hang_up_after:
                outcome.hung_up = True
                break
        response.close()
        if outcome.error is None and not outcome.hung_up:
            _check_end(outcome, is_done)


def _check_end(outcome: Outcome, is_done: bool) -> None:
    """Write an error for an answer that has not ended, or has nothing in it."""
    if not is_done and outcome.finish_reason is None:
        outcome.error = "cut_short"
        outcome.detail = f"the stream ended after {len(outcome.piece_times_s)} pieces"
    elif not outcome.piece_times_s:
        outcome.error = "empty"
        outcome.detail = f"finish_reason {outcome.finish_reason}"


def _words(body: bytes) -> str:
    """Return what the body of an error says, be it JSON, HTML or text."""
    text = body.decode("utf-8", errors="replace")
    try:
        event = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:200]
    return error_words(event) if isinstance(event, dict) else str(event)[:200]
