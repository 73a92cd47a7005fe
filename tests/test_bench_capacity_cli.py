"""`stallfree bench capacity` against a server whose runs pass and fail as a test says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_server import SSE_HEAD, Asked, FakeServer, event, fake_server, response, token
from rich.console import Console
from typer.testing import CliRunner, Result

from stallfree.bench.capacity import Capacity, Criterion, SeedCapacity
from stallfree.bench.capacity_report import capacity_notes, probe_line
from stallfree.bench.probe import QUANTILES, Probe
from stallfree.cli.app import app
from stallfree.cli.capacity_options import read_share
from stallfree.cli.capacity_search import print_capacity
from stallfree.errors import ConfigError, EndpointError

NUM_REQUESTS = 3
REFUSED = response(429, b'{"error": {"message": "too much waits"}}')


@dataclass
class Script:
    """Refuses the first request of the runs that are to fail; a run is `NUM_REQUESTS` requests.

    Attributes:
        fails: numbers of the runs that fail, from 0; that without load is -1.
        delay_ms: what the server tells of its waits; None if it does not.
        interrupted_in: the run in which Ctrl-C is pressed.
    """

    fails: tuple[int, ...] = ()
    delay_ms: float | None = 1.0
    interrupted_in: int | None = None
    sizes: list[int] = field(default_factory=list)

    @property
    def num_runs(self) -> int:
        return len(self.sizes) // NUM_REQUESTS - 1

    async def __call__(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        run, place = divmod(len(self.sizes), NUM_REQUESTS)
        self.sizes.append(asked.body["max_tokens"])
        if run - 1 == self.interrupted_in and place == 0:
            os.kill(os.getpid(), signal.SIGINT)
        if run - 1 in self.fails and place == 0:
            writer.write(REFUSED)
            return
        count = asked.body["max_tokens"]
        told = {} if self.delay_ms is None else {"scheduling_delay_ms": self.delay_ms}
        usage = {"prompt_tokens": asked.prompt_tokens, "completion_tokens": count, **told}
        writer.write(SSE_HEAD + token() * (count - 1) + token(finish_reason="length"))
        writer.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")


@pytest.fixture
def serving() -> Iterator[Callable[[Script], FakeServer]]:
    with fake_server() as server:

        def serve(script: Script) -> FakeServer:
            server.answer = script
            return server

        yield serve


def capacity(server: FakeServer, *flags: str) -> Result:
    workload = ["--workload", "fixed:20,4", "--num-requests", str(NUM_REQUESTS)]
    settings = ["--slo-tbt", "60s", "--qps", "400", "--precision", "50%", "--seeds", "1"]
    return CliRunner().invoke(app, ["bench", "capacity", server.url, *workload, *settings, *flags])


def test_a_capacity_is_found(serving: Callable[[Script], FakeServer], tmp_path: Path) -> None:
    script = Script(fails=(1, 3))
    output = tmp_path / "capacity.json"
    server = serving(script)
    result = capacity(server, "--seeds", "2", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert script.sizes[:NUM_REQUESTS] == [1] * NUM_REQUESTS  # without load
    assert script.sizes[NUM_REQUESTS:] == [4] * NUM_REQUESTS * script.num_runs
    lines = [line for line in result.output.splitlines() if line.startswith("seed ")]
    assert len(lines) == script.num_runs
    assert lines[0].startswith("seed 0        400/s  P99 TBT ")
    assert lines[0].endswith("median delay 1 ms: passes 60 s")
    assert lines[1].startswith("seed 0        800/s  1 refused, P99 TBT ")
    assert lines[1].endswith("fails 60 s")
    assert "capacity, in requests a second" in result.output
    assert "does not tell" not in result.output
    content = json.loads(output.read_text())
    assert content["facts"]["endpoint"] == server.url
    [found] = content["capacities"]
    assert found["criterion"] == {"tbt_s": 60.0, "max_delay_s": 2.0, "quantile": 0.99}
    assert found["seeds"][0] == {
        "seed": 0,
        "qps": 565.69,
        "failed_qps": 800.0,
        "passed_above_qps": None,
    }
    assert len(content["probes"]) == script.num_runs


def test_nothing_that_fails_is_told_as_such(serving: Callable[[Script], FakeServer]) -> None:
    script = Script(delay_ms=None)
    result = capacity(serving(script), "--slo-tbt", "50s,60s")
    assert result.exit_code == 0, result.output
    assert script.num_runs == 3  # 400, 800, 1000
    assert "passes 50 s, passes 60 s" in result.output
    assert "at least 1000" in result.output
    assert "Note: with 50 s, nothing failed up to the highest rate" in result.output
    assert "the server does not tell when it begins" in result.output
    assert "median delay about" in result.output


def test_an_interrupted_search_goes_on(
    serving: Callable[[Script], FakeServer], tmp_path: Path
) -> None:
    state = tmp_path / "state.jsonl"
    broken = Script(fails=(1,), interrupted_in=2)
    result = capacity(serving(broken), "--state", str(state))
    assert result.exit_code == 130, result.output
    assert f"Interrupted. {state} holds all runs that ended" in result.output
    rest = Script()
    result = capacity(serving(rest), "--state", str(state))
    assert result.exit_code == 0, result.output
    assert f"{state} holds 2 runs of this search" in result.output
    assert rest.num_runs == 1  # 565.69
    assert "565.7" in result.output
    again = Script()
    result = capacity(serving(again), "--state", str(state), "--num-requests", "2")
    assert "holds 0 runs of this search; 3 of other servers or workloads" in result.output


def test_an_interrupted_search_without_a_file_says_so(
    serving: Callable[[Script], FakeServer],
) -> None:
    result = capacity(serving(Script(interrupted_in=1)))
    assert result.exit_code == 130, result.output
    assert "Nothing is kept without --state" in result.output


@pytest.mark.parametrize("fails_in", [-1, 0])
def test_a_server_that_only_fails_is_no_capacity(
    serving: Callable[[Script], FakeServer], fails_in: int
) -> None:
    script = Script()
    server = serving(script)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if len(script.sizes) >= (fails_in + 1) * NUM_REQUESTS:
            writer.write(response(500, b'{"error": "out of paper"}'))
        else:
            await script(asked, writer)

    server.answer = answer
    result = capacity(server)
    assert result.exit_code == 1
    assert isinstance(result.exception, EndpointError)
    assert "out of paper" in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slo-tbt", "fast"], "slo-tbt: 'fast' is not a time"),
        (["--slo-tbt", "1s,1000ms"], "slo-tbt is '1s,1000ms'; a target is there twice"),
        (["--max-delay", "x"], "max-delay: 'x' is not a time"),
        (["--precision", "few"], "precision is 'few'; write it as 2.5% or 0.025"),
        (["--precision", "0%"], "precision is 0.0; it must be from 0.001 to 1"),
        (["--qps", "0.001"], "qps is 0.001; it must be at least 0.01 and at most 1000"),
        (["--output", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
        (["--workload", "nonsense"], "nonsense"),
    ],
)
def test_wrong_flags_are_named_before_the_server_is_asked(
    serving: Callable[[Script], FakeServer], flags: list[str], words: str
) -> None:
    server = serving(Script())
    result = capacity(server, *flags)
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)
    assert not server.asked


def test_a_closed_loop_has_no_capacity() -> None:
    flags = ["bench", "capacity", "http://127.0.0.1:9", "--slo-tbt", "1s", "--clients", "3"]
    result = CliRunner().invoke(app, flags)
    assert isinstance(result.exception, ConfigError)
    assert "clients is 3; a capacity needs an open loop" in str(result.exception)


@pytest.mark.parametrize(("text", "share"), [("2.5%", 0.025), ("0.025", 0.025), (" 10 % ", 0.1)])
def test_shares_are_read(text: str, share: float) -> None:
    assert read_share(text) == pytest.approx(share)


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
