"""The server's OpenAPI document is true: whatever it allows, or does not, is answered as it says.

See `fuzzing` for how many requests are sent to each route.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_fixtures import MODEL, RunningServer, serve, tiny_engine, wait_until

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ROUTES = [
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
UNTRIED = {("GET", "/metrics"), ("POST", "/debug/trace")}  # for Prometheus; takes up to a minute
KEY = "a-very-secret-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    engine = tiny_engine(tmp_path_factory.mktemp("openapi"), max_model_len=256)
    with serve(engine, api_key=KEY) as running:
        yield running
        wait_until(running.is_idle)
        engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def document(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_all_routes_are_in_the_document(document: Any) -> None:
    found = [each.ok() for each in document.get_all_operations()]
    assert {(each.method.upper(), each.path) for each in found} == {*ROUTES, *UNTRIED}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), ROUTES, ids=str)
def test_answers_are_as_documented(
    document: Any, method: str, path: str, mode: GenerationMode
) -> None:
    is_post = method == "POST"
    statuses: Counter[int] = Counter()
    if mode is GenerationMode.NEGATIVE and not is_post:
        pytest.skip("it takes nothing that could be wrong")
    operation = document[path][method]

    @fuzzed(0.3 if is_post else 0.1)
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from([True, True, True, False]))
    def check(case: Any, knows_the_server: bool) -> None:
        """Most requests name the model and carry the key: what is random knows neither."""
        if knows_the_server:
            case.headers = {**(case.headers or {}), "Authorization": f"Bearer {KEY}"}
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    check()
    is_answered = path != "/v1/models/{model_id}" and mode is GenerationMode.POSITIVE
    assert 200 in statuses or not is_answered, statuses
