"""The live page's files and its feed, over real HTTP with a tiny model."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixtures import MODEL, TIMEOUT_S, RunningServer, serve, tiny_engine, wait_until

from stallfree.server.dashboard import MAX_WATCHERS

KEY = "a-very-secret-key"
STATIC = Path(__file__).parent.parent / "src" / "stallfree" / "server" / "static"
FILES = sorted(path.name for path in STATIC.iterdir())
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
BODY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(tiny_engine(tmp_path_factory.mktemp("feed"), dtype="float32")) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    engine = tiny_engine(tmp_path_factory.mktemp("locked"), dtype="float32")
    with serve(engine, api_key=KEY) as running:
        yield running


@contextmanager
def watching(server: RunningServer) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of the feed, as they come."""
    with server.http.stream("GET", "/dashboard/feed") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        yield (json.loads(line.removeprefix("data: ")) for line in lines if line)


def until_ended(events: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records up to the next end of a request."""
    records: list[dict[str, Any]] = []
    for event in events:
        assert (event["type"], event["lost"]) == ("records", 0)
        records += event["records"]
        if any(each["kind"] == "ended" for each in records):
            return records
    raise AssertionError("the feed ended")


def path_of(name: str) -> str:
    return "/dashboard" if name == "index.html" else f"/dashboard/{name}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_page_needs_no_key_and_has_strict_headers(
    locked: RunningServer, name: str
) -> None:
    response = locked.http.get(path_of(name))
    assert response.status_code == 200
    assert response.content == (STATIC / name).read_bytes()
    assert response.headers["content-type"] == TYPES[Path(name).suffix]
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", page)
    for name in FILES:
        text = (STATIC / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|\beval\(|@import", text), name
    names = {Path(each).name for each in re.findall(r'(?:src|href)="(dashboard/[^"]+)"', page)}
    for script in STATIC.glob("*.js"):
        imported = re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8"))
        names |= set(imported)
    assert names | {"index.html"} == set(FILES)


def test_the_wheel_holds_every_file_of_the_page() -> None:
    project = tomllib.loads((STATIC.parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["stallfree"]
    for name in FILES:
        assert any(fnmatch.fnmatch(f"server/static/{name}", each) for each in patterns)


def test_there_is_nothing_else(server: RunningServer) -> None:
    for path in (
        "/dashboard/",
        "/dashboard/none.js",
        "/dashboard/..%2fapp.py",
        "/dashboard/../app",
    ):
        assert server.http.get(path).status_code == 404
    assert server.http.post("/dashboard").status_code == 405
    schema = server.http.get("/openapi.json").json()
    assert not any("dashboard" in path for path in schema["paths"])


def test_a_snapshot_tells_what_the_server_is(server: RunningServer) -> None:
    with watching(server) as events:
        snapshot = next(events)
    engine = server.engine.engine
    assert snapshot["type"] == "snapshot"
    assert (snapshot["model"], snapshot["scheduler"], snapshot["status"]) == (
        MODEL,
        "sarathi",
        "ok",
    )
    assert snapshot["num_blocks"] == snapshot["free_blocks"] == engine.scheduler.pool.num_blocks
    assert snapshot["tiers"]["priority"] == {"tbt_s": None, "ttft_s": None}
    assert (snapshot["requests"], snapshot["running"]) == ([], 0)
    assert snapshot["waiting"] == [0, 0, 0]
    assert abs(snapshot["now"] - server.engine.now()) < 30


def test_a_watcher_sees_a_request_and_none_of_its_words(server: RunningServer) -> None:
    with watching(server) as events:
        snapshot = next(events)
        body = {**BODY, "prompt": "green house window", "max_tokens": 9, "service_tier": "flex"}
        answer = server.post("/v1/completions", body).json()
        records = [*until_ended(events)]
    added = next(each for each in records if each.get("id", "").startswith(answer["id"]))
    number = added["request"]
    assert (added["tier"], added["prompt"]) == ("flex", answer["usage"]["prompt_tokens"])
    iterations = [each for each in records if each["kind"] == "iteration"]
    assert sum(each["decodes"].count(number) for each in iterations) == 8
    chunks = [c for each in iterations for c in each["prefills"] if c[0] == number]
    assert sum(tokens for _, _, tokens, _ in chunks) == added["prompt"]
    ended = records[-1]
    assert (ended["request"], ended["reason"], ended["outputs"]) == (number, "length", 9)
    text = json.dumps([snapshot, records])
    assert "house" not in text
    assert answer["choices"][0]["text"] not in text


def test_a_latecomer_sees_what_was_before(server: RunningServer) -> None:
    answer = server.post("/v1/completions", {**BODY, "prompt": "stone", "max_tokens": 5}).json()
    with watching(server) as events:
        snapshot = next(events)
        seen = 0
        known: dict[str, Any] = {}
        while seen < snapshot["next"]:
            event = next(events)
            seen = event["first"] + len(event["records"])
            known |= {each["id"]: each for each in event["records"] if each["kind"] == "added"}
    assert f"{answer['id']}-0/0" in known


def test_a_snapshot_holds_the_requests_that_run(server: RunningServer) -> None:
    body = {**BODY, "prompt": "river", "max_tokens": 1500, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        with watching(server) as events:
            (running,) = next(events)["requests"]
    assert running["id"] == f"{first['id']}-0/0"
    assert running["state"] == "running"
    assert running["outputs"] > 0
    wait_until(server.is_idle)


def test_an_idle_feed_says_that_the_server_is_there(server: RunningServer) -> None:
    with watching(server) as events:
        next(events)
        quiet = next(event for event in events if not event["records"])
    assert (quiet["status"], quiet["running"]) == ("ok", 0)


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}])
def test_the_feed_needs_the_key(locked: RunningServer, header: dict[str, str]) -> None:
    response = locked.http.get("/dashboard/feed", headers=header)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    headers = {"Authorization": f"Bearer {KEY}"}
    with locked.http.stream("GET", "/dashboard/feed", headers=headers) as stream:
        snapshot = next(stream.iter_lines())
    assert '"snapshot"' in snapshot
    assert KEY not in snapshot


def test_one_watcher_too_many_is_refused_until_another_leaves(server: RunningServer) -> None:
    with ExitStack() as first:
        for _ in range(MAX_WATCHERS):
            next(first.enter_context(watching(server)))
        refused = server.http.get("/dashboard/feed")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "5"
        assert f"{MAX_WATCHERS} watch already" in refused.json()["error"]["message"]

    def is_taken() -> bool:
        with server.http.stream("GET", "/dashboard/feed") as response:
            return response.status_code == 200

    wait_until(is_taken)


def test_watchers_do_not_keep_a_server_from_ending(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine(tmp_path_factory.mktemp("ending"), dtype="float32")
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        with serve(engine) as running:
            client = stack.enter_context(httpx.Client(base_url=running.url, trust_env=False))
            response = stack.enter_context(client.stream("GET", "/dashboard/feed"))
            lines = response.iter_lines()
            assert '"snapshot"' in next(lines)
            rest = pool.submit(list, lines)
        assert all('"records"' in line for line in rest.result(TIMEOUT_S) if line)
    assert not caplog.records
