"""`stallfree bench capacity` against a server whose runs pass and fail as a test says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fake_server import SSE_HEAD, Asked, FakeServer, event, fake_server, response, token
from typer.testing import CliRunner, Result

from stallfree.bench.workload_file import save_workload
from stallfree.cli.app import app
from stallfree.cli.capacity_options import read_share
from stallfree.cli.drawn_workload import DrawnWorkload
from stallfree.cli.workload_options import WorkloadSettings
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
        refusal: what the request that fails is answered with.
    """

    fails: tuple[int, ...] = ()
    delay_ms: float | None = 1.0
    interrupted_in: int | None = None
    refusal: bytes = REFUSED
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
            writer.write(self.refusal)
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
    settings += ["--min-duration", "0s"]  # three requests whatever the rate
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
        "is_settled": True,
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


def test_an_interrupted_search_tells_what_it_found(
    serving: Callable[[Script], FakeServer], tmp_path: Path
) -> None:
    output = tmp_path / "capacity.json"
    script = Script(fails=(1,), interrupted_in=2)
    result = capacity(serving(script), "--output", str(output))
    assert result.exit_code == 130, result.output
    assert "over 400 and below 800 so far" in " ".join(result.output.split())
    content = json.loads(output.read_text())
    [found] = content["capacities"]
    assert (found["mean_qps"], len(content["probes"])) == (None, 2)
    [seed] = found["seeds"]
    assert (seed["qps"], seed["failed_qps"], seed["is_settled"]) == (400.0, 800.0, False)


def test_an_interrupted_search_without_a_file_says_so(
    serving: Callable[[Script], FakeServer],
) -> None:
    result = capacity(serving(Script(interrupted_in=1)))
    assert result.exit_code == 130, result.output
    assert "Without --state FILE.jsonl the next search begins anew." in result.output
    result = capacity(serving(Script(interrupted_in=0)))
    assert result.exit_code == 130, result.output
    assert "capacity, in requests a second" not in result.output  # nothing is known


@pytest.mark.parametrize(
    "broken",
    [response(500, b'{"error": "died"}'), SSE_HEAD + token(), SSE_HEAD + b"data: [DONE]\n\n"],
)
def test_a_server_that_breaks_in_a_run_has_no_limit_there(
    serving: Callable[[Script], FakeServer], tmp_path: Path, broken: bytes
) -> None:
    script = Script(fails=(1,), refusal=broken)
    output, state = tmp_path / "capacity.json", tmp_path / "state.jsonl"
    files = ("--output", str(output), "--state", str(state))
    result = capacity(serving(script), *files)
    assert result.exit_code == 1
    assert isinstance(result.exception, EndpointError)
    assert "the run at 800/s with seed 0 shows nothing: " in str(result.exception)
    assert script.num_runs == 2
    assert "over 400 so far" in result.output
    assert "Note: with 60 s, the search ended early" in result.output
    assert [probe["qps"] for probe in json.loads(output.read_text())["probes"]] == [400.0]
    assert state.read_text().count('"probe"') == 1


@pytest.mark.parametrize("recovers", [True, False])
def test_a_server_that_is_unavailable_under_load_alone_has_a_limit_there(
    serving: Callable[[Script], FakeServer], recovers: bool
) -> None:
    script = Script()
    server = serving(script)
    refused = 2 * NUM_REQUESTS  # the first of the second run

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        number = len(script.sizes)
        if number < refused or (recovers and number > refused):
            await script(asked, writer)
        else:
            script.sizes.append(0)
            writer.write(response(503, b'{"error": "busy"}', "Retry-After: 1"))

    server.answer = answer
    result = capacity(server)
    if recovers:
        assert result.exit_code == 0, result.output
        assert "800/s  1 unavailable, P99 TBT" in result.output
        assert script.sizes.count(1) == NUM_REQUESTS + 1  # without load, and after it
    else:
        assert result.exit_code == 1
        assert isinstance(result.exception, EndpointError)
        assert "after the load, status 503: busy" in str(result.exception)


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
        (["--min-duration", "1h"], "min-duration: '1h' is not a time"),
        (["--precision", "few"], "precision is 'few'; write it as 2.5% or 0.025"),
        (["--precision", "0%"], "precision is 0.0; it must be from 0.001 to 1"),
        (["--qps", "0.001"], "qps is 0.001; it must be at least 0.01 and at most 1000"),
        (["--output", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
        (["--workload", "nonsense"], "nonsense"),
        (["--arrivals", "fixed", "--seeds", "2"], "seeds is 2, but each seed draws the same"),
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


def test_seeds_that_draw_the_same_give_no_confidence(
    serving: Callable[[Script], FakeServer], tmp_path: Path
) -> None:
    trace, saved = tmp_path / "trace.csv", tmp_path / "saved.jsonl"
    times = "".join(f"{place},20,4\n" for place in range(NUM_REQUESTS))
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + times)
    recorded = ("--workload", f"trace:{trace}", "--arrivals", "trace")
    flags = ("--num-requests", str(NUM_REQUESTS), "--save", str(saved))
    made = CliRunner().invoke(app, ["bench", "workload", *recorded, *flags])
    assert made.exit_code == 0, made.output
    server = serving(Script())
    common = ["bench", "capacity", server.url, "--slo-tbt", "60s", "--qps", "400"]
    common += ["--precision", "50%", "--min-duration", "0s"]
    for workload in (["--replay", str(saved)], [*recorded, "--num-requests", str(NUM_REQUESTS)]):
        result = CliRunner().invoke(app, [*common, *workload])
        assert isinstance(result.exception, ConfigError)
        assert "take --seeds 1" in str(result.exception)
        assert not server.streamed
    result = CliRunner().invoke(app, [*common, "--replay", str(saved), "--seeds", "1"])
    assert result.exit_code == 0, result.output


def test_a_closed_loop_has_no_capacity() -> None:
    flags = ["bench", "capacity", "http://127.0.0.1:9", "--slo-tbt", "1s", "--clients", "3"]
    result = CliRunner().invoke(app, flags)
    assert isinstance(result.exception, ConfigError)
    assert "clients is 3; a capacity needs an open loop" in str(result.exception)


@pytest.mark.parametrize(("text", "share"), [("2.5%", 0.025), ("0.025", 0.025), (" 10 % ", 0.1)])
def test_shares_are_read(text: str, share: float) -> None:
    assert read_share(text) == pytest.approx(share)


def test_the_requests_of_a_run_arrive_over_a_least_time(tmp_path: Path) -> None:
    settings = WorkloadSettings(lengths="fixed:20,4", num_requests=10)
    drawn = DrawnWorkload(settings, min_duration_s=20.0)
    few, many = drawn.at_rate(0.3, 1).arrivals, drawn.at_rate(4.0, 1).arrivals
    assert (len(few), len(many)) == (10, 80)
    assert many[-1].at_s == pytest.approx(79 / 4.0)
    assert drawn.facts()["min_duration_s"] == 20.0
    assert len(DrawnWorkload(settings).at_rate(4.0, 1).arrivals) == 10
    path = tmp_path / "saved.jsonl"
    save_workload(settings.workload(), path)
    replay = DrawnWorkload(WorkloadSettings(replay=path), min_duration_s=20.0)
    assert len(replay.at_rate(4.0, 1).arrivals) == 10  # there are no more
