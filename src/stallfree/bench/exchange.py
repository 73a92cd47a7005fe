"""One streamed request: its bytes out, its tokens' times in. Failures are noted, never raised."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx

from stallfree.bench.endpoint import Endpoint, error_message, error_text, shorten
from stallfree.bench.events import EventReader
from stallfree.bench.records import Failure, Record

MAX_ERROR_BYTES = 1 << 16
MAX_COUNT = 10**9  # of tokens: what a server counts beyond is no count
REST_TIMEOUT_S = 0.2
_BUSY = {429: "refused", 503: "unavailable"}  # by status: who may be answered later
_TEXTS = ("content", "reasoning_content", "reasoning")  # of a chat's delta
_CLOSED = ("closed", "disconnected")  # in what httpx says of a connection that ended too early


class _FailedError(Exception):
    """The answer is none; the arguments are those of `Failure`."""


async def exchange(
    http: httpx.AsyncClient,
    endpoint: Endpoint,
    body: bytes,
    record: Record,
    now: Callable[[], float],
) -> float | None:
    """Send a request and fill in its record.

    Args:
        http: what sends it.
        endpoint: where to.
        body: what it says.
        record: takes the times and what went wrong.
        now: seconds from the start of the run.

    Returns:
        How long the server asks to be left alone, in seconds, if it refused.
    """
    retry_after_s: float | None = None
    record.sent_s = now()
    try:
        async with (
            asyncio.timeout(endpoint.timeout_s),
            http.stream("POST", endpoint.requests_url, content=body) as response,
        ):
            if response.status_code == httpx.codes.OK:
                await _Answer(record, now).read(response)
            else:
                retry_after_s = _seconds(response.headers.get("retry-after"))
                raise await _refusal(response)
    except _FailedError as error:
        record.failure = Failure(*error.args)
    except TimeoutError:
        record.failure = Failure("timeout", f"no end after {endpoint.timeout_s:g} s")
    except Exception as error:  # whatever one answer leads to, the others are still measured
        record.failure = _failure(error)
    if record.failure is not None or record.end_s is None:
        record.end_s = now()
    return retry_after_s


class _Answer:
    """The events of one answer as they come."""

    def __init__(self, record: Record, now: Callable[[], float]) -> None:
        self._record = record
        self._now = now
        self._has_events = False
        self._is_finished = False
        self._unsure_s: list[float] = []  # of events without text at either end

    async def read(self, response: httpx.Response) -> None:
        """Read to the end of the stream; raises _FailedError if it is no whole answer."""
        kind = response.headers.get("content-type", "no content type")
        if "json" in kind:
            raise await _not_streamed(response)
        reader = EventReader()
        chunks = response.aiter_raw()
        async for chunk in chunks:
            arrived_s = self._now()
            for data in reader.feed(chunk):
                self._take(data, arrived_s)
            if self._record.end_s is not None:
                await _read_rest(chunks)
                break
        self._settle()
        if not self._has_events and "text/event-stream" not in kind:
            raise _FailedError("garbage", f"no event came, in an answer of {shorten(kind)}")
        if not self._is_finished and self._record.end_s is None:
            num_tokens = len(self._record.token_s)
            message = f"the stream ended after {num_tokens} tokens, without [DONE]"
            raise _FailedError("broken", message)
        if not self._record.token_s and self._record.arrival.output_tokens > 0:
            raise _FailedError("garbage", "the answer holds no token")

    def _take(self, data: str, arrived_s: float) -> None:
        self._has_events = True
        if data == "[DONE]":
            self._record.end_s = arrived_s
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise _FailedError("broken", error_message(event) or "an error without a message")
            choice = next(iter(event.get("choices") or ()), None)
            if choice is not None:
                self._take_choice(choice, arrived_s)
            self._take_usage(event.get("usage") or {})
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            message = f"this is no event of an answer: {shorten(data)}"
            raise _FailedError("garbage", message) from None

    def _take_choice(self, choice: dict[str, Any], arrived_s: float) -> None:
        delta = choice.get("delta")
        if delta is None:
            has_text, is_opening = bool(choice.get("text")), False
        else:
            has_text = any(delta.get(name) for name in _TEXTS)
            is_opening = "role" in delta
        is_last = choice.get("finish_reason") is not None
        self._is_finished |= is_last
        # a token may have no text, being part of a character or the end
        if has_text or not (is_last or is_opening):
            self._record.token_s.append(arrived_s)
        else:
            self._unsure_s.append(arrived_s)

    def _settle(self) -> None:
        """Take the opening of a chat and an end without text for tokens if the count needs them.

        Some servers send them as events of their own, which bring no token.
        """
        times, count = self._record.token_s, self._record.output_tokens
        num_missing = 0 if count is None else count - len(times)
        if 0 < num_missing <= len(self._unsure_s):
            times += self._unsure_s[-num_missing:]
            times.sort()

    def _take_usage(self, usage: dict[str, Any]) -> None:
        """Take the server's counts; a wait for scheduling is told by stallfree alone."""
        record = self._record
        if "prompt_tokens" in usage:
            record.prompt_tokens = _count(usage["prompt_tokens"])
        if "completion_tokens" in usage:
            record.output_tokens = _count(usage["completion_tokens"])
        delay_ms = usage.get("scheduling_delay_ms")
        if delay_ms is not None:
            if not 0 <= delay_ms < math.inf:
                raise ValueError(f"scheduling_delay_ms is {delay_ms}")
            record.scheduled_s = record.sent_s + delay_ms / 1000


def _count(value: Any) -> int:
    """A number of tokens; raises ValueError, TypeError or OverflowError if it is none."""
    count = int(value)
    if not 0 <= count <= MAX_COUNT:
        raise ValueError(f"{count} is no number of tokens")
    return count


async def _read_rest(chunks: AsyncIterator[bytes]) -> None:
    """Read what follows [DONE], so that the connection can be used again."""
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(REST_TIMEOUT_S):
            async for _ in chunks:
                pass


async def _refusal(response: httpx.Response) -> _FailedError:
    status = response.status_code
    message = error_text(status, await _beginning(response))
    kind = _BUSY.get(status)
    if kind is None:
        return _FailedError("rejected", message)
    retry_after = response.headers.get("retry-after")
    return _FailedError(kind, f"{message} (Retry-After: {retry_after or 'not given'})")


async def _not_streamed(response: httpx.Response) -> _FailedError:
    body = await _beginning(response)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and content.get("error"):
        return _FailedError("rejected", error_text(response.status_code, body))
    return _FailedError("not_streaming", "the answer is one JSON object, not a stream of events")


async def _beginning(response: httpx.Response) -> bytes:
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) >= MAX_ERROR_BYTES:
            break
    return body


def _failure(error: Exception) -> Failure:
    message = shorten(f"{type(error).__name__}: {error}".rstrip(": "))
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Failure("unreachable", message)
    is_connection = isinstance(error, httpx.HTTPError | httpx.StreamError | OSError)
    is_readable = not isinstance(error, httpx.RemoteProtocolError | httpx.DecodingError)
    if (is_connection and is_readable) or any(word in message for word in _CLOSED):
        return Failure("broken", message)
    return Failure("garbage", message)


def _seconds(retry_after: str | None) -> float | None:
    """What a `Retry-After` in seconds says; a date is not read."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
