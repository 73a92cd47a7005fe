"""`/metrics` of a real server after real requests, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import tiny_settings
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as open_metrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from replica_fixtures import ThreadFleet, make_front
from server_fixtures import MODEL, RunningServer, serve, tiny_engine, wait_until

from stallfree.core.bubbles import Bubble

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana.json"
UNSHOWN = {
    "process_virtual_memory_bytes",  # of a process that maps its weights it says nothing
}
TIERS = {"priority", "default", "flex"}
PROMPT = list(range(5, 25))
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One request runs, one waits; it has a target."""
    engine = tiny_engine(
        tmp_path_factory.mktemp("metrics"),
        dtype="float32",
        tbt_slo_s=0.5,
        max_num_seqs=1,
        max_queued_requests=1,
    )
    with serve(engine) as running:
        yield running


def scrape(server: RunningServer) -> Samples:
    """All samples, by name and labels."""
    response = server.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples["stallfree_" + name, tuple(sorted(labels.items()))]


def complete(server: RunningServer, **fields: Any) -> int:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, **fields}
    status = server.post("/v1/completions", body).status_code
    wait_until(server.is_idle)
    return status


def test_requests_are_counted_by_tier(server: RunningServer) -> None:
    before = scrape(server)
    assert complete(server) == 200
    assert complete(server, service_tier="flex", n=2, max_tokens=3) == 200
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        key = "stallfree_" + name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)  # an endpoint that nobody asked is not there

    assert grown("requests_ended_total", tier="default", reason="length") == 1
    assert grown("requests_ended_total", tier="flex", reason="length") == 2
    assert grown("tokens_total", kind="output") == 10
    cached = grown("tokens_total", kind="cached")
    assert grown("tokens_total", kind="prompt") + cached >= 40
    assert cached > 0  # the prompts begin alike
    for name in ("scheduling_delay", "time_to_first_token", "end_to_end"):
        assert grown(f"{name}_seconds_count", tier="default") == 1
        assert grown(f"{name}_seconds_sum", tier="default") > 0
        assert grown(f"{name}_seconds_bucket", tier="flex", le="+Inf") == 2
    assert grown("time_between_tokens_seconds_count", tier="default") == 3
    assert grown("time_per_output_token_seconds_count", tier="flex") == 2
    assert grown("iteration_seconds_count") == grown("iteration_prediction_ratio_count") > 6
    assert grown("http_requests_total", endpoint="/v1/completions", status="200") == 2
    assert value(after, "token_budget_tokens") > 0


def test_what_waits_and_who_is_refused_is_seen(server: RunningServer) -> None:
    before = scrape(server)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True}
    body |= {"stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as first:
        lines = first.iter_lines()
        next(lines)
        with server.http.stream(
            "POST", "/v1/completions", json={**body, "service_tier": "flex"}
        ) as second:
            assert second.status_code == 200
            wait_until(lambda: server.engine.num_waiting == 1)
            assert complete_while_busy(server) == 429
            during = scrape(server)
    wait_until(server.is_idle)
    after = scrape(server)
    assert value(during, "requests_running", tier="default") == 1
    assert value(during, "requests_waiting", tier="flex") == 1
    assert value(during, "requests_waiting", tier="default") == 0
    assert value(during, "kv_blocks", state="used") > 0
    refused = {"tier": "flex"}
    assert value(after, "requests_refused_total", **refused) == 1 + value(
        before, "requests_refused_total", **refused
    )
    assert value(after, "requests_ended_total", tier="default", reason="abort") == 1
    assert value(after, "requests_running", tier="default") == 0
    assert value(after, "kv_blocks", state="used") == 0
    assert value(after, "kv_blocks", state="free") == server.engine.engine.scheduler.pool.num_blocks


def complete_while_busy(server: RunningServer) -> int:
    body = {"model": MODEL, "prompt": PROMPT, "service_tier": "flex"}
    return server.post("/v1/completions", body).status_code


def test_labels_are_those_that_are_known(server: RunningServer) -> None:
    """Whatever clients send: no text of theirs becomes a label, and none is missing at zero."""
    strange = "x-strange-text"
    server.http.get(f"/{strange}")
    server.http.get(f"/v1/models/{strange}")
    server.http.request(strange.upper(), "/v1/models")
    complete(server, model=strange)
    complete(server, user=strange, service_tier="auto")
    samples = scrape(server)
    found: dict[str, set[str]] = {}
    for name, labels in samples:
        assert name.startswith(("stallfree_", "process_"))
        for label, text in labels:
            found.setdefault(label, set()).add(text)
    assert strange not in json.dumps(sorted(str(each) for each in samples))
    assert found["tier"] == TIERS
    assert found["reason"] == {"stop", "length", "abort", "error"}
    assert found["cause"] == {"memory", "tier", "lost"}
    assert found["mode"] == {"swap", "recompute"}
    assert found["direction"] == {"out", "in"}
    assert found["kind"] == {"prompt", "cached", "output"}
    assert found["endpoint"] <= {
        *("/v1/completions", "/v1/models", "/v1/models/{model_id:path}", "/metrics", "other")
    }
    assert {"/v1/models/{model_id:path}", "other"} <= found["endpoint"]
    assert set(found) == {
        *("tier", "reason", "cause", "mode", "direction", "kind", "state", "le"),
        *("endpoint", "status"),
    }


def test_openmetrics_is_given_to_who_asks(server: RunningServer) -> None:
    accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
    response = server.http.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    families = open_metrics_families(response.text)  # type: ignore[no-untyped-call]
    names = {family.name for family in families}
    assert "stallfree_tokens" in names


def families_of(server: RunningServer) -> dict[str, str]:
    """The names and kinds of all that is shown."""
    text = server.http.get("/metrics").text
    return {family.name: family.type for family in text_string_to_metric_families(text)}


def test_the_dashboard_shows_what_there_is_and_only_that(
    server: RunningServer, tmp_path: Path
) -> None:
    """Of one engine, and of several copies."""
    assert complete(server) == 200
    with serve(make_front(ThreadFleet(tiny_settings(tmp_path)))) as several:
        families = families_of(several)
    assert families_of(server).items() <= families.items()
    exported = set()
    for name, kind in families.items():
        suffixes = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}
        exported |= {name + suffix for suffix in suffixes.get(kind, ("",))}
    used = set(re.findall(r"\b(?:stallfree|process)_\w+", " ".join(expressions())))
    assert used <= exported
    shown = {name for name in families if any(each.startswith(name) for each in used)}
    assert set(families) - shown == UNSHOWN


def expressions() -> Iterator[str]:
    """Every expression of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable.get("definition", "")


def test_queries_choose_among_copies_and_find_one_engine_too() -> None:
    """Which has no such label, and so is matched by nothing but what matches the empty text."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    [variable] = [each for each in dashboard["templating"]["list"] if each["name"] == "replica"]
    assert (variable["allValue"], variable["includeAll"]) == (".*", True)
    assert variable["current"]["value"] == ["$__all"]
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for name, chosen in re.findall(r"\b(stallfree_\w+)\{(.*?)\}", target["expr"]):
                is_of_engine = name != "stallfree_http_requests_total"
                assert ('replica=~"$replica"' in chosen) == is_of_engine, target["expr"]


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_key_protects_them(tmp_path: Path) -> None:
    with serve(tiny_engine(tmp_path), api_key="a-key") as running:
        assert running.http.get("/metrics").status_code == 401
        assert running.http.post("/debug/trace").status_code == 401
        headers = {"Authorization": "Bearer a-key"}
        assert running.http.get("/metrics", headers=headers).status_code == 200


def test_stages_of_a_pipeline_are_seen(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, pipeline_parallel_size=2, dtype="float32")
    with serve(engine) as running:
        assert complete(running, n=4) == 200
        samples = scrape(running)
    for stage in ("0", "1"):
        assert value(samples, "stage_seconds_total", stage=stage, kind="busy") > 0
        for bubble in Bubble:
            kind = bubble.name.lower()
            assert value(samples, "stage_seconds_total", stage=stage, kind=kind) >= 0
    kinds = {dict(labels)["kind"] for name, labels in samples if "stage_seconds" in name}
    assert kinds == {"busy", "pb1", "pb2", "pb3", "uneven", "no_work"}


def test_what_becomes_of_preempted_requests_is_seen(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, dtype="float32", preemption_mode="swap")
    with serve(engine) as running:
        scheduler = engine.scheduler
        assert scheduler.swap is not None
        scheduler.preemptions["memory"] += 3
        scheduler.swapped["memory"] += 1
        scheduler.swap.num_out, scheduler.swap.num_in = 5, 4
        samples = scrape(running)
    assert value(samples, "preemptions_total", cause="memory", mode="swap") == 1
    assert value(samples, "preemptions_total", cause="memory", mode="recompute") == 2
    assert value(samples, "preemptions_total", cause="tier", mode="recompute") == 0
    assert value(samples, "swapped_blocks_total", direction="out") == 5
    assert value(samples, "swapped_blocks_total", direction="in") == 4
    assert value(samples, "swap_blocks", state="used") == 0
    assert value(samples, "swap_blocks", state="free") == scheduler.swap.num_slots > 0


def test_two_servers_of_one_process_count_for_themselves(
    server: RunningServer, tmp_path: Path
) -> None:
    assert complete(server) == 200
    with serve(tiny_engine(tmp_path)) as other:
        samples = scrape(other)
        assert value(samples, "tokens_total", kind="output") == 0
        assert not any(name == "stallfree_token_budget_tokens" for name, _ in samples)
