"""The records of the live page: what an engine's requests and iterations become."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from engine_fixtures import GREEDY, Failing, tiny_settings

from stallfree import SamplingParams
from stallfree.core.admission import Admission
from stallfree.core.targets import Targets
from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.live_feed import MAX_RECORDS, History, LiveFeed
from stallfree.engine.settings import ServerSettings
from stallfree.errors import OverloadedError
from stallfree.server.dashboard import Feed
from stallfree.server.service import Service

PROMPT = list(range(5, 45))


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    settings = tiny_settings(tmp_path_factory.mktemp("model"))
    return build_engine(settings, show_progress=False)


@pytest.fixture
def feed(engine: Engine) -> LiveFeed:
    live = LiveFeed(engine.clock.now)
    engine.observers.add(live)
    return live


def records_of(feed: LiveFeed) -> list[dict[str, Any]]:
    return feed.history.since(0, MAX_RECORDS)[1]


def run(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def test_a_request_is_told_with_every_chunk_and_token(engine: Engine, feed: LiveFeed) -> None:
    engine.add("one", PROMPT, GREEDY, Targets("priority", ttft_s=3.0))
    run(engine)
    added, *iterations, ended = records_of(feed)
    number = added["request"]
    assert (added["kind"], added["id"], added["tier"]) == ("added", "one/0", "priority")
    assert (added["prompt"], added["most_outputs"]) == (40, 12)
    assert (added["tbt_s"], added["ttft_s"]) == (None, 3.0)
    chunks = [chunk for each in iterations for chunk in each["prefills"]]
    assert chunks == [(number, 0, 16, False), (number, 16, 16, False), (number, 32, 8, True)]
    assert [each["decodes"] for each in iterations] == [[]] * 3 + [[number]] * 11
    ends = [each["end"] for each in iterations]
    assert ends == sorted(ends)
    assert all(each["start"] < each["end"] and each["budget"] == 16 for each in iterations)
    assert iterations[0]["running"] == 1
    assert iterations[0]["free_blocks"] < engine.scheduler.pool.num_blocks
    assert ended == {**ended, "kind": "ended", "request": number, "reason": "length", "outputs": 12}
    assert feed.live() == []


def test_no_record_has_a_prompt_an_output_or_a_user(engine: Engine, feed: LiveFeed) -> None:
    engine.add("one", PROMPT, GREEDY, Targets(user="alice"))
    engine.step()
    live = feed.live()
    run(engine)
    known = {
        "added": {"request", "id", "tier", "at", "prompt", "most_outputs", "tbt_s", "ttft_s"},
        "ended": {"request", "at", "reason", "outputs"},
        "iteration": {
            *("start", "end", "predicted", "budget", "failed", "decodes", "prefills"),
            *("running", "waiting", "free_blocks"),
        },
    }
    for record in records_of(feed):
        assert set(record) == {"kind", *known[record["kind"]]}
    assert {key for each in live for key in each} == {
        *known["added"],
        *("state", "computed", "outputs"),
    }
    assert "alice" not in json.dumps([live, records_of(feed)])


def test_those_that_live_are_told_with_their_counts(engine: Engine, feed: LiveFeed) -> None:
    engine.add("one", PROMPT[:10], GREEDY)
    engine.step()
    engine.step()
    engine.add("two", PROMPT, GREEDY)
    first, second = feed.live()
    assert (first["state"], first["computed"], first["outputs"]) == ("running", 11, 2)
    assert (second["state"], second["computed"], second["outputs"]) == ("waiting", 0, 0)
    run(engine)


def test_a_preemption_names_who_waits_again(engine: Engine, feed: LiveFeed) -> None:
    pool = engine.scheduler.pool
    params = SamplingParams(temperature=0, max_tokens=pool.num_tokens // 3, ignore_eos=True)
    for name in ("one", "two", "three", "four"):
        engine.add(name, PROMPT, params)
    while not engine.scheduler.preemptions:
        engine.step()
    preempted = [each for each in records_of(feed) if each["kind"] == "preempted"]
    assert [each["requests"] for each in preempted] == [[4]]
    run(engine)
    ended = {
        each["request"]: each["reason"] for each in records_of(feed) if each["kind"] == "ended"
    }
    assert ended == dict.fromkeys((1, 2, 3, 4), "length")


def test_a_failure_and_a_refusal_are_told(engine: Engine, feed: LiveFeed) -> None:
    failing = Failing(engine)
    failing.fails = True
    engine.executor = failing
    engine.add("one", PROMPT, GREEDY)
    engine.step()
    engine.admission = Admission(max_queued_requests=1)
    engine.scheduler.num_left_waiting = [1, 1, 1]
    engine.add("two", PROMPT, GREEDY)
    with pytest.raises(OverloadedError):
        engine.add("three", PROMPT, GREEDY)
    kinds = [(each["kind"], each.get("failed"), each.get("reason")) for each in records_of(feed)]
    assert kinds == [
        ("added", None, None),
        ("iteration", True, None),
        ("ended", None, "error"),
        ("added", None, None),
        ("refused", None, None),
    ]


def test_a_history_keeps_the_latest_and_says_from_where() -> None:
    history = History(4)
    assert history.since(0, 10) == (0, [])
    for number in range(3):
        history.append({"n": number})
    assert history.since(0, 2) == (0, [{"n": 0}, {"n": 1}])
    assert history.since(2, 10) == (2, [{"n": 2}])
    for number in range(3, 10):
        history.append({"n": number})
    assert history.count == 10
    assert history.since(2, 10) == (7, [{"n": 7}, {"n": 8}, {"n": 9}])
    assert history.since(10, 10) == (10, [])


def test_a_watcher_that_reads_slowly_is_told_what_it_lost(engine: Engine) -> None:
    served = AsyncEngine(engine)
    feed, live = Feed(Service(served, ServerSettings())), served.view._feed
    size = 64
    live.history = History(size)

    def parsed(data: bytes) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
        return event

    async def watch() -> None:
        events: AsyncGenerator[bytes, None] = feed.events("alice", None)
        snapshot = parsed(await anext(events))
        assert (snapshot["type"], snapshot["next"], snapshot["requests"]) == ("snapshot", 0, [])
        assert feed.watchers == {"alice": 1}
        while live.history.count < 2 * size:
            engine.add("again", PROMPT, GREEDY)
            run(engine)
        count = live.history.count
        event = parsed(await anext(events))
        assert (event["first"], event["lost"]) == (count - size + 1, count - size + 1)
        assert len(event["records"]) == size - 1
        await events.aclose()
        assert feed.watchers.total() == 0

    asyncio.run(watch())
