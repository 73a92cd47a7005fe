"""The benchmark of latency targets: its load, its numbers, its tables and pictures; no model."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from load import Record, Target
from rich.console import Console
from slo_load import ARRIVING, STEADY, TIERS, MixedLoad, Run, TierLoad, run_load
from slo_picture import draw
from slo_summary import (
    best_static,
    pack,
    summarize,
    summarize_neighbour,
    summarize_tiers,
    unpack,
)
from slo_tables import tables
from test_benchmarks import Answerer

RECORDS = [
    Record(STEADY, 0.0, [0.5, 0.65, 0.95], prompt_tokens=20, completion_tokens=3),
    Record(ARRIVING, 1.0, [3.0, 4.0], prompt_tokens=1000, completion_tokens=2),
    Record(STEADY, 1.0, [2.0, 2.1, 9.0], prompt_tokens=20, completion_tokens=3),  # ends after it
    Record(ARRIVING, 2.0, error="HTTP 429: too much waits"),
]
RUN = Run(RECORDS, end_s=4.0, client_cpu_s=0.1)


def lengths(load: MixedLoad | TierLoad) -> list[int]:
    return [len(arrival.prompt.split()) for arrival in load.arrivals()]


def times(load: MixedLoad | TierLoad) -> list[float]:
    return [arrival.at_s for arrival in load.arrivals()]


@pytest.mark.parametrize("load", [MixedLoad(), TierLoad()])
def test_a_load_repeats_with_its_seed(load: MixedLoad | TierLoad) -> None:
    assert load.arrivals() == load.arrivals() != replace(load, seed=load.seed + 1).arrivals()
    assert times(load) == sorted(times(load))
    assert 0 < times(load)[0] < times(load)[-1] < load.seconds
    assert all(load.least_words <= length <= load.most_words for length in lengths(load))
    prompts = [arrival.prompt for arrival in load.arrivals()]
    assert len(set(prompts)) == len(prompts)


def test_prompts_arrive_at_random_at_their_rate() -> None:
    load = MixedLoad(rate=2.0, seconds=2000.0, least_words=1, most_words=9)
    gaps = [later - earlier for earlier, later in zip([0, *times(load)], times(load), strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.5, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)  # as of exponential gaps
    assert set(lengths(load)) == set(range(1, 10))
    assert sum(lengths(load)) / len(gaps) == pytest.approx(5, rel=0.05)


def test_another_rate_stretches_the_same_times() -> None:
    load = MixedLoad()
    slower = replace(load, rate=load.rate / 4, seconds=load.seconds * 4)
    assert times(slower) == pytest.approx([4 * time for time in times(load)])
    assert lengths(slower) == lengths(load)


def test_the_usual_load_is_about_what_its_rate_promises() -> None:
    assert len(times(MixedLoad())) == 37
    assert sum(lengths(MixedLoad())) == 60_020


def test_each_tier_arrives_with_its_name() -> None:
    for arrival in TierLoad().arrivals():
        assert arrival.extra == {"service_tier": arrival.kind}
    assert {arrival.kind for arrival in TierLoad().arrivals()} == set(TIERS)


def test_steady_prompts_and_warm_ups_differ_from_all_others() -> None:
    load = MixedLoad()
    prompts = {load.steady_prompt(client, turn) for client in range(3) for turn in range(3)}
    assert len(prompts) == 9
    assert load.steady_prompt(0, 0) not in {load.warm_up().steady_prompt(0, 0)}


def test_the_summary_counts_what_happened_until_the_last_prompt_was_answered() -> None:
    summary = summarize(RUN)
    # gaps of 100, 150, 300 and 1000 ms; the one that ends at 9 s is none of the run
    assert summary["gaps"] == 4
    assert summary["tbt_p50_ms"] == pytest.approx(150)
    assert summary["tbt_p99_ms"] == summary["tbt_max_ms"] == pytest.approx(1000)
    assert summary["share_over"]["200"] == 0.5
    assert summary["share_over"]["500"] == 0.25
    assert summary["ttft_p50_s"] == pytest.approx(2.0)
    assert summary["tokens_per_s"] == pytest.approx((23 + 1002) / 4)
    assert summary["client_cpu_share"] == pytest.approx(0.025)
    assert (summary["arriving"], summary["failures"]) == (2, 1)
    assert summary["tokens_without_event"] == 0


def test_a_neighbour_splits_the_run_in_three() -> None:
    token_s = [0.0, 0.1, 0.2, 1.5, 6.6, 6.7]
    run = Run([Record(ARRIVING, 0.0, token_s)], end_s=7.0, neighbour_s=1.0)
    windows = summarize_neighbour(run)["windows"]
    assert [windows[name]["gaps"] for name in ("before", "first", "after")] == [2, 1, 2]
    assert windows["first"]["tbt_max_ms"] == pytest.approx(1300)
    assert windows["after"]["tbt_max_ms"] == pytest.approx(5100)
    assert "windows" not in summarize_neighbour(replace(run, neighbour_s=None))


def test_tiers_are_summed_up_each_for_itself() -> None:
    records = [
        Record("priority", 0.0, [1.0, 1.1]),
        Record("priority", 0.0, [6.0, 6.1]),
        Record("default", 0.0, error="HTTP 429"),
        Record("flex", 0.0, [9.0, 9.3]),
    ]
    run = Run(records, end_s=10.0)
    tiers = summarize_tiers(run, {"priority": 5.0, "default": 10.0})["tiers"]
    assert [tiers[name]["sent"] for name in TIERS] == [2, 1, 1]
    assert [tiers[name]["failed"] for name in TIERS] == [0, 1, 0]
    assert [tiers[name]["share_within"] for name in TIERS] == [0.5, 0.0, None]
    assert tiers["flex"]["tbt_max_ms"] == pytest.approx(300)
    assert tiers["priority"]["ttft_p99_s"] == pytest.approx(6.0)


def stored(name: str, p99_ms: float, tokens_per_s: float) -> dict[str, Any]:
    flag, value = name.split()
    numbers = {"tbt_p99_ms": p99_ms, "tokens_per_s": tokens_per_s, "failures": 0}
    return {
        "name": name,
        "target_ms": int(value.removesuffix("ms")) if flag == "--tbt-slo" else None,
        "budget": int(value) if flag == "--token-budget" else None,
        "summary": {**summarize(RUN), **numbers},
        "records": [pack(record) for record in RECORDS],
    }


RUNS = [
    stored("--tbt-slo 200ms", 190, 400),
    stored("--token-budget 16", 90, 200),
    stored("--token-budget 48", 180, 320),
    stored("--token-budget 96", 300, 410),
    {"name": "--token-budget 160", "target_ms": None, "budget": 160, "error": "gone"},
]


def test_the_best_static_budget_is_the_fastest_within_the_target() -> None:
    for target_ms, budget in ((100, 16), (200, 48), (500, 96)):
        best = best_static(RUNS, target_ms)
        assert best is not None
        assert best["budget"] == budget
    assert best_static(RUNS, 50) is None


def test_records_are_stored_in_whole_milliseconds() -> None:
    record = Record(STEADY, 0.00149, [0.1004, 0.2006, 0.3004], 20, 3)
    made = json.loads(json.dumps(pack(record)))
    assert made["token_ms"] == [100, 101, 99]  # sums do not drift
    assert unpack(made) == Record(STEADY, 0.001, [0.1, 0.201, 0.3], 20, 3)
    assert unpack(pack(RECORDS[3])).error == RECORDS[3].error


def test_tables_and_pictures_are_made_of_stored_results(tmp_path: Path) -> None:
    run = replace(RUN, neighbour_s=1.0)
    tiers = Run([replace(each, kind=tier) for tier in TIERS for each in RECORDS], end_s=9.0)
    parts = {
        "targets": {"runs": RUNS},
        "contexts": {"runs": RUNS[:2]},
        "neighbour": {"runs": [{**RUNS[0], "summary": summarize_neighbour(run)}]},
        "tiers": {
            "runs": [
                {
                    **RUNS[0],
                    "summary": summarize_tiers(tiers, {"priority": 5.0}),
                    "records": [pack(record) for record in tiers.records],
                }
            ]
        },
    }
    parts = json.loads(json.dumps(parts))
    console = Console(width=100)
    with console.capture() as captured:
        for name, part in parts.items():
            console.print(*tables(name, part))
    for text in ("1.25", "failed", "first 5 s", "priority", "50.00%"):
        assert text in captured.get()
    paths = draw(parts, tmp_path / "new")
    assert [path.name for path in paths] == ["slo.png", "neighbour.png", "tiers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert draw({"targets": {"runs": [RUNS[-1]]}}, tmp_path) == []


class TierAnswerer(Answerer):
    """Notes the tier of each request."""

    tiers: ClassVar[list[str]] = []

    def answer(self, body: dict[str, Any]) -> None:
        self.tiers.append(body.get("service_tier", "none"))
        super().answer(body)


@pytest.fixture
def target() -> Iterator[Target]:
    TierAnswerer.tiers.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), TierAnswerer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Target(f"http://127.0.0.1:{server.server_port}", "m")
        server.shutdown()
        thread.join()


def test_steady_clients_ask_until_all_prompts_are_answered(target: Target) -> None:
    load = MixedLoad(clients=2, output_tokens=5, rate=50, seconds=0.3, long_output_tokens=2)
    run = run_load(target, load, neighbour_after_s=0.0)
    arriving = [record for record in run.records if record.kind == ARRIVING]
    assert len(arriving) == len(load.arrivals())
    assert len(run.records) - len(arriving) > 2
    for record in run.records:
        assert record.error is None
        assert len(record.token_s) == (2 if record.kind == ARRIVING else 5)
    assert max(record.token_s[-1] for record in arriving) <= run.end_s
    assert run.neighbour_s is not None


def test_a_steady_client_stops_when_it_is_refused(target: Target) -> None:
    run = run_load(target, MixedLoad(clients=1, prompt_words=1, rate=50, seconds=0.1))
    assert [record.error is None for record in run.records if record.kind == STEADY] == [False]


def test_a_request_carries_its_tier(target: Target) -> None:
    load = TierLoad(priority_rate=50, default_rate=50, flex_rate=50, seconds=0.1)
    run = run_load(target, load)
    assert sorted(TierAnswerer.tiers) == sorted(record.kind for record in run.records)
    assert set(TierAnswerer.tiers) == set(TIERS)
    run_load(target, MixedLoad(clients=1, seconds=0.0))
    assert TierAnswerer.tiers[-1] == "none"
