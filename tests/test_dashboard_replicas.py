"""The live page in front of replicas: each can be shown, and all say how busy they are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engine_fixtures import tiny_settings
from live_page import PACE_S, chromium, load, opened, part, wait_for_pixels
from playwright.sync_api import Browser, Page, expect
from replica_fixtures import ThreadFleet, make_front
from server_fixtures import MODEL, RunningServer, serve, wait_until

from stallfree.core.batch import Batch
from stallfree.engine.build import build_engine
from stallfree.engine.settings import EngineSettings
from stallfree.executor.output import Executor, ExecutorOutput

BODY = {"model": MODEL, "prompt": "alpha beta", "max_tokens": 5, "ignore_eos": True}


class Slowly:
    """Iterations that take `PACE_S` longer."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def execute(self, batch: Batch) -> ExecutorOutput:
        time.sleep(PACE_S)
        return self._executor.execute(batch)


class SlowFleet(ThreadFleet):
    """Replicas slow enough to be watched, whose answers do not end by chance."""

    def add(self) -> None:
        super().add()
        engine = self.replicas[-1].engine.engine
        engine.end_token_ids = frozenset()
        engine.executor = Slowly(engine.executor)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = tmp_path_factory.mktemp("model")
    return tiny_settings(folder, max_position_embeddings=8192)


@pytest.fixture
def fleet(settings: EngineSettings) -> SlowFleet:
    return SlowFleet(settings)


@pytest.fixture
def server(fleet: SlowFleet) -> Iterator[RunningServer]:
    with serve(make_front(fleet), served_model_name=MODEL) as running:
        yield running


@contextmanager
def watching(server: RunningServer, query: str = "") -> Iterator[Iterator[dict[str, Any]]]:
    """The events of the feed, as they come."""
    with server.http.stream("GET", f"/dashboard/feed{query}") as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        yield (json.loads(line.removeprefix("data: ")) for line in lines if line)


def records_until_ends(events: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Records up to so many ends of requests."""
    records: list[dict[str, Any]] = []
    while sum(each["kind"] == "ended" for each in records) < count:
        records += next(events)["records"]
    return records


def test_a_feed_tells_of_the_requests_of_its_replica(
    server: RunningServer, fleet: SlowFleet
) -> None:
    with watching(server, "?replica=0") as first, watching(server, "?replica=1") as second:
        snapshots = [next(first), next(second)]
        assert [each["replica"] for each in snapshots] == [0, 1]
        assert snapshots[0]["model"] == MODEL
        assert [each["ready"] for each in snapshots[0]["replicas"]] == [True, True]
        with load(server, 3):
            ids = {server.post("/v1/completions", BODY).json()["id"] for _ in range(3)}
            assert all(fleet.served)
        found = [
            records_until_ends(events, count)
            for events, count in zip((first, second), fleet.served, strict=True)
        ]
    for records, snapshot, served in zip(found, snapshots, fleet.served, strict=True):
        added = [each["id"] for each in records if each["kind"] == "added"]
        assert len(added) == served
        ended = [each for each in records if each["kind"] == "ended"]
        assert {each["reason"] for each in ended} <= {"length", "abort"}
        iterations = [each for each in records if each["kind"] == "iteration"]
        assert all(each["end"] - each["start"] >= PACE_S for each in iterations)
        assert snapshot["num_blocks"] == fleet.replicas[0].engine.engine.scheduler.pool.num_blocks
    told = json.dumps(found)
    assert all(each in told for each in ids)
    assert "alpha" not in told


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("?replica=7", 503, "replica 7 is not ready"),
        ("?replica=one", 400, "must be a whole number"),
        ("?replica=-1", 400, "must be a whole number"),
    ],
)
def test_a_replica_that_is_not_there(
    server: RunningServer, query: str, status: int, says: str
) -> None:
    answer = server.http.get(f"/dashboard/feed{query}")
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_a_feed_ends_with_its_replica_and_the_next_has_its_place(
    server: RunningServer, fleet: SlowFleet
) -> None:
    with watching(server) as events:
        assert next(events)["replica"] == 0
        fleet.replicas[0].end()
        assert all(each["type"] == "records" for each in events)
    with watching(server) as events:
        assert next(events)["replica"] == 1
        fleet.add()
        while [each["ready"] for each in next(events)["replicas"]] != [True, True]:
            pass
    with watching(server, "?replica=0") as events:
        snapshot = next(events)
        assert (snapshot["replica"], snapshot["next"]) == (0, 0)


def button(page: Page, place: int) -> Any:
    return page.locator("#replicas button").nth(place)


def test_an_operator_chooses_a_replica_and_sees_it_replaced(
    browser: Browser, server: RunningServer, fleet: SlowFleet
) -> None:
    with opened(browser, server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#replicas")).to_be_visible()
        expect(button(page, 0)).to_have_attribute("aria-pressed", "true")
        expect(button(page, 1)).to_have_text("Replica 1: 0 requests running, 0 waiting")
        with load(server, 4):
            wait_until(lambda: all(fleet.served))
            counts = [len(each.engine.engine.scheduler.running) for each in fleet.replicas]
            assert sum(counts) == 4
            for place in (1, 0, 1):
                button(page, place).click()
                expect(button(page, place)).to_have_attribute("aria-pressed", "true")
                expect(button(page, 1 - place)).to_have_attribute("aria-pressed", "false")
                expect(part(page, "running")).to_have_text(str(counts[place]))
                wait_for_pixels(page, "requests", "--decode", 100)
                wait_for_pixels(page, "iterations", "--decode", 100)
            page.locator("#table summary").click()
            expect(page.locator("#table tbody tr")).to_have_count(counts[1])
            for each in (0, 1):
                requests = f"{counts[each]} request{'s' if counts[each] > 1 else ''} running"
                expect(button(page, each)).to_contain_text(requests)
        wait_until(server.is_idle)
        fleet.replicas[1].end()
        expect(page.locator("#connection")).to_contain_text("replica 1 is not ready")
        button(page, 0).click()
        expect(page.locator("#connection")).to_have_text("live")
        expect(button(page, 1)).to_have_text("Replica 1: lost")
        expect(button(page, 1)).to_be_disabled()
        fleet.add()
        expect(button(page, 1)).to_be_enabled()
        button(page, 1).click()
        expect(page.locator("#connection")).to_have_text("live")
        expect(part(page, "running")).to_have_text("0")


def test_one_engine_shows_no_choice(browser: Browser, settings: EngineSettings) -> None:
    engine = build_engine(settings, show_progress=False)
    with serve(engine) as server, opened(browser, server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#replicas")).to_be_hidden()
        answer = server.http.get("/dashboard/feed?replica=0")
        assert answer.status_code == 400
        assert "it is one engine" in answer.json()["error"]["message"]
