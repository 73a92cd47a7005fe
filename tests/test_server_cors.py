"""Pages of other sites: kept out by browsers unless their site is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fixtures import MODEL, RunningServer, serve, tiny_engine

from stallfree.engine.engine import Engine

SITE, OTHER = "https://chat.example.org", "https://evil.example.org"
KEY = "a-very-secret-key"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("cors"))


@pytest.fixture
def server(engine: Engine, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with serve(engine, api_key=KEY, **request.param) as running:
        yield running


def preflight(server: RunningServer, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return server.http.options(COMPLETIONS, headers=headers)


def post(server: RunningServer, origin: str, key: str = KEY, **fields: Any) -> httpx.Response:
    headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 2, **fields}
    return server.http.post(COMPLETIONS, json=body, headers=headers)


def opened(answer: httpx.Response) -> str | None:
    found: str | None = answer.headers.get("access-control-allow-origin")
    return found


@pytest.mark.parametrize("server", [{}], indirect=True)
def test_closed_by_default(server: RunningServer) -> None:
    answer = preflight(server, SITE)
    assert answer.status_code == 405
    assert opened(answer) is None
    assert opened(post(server, SITE)) is None
    assert not any(name.startswith("access-control") for name in post(server, SITE).headers)


@pytest.mark.parametrize(
    "server", [{"cors_origin": (SITE, "http://127.0.0.1:3000")}], indirect=True
)
def test_open_to_the_sites_named(server: RunningServer) -> None:
    for origin in (SITE, "http://127.0.0.1:3000"):
        answer = preflight(server, origin)
        assert answer.status_code == 200
        assert opened(answer) == origin
        allowed = answer.headers["access-control-allow-headers"]
        assert {"authorization", "content-type"} <= set(allowed.lower().split(","))
        for given in (post(server, origin), post(server, origin, stream=True)):
            assert given.status_code == 200
            assert opened(given) == origin
        for refused in (post(server, origin, key="wrong"), post(server, origin, n=0)):
            assert refused.status_code in (401, 400)
            assert opened(refused) == origin  # or the page could not read why
        assert "credentials" not in str(answer.headers)
    for answer in (preflight(server, OTHER), preflight(server, SITE, "DELETE")):
        assert answer.status_code == 400
    assert opened(preflight(server, OTHER)) is None
    assert opened(post(server, OTHER)) is None
    assert opened(preflight(server, SITE + ".evil.org")) is None
    assert opened(preflight(server, "null")) is None


@pytest.mark.parametrize("server", [{"cors_origin": ("*",)}], indirect=True)
def test_open_to_all(server: RunningServer) -> None:
    assert opened(preflight(server, OTHER)) == "*"
    assert opened(post(server, OTHER)) == "*"
    assert post(server, OTHER, key="wrong").status_code == 401
