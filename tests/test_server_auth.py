"""The API key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import APIRouter, FastAPI
from openai import AuthenticationError
from server_fixtures import MODEL, RunningServer, serve, tiny_engine
from starlette.routing import Route

KEY = "a-very-secret-key"
PROTECTED = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
OPEN = {
    "/health",
    "/version",
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(tiny_engine(tmp_path_factory.mktemp("auth")), api_key=KEY) as running:
        yield running


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer wrong",
        b"Bearer " + KEY.encode() + b"x",
        b"Basic " + KEY.encode(),
        KEY.encode(),
        "Bearer clé-🙂".encode(),
        b"Bearer \xff\xfe",
    ],
)
def test_refused_without_the_key(
    server: RunningServer, method: str, path: str, header: bytes | None
) -> None:
    headers = {} if header is None else {b"Authorization": header}
    response = server.http.request(method, path, headers=headers)
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_taken_with_the_key(server: RunningServer) -> None:
    client = server.client(KEY)
    assert client.completions.create(model=MODEL, prompt="hi", max_tokens=2).choices
    client.close()
    wrong = server.client("another")
    with pytest.raises(AuthenticationError):
        wrong.models.list()
    wrong.close()
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {KEY}"}
        assert server.http.get("/v1/models", headers=headers).status_code == 200


def routes_of(router: FastAPI | APIRouter) -> Iterator[Route]:
    """All routes; newer versions of FastAPI keep those of a router that is included in it."""
    for each in router.routes:
        if isinstance(each, Route):
            yield each
        else:
            yield from routes_of(vars(each)["original_router"])


def test_every_route_needs_the_key_but_those_that_tell_nothing_of_requests(
    server: RunningServer,
) -> None:
    app = server.server.config.app
    assert isinstance(app, FastAPI)
    found = {(method, each.path) for each in routes_of(app) for method in each.methods or ()}
    found = {(method, path) for method, path in found if method != "HEAD"}
    assert {("GET", "/metrics"), ("POST", "/debug/trace"), ("GET", "/dashboard/feed")} <= found
    is_open = {
        path: server.http.request(method, path.replace("{model_id:path}", MODEL)).status_code == 200
        for method, path in found
    }
    page = {path for path in is_open if path.startswith("/dashboard") and "feed" not in path}
    assert len(page) > 2
    assert {path for path in is_open if is_open[path]} == {*OPEN, *page}
    for method, path in found:
        if not is_open[path]:
            answer = server.http.request(method, path.replace("{model_id:path}", MODEL))
            assert answer.status_code == 401, path
