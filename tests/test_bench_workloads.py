"""Making workloads: rates, burstiness, streams of random numbers, statistics, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import mean, pstdev

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stallfree.bench.arrivals import FIXED, arrival_times, parse_arrivals
from stallfree.bench.workload import Arrival, Workload
from stallfree.bench.workload_file import load_workload, save_workload
from stallfree.bench.workloads import Recipe, statistics_of, stretched
from stallfree.errors import ConfigError

RECIPE = Recipe("lognormal:100/300,20/40", requests_per_s=2.0, seed=3)
TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n100,5,1\n101,6,2\n104,7,3\n105,8,4\n"


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def sizes(workload: Workload) -> list[tuple[int, int]]:
    return [(each.prompt_tokens, each.output_tokens) for each in workload.arrivals]


@pytest.mark.parametrize(
    ("spec", "cv"),
    [("poisson", 1), ("gamma:1", 1), ("gamma:0.25", 2), ("gamma:4", 0.5), ("fixed", 0)],
)
def test_gaps_have_the_rate_and_the_burstiness(spec: str, cv: float) -> None:
    burstiness = parse_arrivals(spec)
    assert burstiness is not None
    own = gaps(arrival_times(20_001, 5.0, burstiness, Random(1)))
    assert mean(own) == pytest.approx(1 / 5, rel=0.03)
    assert pstdev(own) / mean(own) == pytest.approx(cv, rel=0.04, abs=1e-6)


def test_poisson_gaps_are_not_clipped() -> None:
    own = gaps(arrival_times(20_001, 1.0, 1.0, Random(2)))
    for limit_s in (0.01, 1.0, 5.0):
        share = sum(gap > limit_s for gap in own) / len(own)
        assert share == pytest.approx(math.exp(-limit_s), rel=0.2)


def test_arrivals_by_name() -> None:
    assert parse_arrivals("fixed") == FIXED
    assert parse_arrivals("trace") is None
    assert arrival_times(3, 2.0, FIXED, Random(0)) == [0, 0.5, 1]
    assert arrival_times(1, 2.0, FIXED, Random(0)) == [0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("often", "arrivals is 'often'; it must be one of poisson, fixed, gamma:BURSTINESS"),
        ("gamma", "arrivals is 'gamma'; the burstiness must be a number"),
        ("gamma:0", "arrivals is 'gamma:0'; the burstiness must be a number of at least 0.01"),
        ("gamma:nan", "arrivals is 'gamma:nan'"),
        ("gamma:1e7", "at most 1,000,000"),
    ],
)
def test_wrong_arrivals_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arrivals(spec)


def test_a_seed_gives_one_workload() -> None:
    assert RECIPE.make() == RECIPE.make()
    other = replace(RECIPE, seed=4).make()
    assert sizes(other) != sizes(RECIPE.make())
    assert [each.at_s for each in other.arrivals] != [each.at_s for each in RECIPE.make().arrivals]


def test_a_seed_gives_these_very_requests() -> None:
    made = Recipe("openchat_sharegpt4", "gamma:0.5", num_requests=3).make()
    assert sizes(made) == [(1640, 492), (2109, 249), (3475, 747)]
    times = [each.at_s for each in made.arrivals]
    assert times == pytest.approx([0, 0.08240039154744874, 1.4943173451071463], rel=1e-12)


def test_another_rate_stretches_the_same_requests() -> None:
    slow, fast = RECIPE.make(), replace(RECIPE, requests_per_s=8.0).make()
    assert sizes(slow) == sizes(fast)
    assert [each.at_s / 4 for each in slow.arrivals] == [each.at_s for each in fast.arrivals]


def test_gaps_and_lengths_do_not_change_each_other() -> None:
    made = RECIPE.make()
    assert sizes(replace(RECIPE, arrivals="gamma:3").make()) == sizes(made)
    assert sizes(replace(RECIPE, requests_per_s=None, clients=2).make()) == sizes(made)
    longer = replace(RECIPE, lengths="openchat_sharegpt4").make()
    assert [each.at_s for each in longer.arrivals] == [each.at_s for each in made.arrivals]
    assert RECIPE.make().arrivals[:20] == replace(RECIPE, num_requests=20).make().arrivals


def test_a_closed_loop_has_clients_and_no_times() -> None:
    made = replace(RECIPE, requests_per_s=None, clients=3).make()
    assert made.clients == 3
    assert {each.at_s for each in made.arrivals} == {0}
    assert "3 clients" in made.about
    statistics = statistics_of(made)
    assert (statistics.duration_s, statistics.requests_per_s, statistics.gap_cv) == (None,) * 3
    with pytest.raises(ConfigError, match=r"qps is 2, but 100 requests cannot arrive"):
        stretched(made, 2.0)


def test_a_trace_keeps_its_times_or_is_stretched(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TRACE, encoding="utf-8")
    recipe = Recipe(f"trace:{path}", "trace", num_requests=3)
    assert recipe.make().arrivals == (Arrival(0, 5, 1), Arrival(1, 6, 2), Arrival(4, 7, 3))
    assert [each.at_s for each in replace(recipe, requests_per_s=4.0).make().arrivals] == [
        *(0, 0.125, 0.5)
    ]
    drawn = replace(recipe, arrivals="fixed", num_requests=9).make()
    assert {each.prompt_tokens for each in drawn.arrivals} <= {5, 6, 7, 8}
    with pytest.raises(ConfigError, match=r"num_requests is 5, but .* holds 4 requests"):
        replace(recipe, num_requests=5).make()
    with pytest.raises(ConfigError, match="arrivals is 'trace', but workload is 'fixed:1,1'"):
        Recipe("fixed:1,1", "trace").make()


def test_statistics() -> None:
    arrivals = [Arrival(at_s, 10 * (i + 1), 2) for i, at_s in enumerate((1.0, 2.0, 5.0))]
    statistics = statistics_of(Workload(tuple(arrivals)))
    assert (statistics.num_requests, statistics.duration_s) == (3, 4)
    assert (statistics.requests_per_s, statistics.gap_cv) == (0.5, 0.5)
    prompt = statistics.prompt
    assert (prompt.min, prompt.median, prompt.p90, prompt.max) == (10, 20, 30, 30)
    assert (prompt.mean, prompt.total) == (20, 60)
    assert prompt.std == pytest.approx(math.sqrt(200 / 3))
    assert (statistics.output.std, statistics.total.total) == (0, 66)


workloads = st.builds(
    Workload,
    st.lists(
        st.builds(
            Arrival,
            st.floats(0, 1e15),
            st.integers(1, 10**15),
            st.integers(1, 10**15),
            st.none() | st.integers(),
        ),
        min_size=1,
        max_size=5,
    ).map(lambda each: tuple(sorted(each, key=lambda one: one.at_s))),
    st.none() | st.integers(1, 100),
    st.text(),
)


def test_prompts_begin_with_one_of_a_few_prefixes() -> None:
    plain = Recipe("fixed:20,4", num_requests=400, seed=3).make().arrivals
    shared = Recipe("fixed:20,4", num_requests=400, seed=3, prefixes=(5, 100)).make()
    assert {each.prefix_id for each in shared.arrivals} == set(range(5))
    assert {each.prompt_tokens for each in shared.arrivals} == {120}
    assert {each.prefix_tokens for each in shared.arrivals} == {100}
    assert [each.at_s for each in shared.arrivals] == [each.at_s for each in plain]
    assert "after one of 5 prefixes of 100 tokens" in shared.about
    limited = Recipe(
        "openchat_sharegpt4", num_requests=50, max_total_tokens=600, prefixes=(2, 200)
    ).make()
    totals = [each.prompt_tokens + each.output_tokens for each in limited.arrivals]
    assert 300 < max(totals) <= 600
    with pytest.raises(ConfigError, match="prefixes of 99 tokens leave no room for a prompt"):
        Recipe("fixed:20,4", max_total_tokens=100, prefixes=(2, 99)).make()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None
)
@given(workloads)
def test_a_saved_workload_is_the_same(tmp_path: Path, workload: Workload) -> None:
    save_workload(workload, tmp_path / "w.jsonl")
    assert load_workload(tmp_path / "w.jsonl") == workload


GOOD = {"at_s": 1.0, "prompt_tokens": 1, "output_tokens": 1}


@pytest.mark.parametrize(
    ("line", "changed", "message"),
    [
        (1, {"stallfree_workload": 2}, "line 1 is no header of a workload of version 1"),
        (1, {"num_requests": 3}, "ends at line 3 with 2 requests; its header says 3"),
        (1, {"clients": 0}, "line 1: clients must be a whole number of at least 1"),
        (1, {"about": None}, "line 1: about must be text"),
        (2, {"at_s": -1}, "line 2: at_s must be seconds"),
        (2, {"at_s": math.nan}, "line 2: at_s"),
        (2, {"at_s": True}, "line 2: at_s"),
        (2, {"at_s": 10**400}, "line 2: at_s"),
        (2, {"at_s": 2.0}, "line 3 arrives before the line above it"),
        (3, {"prompt_tokens": 0}, "line 3: prompt_tokens must be a whole number of at least 1"),
        (3, {"output_tokens": 1.5}, "line 3: output_tokens"),
        (3, {"prefix_id": "a"}, "line 3: prefix_id must be a whole number"),
        (3, {"prefix_tokens": 0}, "line 3: prefix_tokens must be a whole number of at least 1"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(
    tmp_path: Path, line: int, changed: dict[str, object], message: str
) -> None:
    header: dict[str, object] = {
        "stallfree_workload": 1,
        "num_requests": 2,
        "clients": None,
        "about": "",
    }
    lines: list[dict[str, object]] = [header, dict(GOOD), dict(GOOD)]
    lines[line - 1] |= changed
    path = tmp_path / "w.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_workload(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 is no header"),
        (b"\n", "line 1 is not JSON"),
        (b"\xff{}", "line 1 is not JSON"),
        (b"[1]", "line 1 must be a JSON object"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"9" * 5000, "line 1 is not JSON"),
        (b"arrived_at,num_prefill_tokens", "line 1 is not JSON"),
        (b'{"stallfree_workload": 1, "num_requests": 1, "about": ""}\n{"at_s"', "line 2 is not"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_workload(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none cannot be read: No such file"):
        load_workload(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"w.jsonl cannot be written: No such file"):
        save_workload(RECIPE.make(), tmp_path / "none" / "w.jsonl")
