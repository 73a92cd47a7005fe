"""The soak, very short and on a tiny model; times and memory are not looked at."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fault_fixtures import model_in, server

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import faults
import soak
import soak_traffic
from soak_client import BROKEN, FINISHED, LEFT, REFUSED, Account, Answer, exchange
from soak_report import memory_growth, promises
from soak_traffic import OK, Sending, good, hostile, http_request

UNTIMED = (
    "every status as it should be",
    "no iteration failed",
    "each request ended in one way",
    "nothing left over",
)


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in(tmp_path)
    path = tmp_path / "soak.json"
    arguments = ["--minutes", "0.1", "--probe-s", "2", "--model", str(model), "--json", str(path)]
    arguments += ["--words", "60", "--tokens", "32", "--serve-args", "--dtype float32 --threads 1"]
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    soak.main()
    result = json.loads(path.read_text())
    for name in UNTIMED:
        is_kept, words = result["promises"][name]
        assert is_kept, f"{name}: {words}"
    assert result["tracebacks"] == 0
    totals = Counter[str]()
    for _, outcome, count in result["outcomes"]:
        totals[outcome] += count
    assert min(totals[name] for name in (FINISHED, REFUSED, LEFT)) > 0
    assert result["priority"]["tokens"] > 100
    assert len(result["memory_bytes"]) > 10


def test_what_is_sent_repeats_with_its_seed() -> None:
    def sent(seed: int) -> list[Sending]:
        draws = random.Random(seed)
        return [
            *(good(draws, "m", most_words=50, most_tokens=9) for _ in range(50)),
            *(hostile(draws, "m") for _ in range(50)),
        ]

    assert sent(1) == sent(1) != sent(2)
    assert {each.kind for seed in range(9) for each in sent(seed)} >= set(soak_traffic._HOSTILE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with server(model_in(tmp_path_factory.mktemp("soak"))) as own:
        yield own.url


def outcome_of(url: str, sending: Sending) -> tuple[str, Answer]:
    answer = Answer()
    return asyncio.run(exchange(url, sending, answer)), answer


@pytest.mark.parametrize("kind", sorted(soak_traffic._HOSTILE))
def test_hostile_requests_get_what_they_should(url: str, kind: str) -> None:
    for seed in range(3):
        body = {"model": "tiny", "prompt": "x", "max_tokens": 4}
        payload, statuses = soak_traffic._HOSTILE[kind](random.Random(seed), body)
        leaves = None if statuses else 0.3
        outcome, answer = outcome_of(url, Sending(kind, payload, statuses, 0, leaves))
        assert outcome in ((REFUSED,) if statuses else (REFUSED, LEFT)), answer
        assert answer.status in statuses or not statuses


def test_an_answer_is_judged(url: str) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "n": 2, "stream": True}
    payload = http_request("/v1/completions", json.dumps(body).encode())
    outcome, answer = outcome_of(url, Sending("good", payload, OK, 2))
    assert (outcome, answer.finished, answer.status) == (FINISHED, 2, 200)
    assert len(answer.token_s) == 8
    account = Account()
    account.note(Sending("good", payload, OK, 2), outcome, answer)
    assert (account.finished, account.uncertain, account.wrong) == (2, 0, {})
    outcome, answer = outcome_of(url, Sending("expects more", payload, OK, 3))
    assert outcome == BROKEN
    account.note(Sending("expects more", payload, OK, 3), outcome, answer)
    assert (account.finished, account.uncertain) == (2, 3)
    assert account.wrong.keys() == {"expects more"}
    long = http_request("/v1/completions", json.dumps({**body, "max_tokens": 2000}).encode())
    assert outcome_of(url, Sending("left", long, OK, 2, leaves_after_s=0.2))[0] == LEFT


RESULT: dict[str, Any] = {
    "sent": 10,
    "unexpected": {},
    "outcomes": [["good", FINISHED, 9], ["good", LEFT, 1]],
    "client_finished": 9,
    "client_uncertain": 1,
    "failed_iterations": 0,
    "server": {"added": 10, "ended": {"length": 9, "abort": 1}, "iterations": 100},
    "memory_bytes": [[i, 100 + i // 80] for i in range(100)],
    "priority": {"tbt_p99_ms": 50.0, "tbt_p99_ms_by_window": [40.0, 60.0]},
    "left_over": {},
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, ()),
        ({"outcomes": [["good", BROKEN, 1]]}, ("every status as it should be",)),
        ({"failed_iterations": 1}, ("no iteration failed",)),
        ({"client_finished": 8, "client_uncertain": 0}, ("each request ended in one way",)),
        ({"client_finished": 10}, ("each request ended in one way",)),
        (
            {"server": {"added": 11, "ended": {"length": 9, "abort": 1}, "iterations": 1}},
            ("each request ended in one way",),
        ),
        ({"memory_bytes": [[i, 100 + i // 20] for i in range(100)]}, ("memory flat within 2 %",)),
        (
            {"priority": {"tbt_p99_ms": 50.0, "tbt_p99_ms_by_window": [40.0, 201.0]}},
            ("P99 of priority within the target",),
        ),
        ({"left_over": {"blocks": [0, 1]}}, ("nothing left over",)),
    ],
)
def test_a_promise_that_is_broken_is_said_so(change: Any, broken: tuple[str, ...]) -> None:
    found = promises({**RESULT, **change}, 200.0)
    assert tuple(name for name, (is_kept, _) in found.items() if not is_kept) == broken


def test_memory_growth_leaves_the_warm_up_out() -> None:
    samples = [(float(i), 50 if i < 10 else 100 if i < 90 else 103) for i in range(100)]
    assert memory_growth(samples) == pytest.approx(0.03)


def test_the_page_of_faults() -> None:
    rows: list[dict[str, Any]] = [
        {"fault": "a", "seen": "b", "lost": "nothing", "healthy": 0.01},
        {"fault": "c", "seen": "d", "lost": "nothing", "healthy": 3.14},
        {"fault": "e", "seen": "f", "lost": "g", "healthy": "a restart"},
    ]
    lines = faults.page(rows).splitlines()
    assert lines[-3:] == [
        "| a | b | nothing | at once |",
        "| c | d | nothing | 3.1 s |",
        "| e | f | g | a restart |",
    ]


def test_the_table_in_the_documentation_is_that_of_the_tests() -> None:
    """Each row is of a test that there is: its fault is named there, as far as it is fixed."""
    text = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_faults_*.py")
    )
    rows = [line for line in faults.PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 25
    for row in rows:
        fault = row.split(" | ")[0].removeprefix("| ")
        for start in ("an exception in: ", "a client leaves "):
            fault = fault.removeprefix(start)
        fixed = fault.replace("SIGTERM under", "under").replace("SIGKILL under", "under")
        for flag in ("--iteration-file", "--trace-file"):
            fixed = fixed.replace(f"{flag} is on", "{flags[0]} is on")
        assert re.sub(r" \d+ moments", " {KILLS} moments", fixed) in text, row
