"""Nothing is left over of thousands of requests: no block, request, task, thread, file, megabyte.

STALLFREE_LEAK_REQUESTS=10000 sends as many as are promised; by default there are fewer.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fault_fixtures import Sent, Server, model_in, note, seconds_until, server, stop

NUM_REQUESTS = int(os.environ.get("STALLFREE_LEAK_REQUESTS", "400"))
MOST_GROWTH = 0.02  # of the memory after a fifth of the requests, plus the next
SLACK_BYTES = 24 << 20  # what an allocator, and the ring of the live page, may hold on to
CLIENTS = 12

BAD: list[dict[str, Any]] = [
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "surprise": 1},
    {"prompt": []},
    {"prompt": [10**9]},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": [5] * 5000},
]
GOOD: list[dict[str, Any]] = [
    {"prompt": "The river"},
    {"prompt": [7] * 150, "max_tokens": 4},
    {"prompt": "alpha beta", "n": 3, "temperature": 1.0},
    {"prompt": ["one", "two"], "stop": ["a", "e"]},
    {"prompt": "logs", "logprobs": 2, "echo": True},
    {"prompt": "gamma", "service_tier": "flex"},
]


def send_one(own: Server, client: httpx.Client, number: int) -> str:
    """A request that is good, bad, or left by its client; what became of it."""
    draws = random.Random(number)
    kind = draws.choices(("whole", "stream", "leave", "bad", "garbage"), (5, 5, 3, 2, 1))[0]
    fields = {"max_tokens": draws.randint(1, 24), **draws.choice(GOOD)}
    if kind == "leave":
        fields["max_tokens"] = 60
        sent = Sent(own, stream=draws.random() < 0.5, **fields)
        time.sleep(draws.uniform(0.0, 0.03))
        sent.leave()
        return kind
    if kind == "garbage":
        with socket.create_connection(("127.0.0.1", own.port)) as connection:
            connection.sendall(draws.randbytes(64) + b"\r\n\r\n")
            connection.recv(1000)
        return kind
    body = own.body(**(draws.choice(BAD) if kind == "bad" else fields))
    answer = client.post("/v1/completions", json={**body, "stream": kind == "stream"})
    assert answer.status_code == (400 if kind == "bad" else 200), answer.text
    assert kind != "stream" or answer.text.endswith("data: [DONE]\n\n")
    return kind


def send_many(own: Server, numbers: range) -> Counter[str]:
    """Send these requests, several at once."""

    def client(place: int) -> list[str]:
        with httpx.Client(base_url=own.url, timeout=120, trust_env=False) as http:
            return [send_one(own, http, number) for number in numbers[place::CLIENTS]]

    with ThreadPoolExecutor(CLIENTS) as pool:
        return Counter(kind for kinds in pool.map(client, range(CLIENTS)) for kind in kinds)


@pytest.mark.timeout(max(300, NUM_REQUESTS // 5))
def test_nothing_is_left_over(tmp_path: Path) -> None:
    with server(model_in(tmp_path), "--kv-cache-memory", "256KiB") as own:
        first = NUM_REQUESTS // 5
        kinds = send_many(own, range(first))
        before = settled(own)
        rss_before = own.watch()["rss_bytes"]
        kinds += send_many(own, range(first, NUM_REQUESTS))
        own.check_nothing_left(before)
        state = own.watch()
        growth = state["rss_bytes"] - rss_before
        print(f"{sum(kinds.values())} requests, {dict(kinds)}: {state['ended']}, {growth:+,} bytes")
        assert state["integrity"] is None
        assert state["wrong"] == []
        assert (state["live"], state["blocks"], state["known"], state["streams"]) == ({}, 0, 0, 0)
        assert sum(state["ended"].values()) == state["added"]
        assert state["ended"].keys() <= {"stop", "length", "abort"}
        assert len(kinds) == 5
        assert growth < MOST_GROWTH * rss_before + SLACK_BYTES
        assert "Traceback" not in own.log
        assert stop(own) == 0
    seen = f"{sum(kinds.values()):,} requests, of which {kinds['leave']:,} were left by clients"
    lost = f"nothing; memory {growth / rss_before:+.1%}"
    note("many requests, bad ones, and clients that leave", seen=seen, healthy=0.0, lost=lost)


def settled(own: Server) -> dict[str, Any]:
    """What is left once all connections are closed."""
    seen: list[dict[str, Any]] = [{}]

    def is_same() -> bool:
        time.sleep(0.3)
        seen.append(own.left())
        return seen[-1] == seen[-2] and seen[-1]["live"] == {}

    seconds_until(is_same)
    return seen[-1]
