"""`stallfree bench serve` and `bench report` as people run them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_server import SSE_HEAD, Asked, answer_in_full, fake_server, response, token
from server_fixtures import wait_until
from typer.testing import CliRunner, Result

from stallfree.bench.files import read_json
from stallfree.cli.app import app
from stallfree.errors import ConfigError, EndpointError

pytest.importorskip("plotly")

SMALL = ["--workload", "fixed:25,3", "--num-requests", "4", "--qps", "200"]


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_a_run_is_printed_and_written(tmp_path: Path) -> None:
    paths = {kind: tmp_path / f"run.{kind}" for kind in ("json", "csv", "html")}
    flags = {"json": "--output", "csv": "--csv", "html": "--html"}
    files = [text for kind, path in paths.items() for text in (flags[kind], str(path))]
    with fake_server() as fake:
        result = bench("serve", fake.url, *SMALL, *files, "--slo-tbt", "200ms", "--slo-ttft", "9s")
    assert result.exit_code == 0, result.output
    words = ["time between tokens", "P99", "100 planned, 100 counted", "12 planned, 12 counted"]
    words += ["within TTFT 9,000 ms and TBT 200 ms", "share of a core"]
    for each in words:
        assert each in result.output
    results = read_json(paths["json"])
    assert [len(record.token_s) for record in results.records] == [3] * 4
    assert results.facts["model"] == "fake/model"
    assert len(paths["csv"].read_text().splitlines()) == 5
    assert "fake/model at" in paths["html"].read_text()
    page = tmp_path / "again.html"
    again = bench("report", str(paths["json"]), str(paths["json"]), "--html", str(page))
    assert again.exit_code == 0, again.output
    assert again.output.count("12 planned, 12 counted") == 2
    assert page.exists()


def test_flags_reach_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    flags = ["--api", "chat", "--model", "own", "--header", "X-Own: a: b"]
    flags += ["--extra-body", '{"ignore_eos": null}']
    with fake_server() as fake:
        result = bench("serve", fake.url, *SMALL, *flags)
    assert result.exit_code == 0, result.output
    asked = fake.streamed[0]
    assert asked.headers["authorization"] == "Bearer secret"
    assert asked.headers["x-own"] == "a: b"
    assert (asked.body["model"], "ignore_eos" in asked.body) == ("own", False)
    assert "secret" not in result.output


def test_lengths_fit_the_context_of_the_server() -> None:
    with fake_server() as fake:
        result = bench("serve", fake.url, "--workload", "fixed:8000,50", "--clients", "2")
    assert result.exit_code == 0, result.output
    assert all(each.prompt_tokens + each.body["max_tokens"] <= 4096 for each in fake.streamed)


@pytest.mark.parametrize("status", [429, 500])
def test_any_failure_is_an_exit_code_of_1(status: int) -> None:
    async def refuse(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(response(status, b'{"error": "full"}', "Retry-After: 3"))

    with fake_server(answer=answer_in_full, later=refuse) as fake:
        result = bench("serve", fake.url, *SMALL)
    assert result.exit_code == 1
    kind = "refused" if status == 429 else "rejected"
    assert f"failed: {kind}" in result.output
    assert f"status {status}: full" in result.output


def test_a_server_that_is_down_is_an_error() -> None:
    result = bench("serve", "http://127.0.0.1:9", *SMALL)
    assert isinstance(result.exception, EndpointError)
    assert "http://127.0.0.1:9" in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--extra-body", "{"], "extra_body"),
        (["--extra-body", "[]"], "JSON object"),
        (["--header", "X-Own"], "NAME: VALUE"),
        (["--api", "embeddings"], "completions, chat"),
        (["--slo-tbt", "0"], "at least 0.001"),
        (["--slo-ttft", "soon"], "200ms"),
        (["--timeout", "0"], "at least 0.001"),
        (["--workload", "nothing"], "nothing"),
        (["--output", "/none/run.json"], "/none/run.json"),
        (["--html", "/"], "cannot be written"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_sent(flags: list[str], words: str) -> None:
    with fake_server() as fake:
        result = bench("serve", fake.url, *flags)
    assert isinstance(result.exception, ConfigError), result.output
    assert words in str(result.exception)
    assert not fake.asked


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + token())
        await asyncio.sleep(30)

    output = tmp_path / "run.json"
    with fake_server(answer=endless) as fake:
        command = [sys.executable, "-m", "stallfree.cli", "bench", "serve", fake.url, *SMALL]
        process = subprocess.Popen(
            [*command, "--output", str(output)], stdout=subprocess.PIPE, text=True
        )
        wait_until(lambda: len(fake.streamed) == 4, timeout_s=30)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "it was interrupted; 4 requests were under way" in printed
    content = json.loads(output.read_text())
    assert not content["is_complete"]
    assert len(content["records"]) == 4
