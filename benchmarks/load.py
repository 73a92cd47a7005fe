"""Clients of an OpenAI-compatible server that note when each token arrives.

Steady clients decode short prompts while long prompts arrive at fixed intervals. It measures from
outside and knows nothing of the server but its URL.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

READ_TIMEOUT_S = 1800.0
WORDS = (
    *("river", "stone", "cloud", "table", "garden", "window", "paper", "light", "water", "bread"),
    *("mountain", "forest", "bridge", "morning", "summer", "winter", "coffee", "letter", "music"),
    *("number", "picture", "question", "answer", "market", "station"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients send.

    Attributes:
        clients: steady clients, all starting at 0 s.
        prompt_words, output_tokens: size of a steady client's prompt and answer.
        long_count: long prompts, one after each `gap_s`.
        long_words, long_output_tokens: size of a long prompt and its answer.
        gap_s: seconds between long prompts, the first one included.
        seed: of the words.
    """

    clients: int = 8
    prompt_words: int = 20
    output_tokens: int = 128
    long_count: int = 3
    long_words: int = 1500
    long_output_tokens: int = 16
    gap_s: float = 3.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load."""

    url: str
    model: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a request."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


@dataclass(slots=True)
class Record:
    """One request as its client saw it; times in seconds from the start of the run.

    Attributes:
        kind: "steady" or "long", or what else a load consists of.
        sent_s: when it was sent.
        token_s: when each token arrived.
        prompt_tokens, completion_tokens: as the server counted them.
        error: what went wrong, if anything.
    """

    kind: str
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive tokens."""
        return [later - earlier for earlier, later in pairwise(self.token_s)]

    @property
    def first_token_s(self) -> float:
        """Time to first token; NaN if none came."""
        return self.token_s[0] - self.sent_s if self.token_s else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 to 1) of the values do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def make_prompt(num_words: int, seed: int) -> str:
    """Random common words, about one token each."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def send(
    target: Target,
    prompt: str,
    max_tokens: int,
    started: float,
    kind: str = "steady",
    extra: Mapping[str, object] | None = None,
) -> Record:
    """Stream one greedy completion to its end; a failure is noted in the record, not raised.

    Args:
        target: where to.
        prompt: its text.
        max_tokens: output tokens; the model's end token does not end it.
        started: `time.perf_counter()` at the start of the run.
        kind: for the record.
        extra: more fields of the body.
    """
    record = Record(kind, sent_s=time.perf_counter() - started)
    url = urlsplit(target.url)
    make = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = make(url.hostname or "127.0.0.1", url.port, timeout=READ_TIMEOUT_S)
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(extra or {}),
    }
    path = url.path.rstrip("/") + "/v1/completions"
    try:
        connection.request("POST", path, json.dumps(body), target.headers)
        response = connection.getresponse()
        if response.status == http.HTTPStatus.OK:
            _read_events(response, record, started)
        else:
            record.error = f"HTTP {response.status}: {response.read(500).decode(errors='replace')}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return record


def run(target: Target, load: Load) -> list[Record]:
    """Send the whole load and wait for its end; steady clients first, then the long prompts."""
    records: list[Record | None] = [None] * (load.clients + load.long_count)
    started = time.perf_counter()

    def client(place: int) -> None:
        if place < load.clients:
            prompt = make_prompt(load.prompt_words, load.seed + place)
            records[place] = send(target, prompt, load.output_tokens, started)
            return
        number = place - load.clients + 1
        prompt = make_prompt(load.long_words, load.seed + 1000 + number)
        time.sleep(max(0.0, number * load.gap_s - (time.perf_counter() - started)))
        records[place] = send(target, prompt, load.long_output_tokens, started, "long")

    threads = [
        threading.Thread(target=client, args=(place,), daemon=True) for place in range(len(records))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [record for record in records if record is not None]


def _read_events(response: http.client.HTTPResponse, record: Record, started: float) -> None:
    for line in response:
        if not line.startswith(b"data:") or b"[DONE]" in line:
            continue
        arrived = time.perf_counter() - started
        event = json.loads(line.removeprefix(b"data:"))
        if "error" in event:
            record.error = str(event["error"])
        choices = event.get("choices")
        if choices and (choices[0].get("text") or not choices[0].get("finish_reason")):
            # llama.cpp tells the end in an event of its own, which brings no token
            record.token_s.append(round(arrived, 5))
        if event.get("usage"):
            record.prompt_tokens = event["usage"]["prompt_tokens"]
            record.completion_tokens = event["usage"]["completion_tokens"]
