"""What is said of capacities and of the runs behind them."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from stallfree.bench.capacity import Capacity, Criterion, SeedCapacity
from stallfree.bench.capacity_report import capacity_notes, probe_line, seed_text
from stallfree.bench.probe import QUANTILES, Probe
from stallfree.cli.capacity_search import print_capacity


def probe(**changes: Any) -> Probe:
    values: dict[str, Any] = {
        "qps": 2.0,
        "seed": 1,
        "tbt_s": dict.fromkeys(QUANTILES, 0.1),
        "delay_s": 1.5,
        "is_delay_told": True,
        "failures": {},
        "num_requests": 100,
        "is_complete": True,
        "requests_per_s": 1.9,
        "output_tokens_per_s": 100.0,
        "duration_s": 50.0,
    }
    return Probe(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "P99 TBT 100 ms, median delay 1.5 s: fails 50 ms, passes 1 s"),
        ({"is_delay_told": False}, "median delay about 1.5 s"),
        ({"failures": {"refused": 1200}}, "/s  1,200 refused, P99 TBT"),
        ({"is_complete": False}, "/s  given up, P99"),
        ({"lateness_s": 0.04}, "median delay 1.5 s: "),
        ({"lateness_s": 0.06}, "median delay 1.5 s, sent 60 ms late: fails 50 ms, fails 1 s"),
        ({"tbt_s": None, "delay_s": None}, "/s  no token came: fails 50 ms, fails 1 s"),
    ],
)
def test_a_probe_in_a_line(changes: dict[str, Any], words: str) -> None:
    line = probe_line(probe(**changes), [Criterion(0.05), Criterion(1.0)])
    assert line.startswith("seed 1          2/s  ")
    assert words in line


def test_the_table_and_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    strict, relaxed = Criterion(0.1), Criterion(1.0, quantile=0.5)
    probes = (probe(), probe(is_delay_told=False))
    seeds = (SeedCapacity(0, 2.0, 2.04), SeedCapacity(1, 4.0, 4.1, passed_above_qps=5.0))
    limits = (SeedCapacity(0, None, 0.01), SeedCapacity(1, 1000.0, None))
    found = [Capacity(strict, seeds, probes), Capacity(relaxed, limits, probes)]
    print_capacity(Console(width=120), found)
    text = capsys.readouterr().out
    for words in ("P99 within 100 ms", "3", "2, 4", "P50 within 1 s", "below 0.01, at least 1000"):
        assert words in text
    assert [note.split(":")[0].split(";")[0] for note in capacity_notes(found)] == [
        "with 100 ms, seed 1 passed 5 although it failed 4.1",
        "with 1 s, nothing failed up to the highest rate that was tried.",
        "with 1 s, nothing passed down to the lowest rate that was tried.",
        "the server does not tell when it begins with a request",
    ]


def notes(*probes: Probe, qps: float = 2.0, **changes: Any) -> list[str]:
    """Of a capacity of one seed, found with these runs."""
    seed = SeedCapacity(1, qps, 1.02 * qps, **changes)
    return capacity_notes([Capacity(Criterion(0.2), (seed,), probes)])


def test_runs_that_are_short_for_the_delay_are_noted() -> None:
    assert notes(probe(num_requests=80), probe(num_requests=40, qps=9.0)) == []
    [note] = notes(probe(num_requests=79))
    assert note == (
        "with 200 ms, runs of 79 requests last 39.5 s, in which a median delay of 2 s takes an "
        "overload of 10%: the capacity may be less; take 80 requests or more, or a longer "
        "--min-duration."
    )
    assert notes(probe(num_requests=40), is_settled=False)[0].endswith("no capacity.")


def test_a_client_at_its_limit_is_noted() -> None:
    assert notes(probe(lateness_s=0.05, client_cpu=0.5)) == []
    assert notes(probe(client_cpu=0.9, duration_s=0.5)) == []
    late, busy = notes(
        *(probe(qps=qps, lateness_s=qps / 100) for qps in (4.0, 6.0, 9.0)), probe(client_cpu=0.6)
    )
    assert late.startswith(
        "this client sent requests late in 2 of 4 runs, from 6/s on, by up to 90"
    )
    assert busy.startswith("this client used up to 60% of a core")


@pytest.mark.parametrize(
    ("qps", "failed_qps", "words"),
    [
        (None, None, "not known"),
        (2.0, None, "over 2 so far"),
        (None, 4.0, "below 4 so far"),
        (2.0, 4.0, "over 2 and below 4 so far"),
    ],
)
def test_a_search_that_has_not_ended_gives_no_capacity(
    qps: float | None, failed_qps: float | None, words: str
) -> None:
    seed = SeedCapacity(1, qps, failed_qps, is_settled=False)
    assert seed_text(seed) == words
    found = Capacity(Criterion(0.2), (SeedCapacity(0, 2.0, 2.02), seed), (probe(),))
    assert (found.mean_qps, found.interval_qps) == (None, None)
    assert capacity_notes([found]) == [
        "with 200 ms, the search ended early: what is known so far is no capacity."
    ]
