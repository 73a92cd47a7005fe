"""The benchmark of the load generator itself, for a moment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from bench_overhead import gap_errors, main

from stallfree.bench.records import Record, Results
from stallfree.bench.workload import Arrival, Workload


def test_errors_are_of_gaps_not_of_times() -> None:
    arrivals = (Arrival(0, 1, 3), Arrival(0, 1, 4))
    records = [
        Record(arrivals[1], 0, [1.0, 2.0, 3.0, 4.5]),
        Record(arrivals[0], 0, [1.0, 2.0, 3.0]),
    ]
    written = {3: [101.0, 102.0, 103.25], 4: [100.0, 101.0, 102.0, 103.0]}
    errors = gap_errors(Results(Workload(arrivals), records, 5.0), written)
    assert errors == [0.0, 0.0, 0.5, 0.0, 0.25]


def test_it_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--streams", "3", "--seconds", "0.5"])
    printed = capsys.readouterr().out
    assert "tokens a second over 3 streams" in printed
    assert "of a core; gaps are off by" in printed
