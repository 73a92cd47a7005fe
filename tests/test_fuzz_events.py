"""Whatever a server sends: its events are read the same however they are split, or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import httpx
from fuzzing import EDITS, JSON, Edit, damaged, fuzzed, json_paths, with_part
from hypothesis import given
from hypothesis import strategies as st

from stallfree.bench.endpoint import Endpoint
from stallfree.bench.events import EventReader
from stallfree.bench.exchange import exchange
from stallfree.bench.records import Record
from stallfree.bench.workload import Arrival

STREAM_BYTES = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b"data:", b"data: ", b"\n", b"\r", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b":", b"id: 1"]
        ),
    ),
    max_size=20,
).map(b"".join)
KINDS = {"broken", "garbage", "rejected", "refused", "unavailable", "not_streaming"}

COMPLETION: dict[str, Any] = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
CHAT: dict[str, Any] = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}
USAGE: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


def pieces(stream: bytes, splits: list[float]) -> list[bytes]:
    cuts = sorted({0, len(stream), *(int(split * len(stream)) for split in splits)})
    return [stream[start:stop] for start, stop in pairwise(cuts)]


@fuzzed(10)
@given(STREAM_BYTES, st.lists(st.floats(0, 1), max_size=6))
def test_events_do_not_depend_on_how_bytes_are_split(stream: bytes, splits: list[float]) -> None:
    whole, split = EventReader(), EventReader()
    expected = whole.feed(stream)
    assert [event for piece in pieces(stream, splits) for event in split.feed(piece)] == expected
    assert all("\r" not in event for event in expected)


def answered(parts: list[bytes], status: int, content_type: str) -> Record:
    """What is noted of an answer that comes in these parts."""

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers={"content-type": content_type}, content=body())

    async def run() -> Record:
        record = Record(Arrival(0.0, 3, 1))
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            await exchange(http, Endpoint("http://test"), b"{}", record, lambda: 1.0)
        return record

    return asyncio.run(run())


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@fuzzed()
@given(
    st.data(),
    st.sampled_from([200, 200, 200, 400, 429, 500, 503]),
    st.sampled_from(["text/event-stream", "application/json", "text/html", ""]),
)
def test_no_answer_is_too_strange(data: st.DataObject, status: int, content_type: str) -> None:
    events: list[Any] = []
    for whole in (COMPLETION, CHAT, USAGE):
        path = data.draw(st.sampled_from(json_paths(whole)))
        events.append(
            with_part(whole, path, data.draw(JSON)) if data.draw(st.booleans()) else whole
        )
    stream = b"".join(map(event, events)) + b"data: [DONE]\n\n"
    edits: list[Edit] = data.draw(st.one_of(st.just([]), EDITS))
    splits = data.draw(st.lists(st.floats(0, 1), max_size=4))
    record = answered(pieces(damaged(stream, edits), splits), status, content_type)
    assert record.end_s is not None
    if status != 200:
        assert record.failure is not None
    if record.failure is not None:
        assert record.failure.kind in KINDS
        assert len(record.failure.message) < 1000
