"""What is said of a run: tables, notes, files and the page."""

from __future__ import annotations

import csv
import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.bench import figures
from stallfree.bench.files import read_json, write_csv, write_json
from stallfree.bench.html import page
from stallfree.bench.metrics import Slo, summarize
from stallfree.bench.records import Failure, Record, Results
from stallfree.bench.report import count_table, latency_table, notes
from stallfree.bench.workload import Arrival, Workload
from stallfree.errors import ConfigError

get_plotlyjs = pytest.importorskip("plotly.offline").get_plotlyjs

SLO = Slo(tbt_s=0.2, ttft_s=2.0)
NASTY = "</script><script>alert('&')</script>"

times = st.floats(0, 1e6, allow_nan=False)
counts = st.none() | st.integers(0, 10**6)
arrivals = st.builds(Arrival, times, st.integers(1, 10**6), st.integers(1, 10**6), counts)
workloads = st.builds(
    Workload,
    st.lists(arrivals, min_size=1, max_size=3).map(tuple),
    st.none() | st.integers(1, 9),
    st.text(),
)
records = st.builds(
    Record,
    arrivals,
    times,
    st.lists(times, max_size=4).map(sorted),
    st.none() | times,
    st.none() | times,
    counts,
    counts,
    st.none() | st.builds(Failure, st.sampled_from(["refused", "broken"]), st.text()),
)
facts = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | times | st.text())
runs = st.builds(
    Results, workloads, st.lists(records), times, st.none() | times, facts, st.booleans()
)


def example() -> Results:
    """Two requests answered, of which one with a gap of 500 ms, and one refused."""
    planned = [Arrival(0.0, 100, 4), Arrival(0.5, 50, 3, prefix_id=1), Arrival(1.0, 100, 3)]
    failure = Failure("refused", f"status 429: {NASTY}")
    made = [
        Record(planned[0], 0.001, [0.1, 0.2, 0.3, 0.8], 0.81, 0.05, 101, 4),
        Record(planned[1], 0.501, [0.6, 0.7, 0.8], 0.8, 0.55, 50, 3),
        Record(planned[2], 1.0, end_s=1.01, failure=failure),
    ]
    workload = Workload(tuple(planned), about="three <requests>")
    return Results(workload, made, 1.2, 0.12, {"model": NASTY, "endpoint": "http://host"})


@settings(max_examples=50, deadline=None)
@given(runs)
def test_json_is_read_back_as_it_was(results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        write_json(path, results, SLO)
        assert read_json(path) == results


def test_json_holds_the_summary_too(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", example(), SLO)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["summary"]["failures"] == {"refused": 1}
    assert content["summary"]["num_good"] == 1
    assert content["slo"] == {"tbt_s": 0.2, "ttft_s": 2.0}
    nothing = replace(example(), records=[])
    write_json(tmp_path / "nothing.json", nothing)
    content = json.loads((tmp_path / "nothing.json").read_text())
    assert content["summary"]["latencies"]["ttft"]["p50"] is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"stallfree_results": 2}', '{"stallfree_results": 1}', "[" * 10**5]
)
def test_what_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_json(path)


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    for attempt in (lambda: read_json(path), lambda: write_json(path, example())):
        with pytest.raises(ConfigError, match="No such file"):
            attempt()
    with pytest.raises(ConfigError, match="No such file"):
        write_csv(path, example())


def test_csv_has_a_row_for_each_request(tmp_path: Path) -> None:
    write_csv(tmp_path / "run.csv", example())
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["failure"] for row in rows] == ["", "", "refused"]
    assert float(rows[0]["max_gap_s"]) == pytest.approx(0.5)
    assert rows[1]["ttft_s"] == str(0.6 - 0.501)
    assert rows[2]["message"] == f"status 429: {NASTY}"
    assert rows[2]["first_token_s"] == rows[2]["e2e_s"] == ""


def test_tables() -> None:
    table = latency_table(summarize(example()))
    assert table.columns == ("ms", "P50", "P90", "P99", "max")
    assert {row[0]: row[1:] for row in table.rows} == {
        "time to first token": ("99.0", "99.0", "99.0", "99.0"),
        "time between tokens": ("100.0", "500.0", "500.0", "500.0"),
        "time per output token": ("100.0", "233.3", "233.3", "233.3"),
        "end to end": ("299.0", "809.0", "809.0", "809.0"),
        "scheduling delay": ("49.0", "49.0", "49.0", "49.0"),
    }
    rows = {row[0]: row[1] for row in count_table(example(), SLO).rows}
    assert rows["requests sent"] == "3"
    assert rows["answered"] == "2"
    assert rows["failed: refused"] == "1"
    assert rows["within TTFT 2,000 ms and TBT 200 ms"] == "1, 1.25 a second"
    assert rows["prompt tokens"] == "150 planned, 151 counted (+0.7%)"
    assert rows["client: share of a core"] == "10.0%"
    assert rows["client: sent late, P99"] == "1.0 ms"


def test_a_table_of_nothing() -> None:
    nothing = replace(example(), records=[], is_complete=False)
    assert latency_table(summarize(nothing)).rows == ()
    rows = {row[0]: row[1] for row in count_table(nothing, SLO).rows}
    assert rows["requests sent"] == "0 of 3 planned"
    assert rows["requests a second"] == "-"
    assert page([("nothing", nothing)])


def test_notes() -> None:
    results = example()
    (failed,) = notes(results, summarize(results))
    assert failed.startswith("1 requests failed as 'refused', such as: status 429")
    late = [replace(each, sent_s=each.sent_s + 0.06, failure=None) for each in results.records]
    late[0].prompt_tokens = 200
    busy = replace(results, records=late, client_cpu_s=0.9)
    told = " ".join(notes(busy, summarize(busy)))
    for words in ("late, 61 ms at P99", "75% of a core", "250 prompt tokens where 150"):
        assert words in told
    simulated = replace(results, client_cpu_s=None)
    assert "client" not in str(count_table(simulated).rows)


def test_an_answer_that_has_not_ended_is_not_good() -> None:
    record = example().records[1]
    assert SLO.is_met(record)
    assert not SLO.is_met(replace(record, end_s=None))


@pytest.mark.parametrize(("num_tokens", "is_noted"), [(19, False), (20, False), (18, True)])
def test_short_answers_are_noted_without_the_servers_count(num_tokens: int, is_noted: bool) -> None:
    times_s = [0.1 * place for place in range(1, num_tokens + 1)]
    record = Record(Arrival(0.0, 100, 20), 0.0, times_s, times_s[-1])
    results = Results(Workload((record.arrival,)), [record], 9.0)
    words = f"{num_tokens} events with tokens came where 20 tokens were planned"
    assert [note.startswith(words) for note in notes(results, summarize(results))] == (
        [True] if is_noted else []
    )


def test_the_page_needs_no_network_and_runs_no_text() -> None:
    simulated = replace(example(), client_cpu_s=None, facts={})
    html = page([(NASTY, example()), ("simulated & more", simulated)], SLO)
    assert 'src="http' not in html
    assert html.count(get_plotlyjs()) == 1
    own = html.replace(get_plotlyjs(), "")
    assert not re.search(r"<[^>]*\s(src|href)\s*=", own)
    assert "alert('&')" not in own
    assert own.count("<script") == own.count("</script>")
    assert html.count('class="plotly-graph-div"') == 6
    for words in ("three &lt;requests&gt;", "simulated &amp; more", "TTFT 2,000 ms", "http://host"):
        assert words in html


def test_a_timeline_marks_tokens_and_late_gaps() -> None:
    traces = {trace.name: trace for trace in figures.timeline(example(), SLO).data}
    assert [round(float(x), 3) for x in traces["token"].x] == [0.1, 0.2, 0.3, 0.8, 0.6, 0.7, 0.8]
    assert list(traces["token"].y) == [0, 0, 0, 0, 1, 1, 1]
    assert traces["gap over 200 ms"].x == (0.3, 0.8, None)
    assert traces["failed"].y == (2,)
    names = {trace.name for trace in figures.timeline(example()).data}
    assert not any("gap" in name for name in names)


def test_curves() -> None:
    runs = [("one", example())]
    (spread,) = figures.cdf(runs, "tbt", 0.2).data
    assert (min(spread.x), max(spread.x)) == (pytest.approx(100), pytest.approx(500))
    assert list(spread.y) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    (tokens,) = figures.throughput(runs).data
    assert math.fsum(tokens.y) * 0.012 == pytest.approx(7)
    (queue,) = figures.in_flight(runs).data
    assert list(queue.y) == [0, 1, 2, 1, 0, 1, 0]
