"""The API key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import AuthenticationError
from server_fixtures import MODEL, RunningServer, serve, tiny_engine

KEY = "a-very-secret-key"
PROTECTED = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


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


def test_health_and_version_need_no_key(server: RunningServer) -> None:
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/version").status_code == 200
