"""The clients of a soak, on one event loop: raw connections, and an account of all of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from soak_traffic import OK, TOO_LARGE, Sending, http_request

TIMEOUT_S = 120.0
LINE_BYTES = 64 << 20

FINISHED, REFUSED, LEFT, BROKEN = "finished", "refused", "left", "broken"


@dataclass(slots=True)
class Account:
    """What came of all that was sent.

    Attributes:
        outcomes: by kind and outcome, how many.
        finished: completions that came with a finish reason, to clients that stayed.
        uncertain: completions that were asked for and not seen to finish.
        wrong: what should not have happened, the first of each sort.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    finished: int = 0
    uncertain: int = 0
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def num_sent(self) -> int:
        """Requests in all."""
        return sum(self.outcomes.values())

    def of(self, outcome: str) -> int:
        """Requests with that outcome."""
        return sum(count for (_, own), count in self.outcomes.items() if own == outcome)

    def note(self, sending: Sending, outcome: str, answer: Answer) -> None:
        """Count a request that has ended."""
        self.outcomes[sending.kind, outcome] += 1
        if outcome == FINISHED:
            self.finished += answer.finished
        self.uncertain += sending.choices - (answer.finished if outcome == FINISHED else 0)
        if outcome == BROKEN:
            self.wrong.setdefault(sending.kind, f"{answer.status} {answer.error}"[:300])


@dataclass(slots=True)
class Answer:
    """What has come so far; `finished` counts completions with a finish reason."""

    status: int = 0
    finished: int = 0
    error: str = ""
    is_whole: bool = False
    token_s: list[float] = field(default_factory=list)


async def exchange(url: str, sending: Sending, answer: Answer) -> str:
    """Send a request and read its answer; what came of it."""
    try:
        async with asyncio.timeout(sending.leaves_after_s or TIMEOUT_S):
            await _talk(url, sending.payload, answer)
    except TimeoutError:
        if sending.leaves_after_s is not None or sending.may_starve:
            return LEFT
        answer.error = f"no answer within {TIMEOUT_S:g} s"
        return BROKEN
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        if not sending.statuses or sending.statuses == TOO_LARGE:  # it is not read to its end
            return REFUSED
        answer.error = f"{type(error).__name__}: {error}"
        return BROKEN
    if not sending.statuses:
        return REFUSED
    if answer.status in OK and answer.status in sending.statuses:
        is_done = answer.is_whole and answer.finished == sending.choices
        return FINISHED if is_done and not answer.error else BROKEN
    return REFUSED if answer.status in sending.statuses else BROKEN


async def _talk(url: str, payload: bytes, answer: Answer) -> None:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=LINE_BYTES)
    try:
        writer.write(payload)
        with suppress(ConnectionError):  # refused before all of it was sent: the answer says why
            await writer.drain()
        first = (await reader.readline()).split()
        answer.status = int(first[1]) if len(first) > 1 else 0
        while (await reader.readline()).strip():
            pass
        body = bytearray()
        while line := await reader.readline():
            if line.startswith(b"data: "):
                _read_event(line.removeprefix(b"data: ").strip(), answer)
            else:
                body += line
        if body.startswith(b"{"):
            _read_body(json.loads(body), answer)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _read_event(data: bytes, answer: Answer) -> None:
    if data == b"[DONE]":
        answer.is_whole = True
        return
    event = json.loads(data)
    if event.get("choices"):
        answer.token_s.append(time.monotonic())
    _count(event, answer)


def _read_body(body: Mapping[str, Any], answer: Answer) -> None:
    answer.is_whole = True
    _count(body, answer)


def _count(body: Mapping[str, Any], answer: Answer) -> None:
    if "error" in body:
        answer.error = str(body["error"])
    answer.finished += sum(c["finish_reason"] is not None for c in body.get("choices", ()))


@dataclass(slots=True)
class Steady:
    """A well-behaved client of tier `priority` that asks one thing after another.

    Attributes:
        gaps: when each token came, and how long after the one before, in seconds.
        first_tokens_s: times to first tokens.
    """

    gaps: list[tuple[float, float]] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)

    async def run(
        self, url: str, model: str, prompts: list[str], tokens: int, account: Account
    ) -> None:
        """Ask one thing after another."""
        for prompt in prompts:
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            body |= {"stream": True, "ignore_eos": True, "service_tier": "priority"}
            payload = http_request("/v1/completions", json.dumps(body).encode())
            sending, answer = Sending("priority", payload, OK, 1), Answer()
            sent_s = time.monotonic()
            outcome = await exchange(url, sending, answer)
            account.note(sending, outcome, answer)
            if answer.token_s:
                self.first_tokens_s.append(answer.token_s[0] - sent_s)
            self.gaps += ((later, later - earlier) for earlier, later in pairwise(answer.token_s))
