"""The stall benchmark's arithmetic, client and picture, without a model."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from load import Load, Record, Target, make_prompt, percentile, run, send
from picture import draw
from rich.console import Console
from stall import summarize, table

STEADY = Record("steady", 0.0, [0.5, 0.6, 0.7, 2.7], prompt_tokens=20, completion_tokens=4)
LONG = Record("long", 0.8, [2.6, 2.8], prompt_tokens=1500, completion_tokens=2)


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 1), (0.5, 50), (0.501, 51), (0.99, 99), (0.999, 100), (1, 100)]
)
def test_percentile_is_a_value_that_occurred(share: float, expected: int) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], share) == expected


def test_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(percentile([], 0.5))


def test_summary_counts_every_gap_of_the_steady_clients_only() -> None:
    summary = summarize([STEADY, LONG])
    assert summary["tbt_p50_ms"] == pytest.approx(100)
    assert summary["tbt_max_ms"] == pytest.approx(2000)
    assert summary["steady_ttft_p50_s"] == pytest.approx(0.5)
    assert summary["long_ttft_p50_s"] == pytest.approx(1.8)
    assert summary["total_s"] == pytest.approx(2.8)
    assert summary["tokens_per_s"] == pytest.approx(1526 / 2.8)


def measured(name: str, budget: int | None) -> dict[str, Any]:
    records = [STEADY, LONG]
    return {
        "name": name,
        "token_budget": budget,
        "model": "m",
        "summary": summarize(records),
        "records": [asdict(record) for record in records],
    }


def test_the_table_gives_ratios_against_the_baseline() -> None:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table([measured("vllm", None), measured("sarathi", 48)]))
    assert "sarathi (48)" in captured.get()
    assert "sarathi / vllm" in captured.get()
    assert "1.000" in captured.get()


def test_the_picture_is_drawn_from_a_stored_result(tmp_path: Path) -> None:
    result = {
        "load": asdict(Load(clients=1, long_count=1)),
        "runs": [measured("vllm", None), measured("sarathi", 48)],
    }
    path = tmp_path / "new" / "stall.png"
    draw(json.loads(json.dumps(result)), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 2000  # pixels wide


class Answerer(BaseHTTPRequestHandler):
    """Streams as many tokens as asked for, then an end without one; refuses one-word prompts."""

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        if " " not in body["prompt"]:
            self.send_error(400, "too short")
            return
        self.send_response(200)
        self.end_headers()
        usage = {"prompt_tokens": 20, "completion_tokens": body["max_tokens"]}
        events = [{"choices": [{"text": "x"}]}] * body["max_tokens"]
        end = {"choices": [{"text": "", "finish_reason": "length"}]}
        for event in [*events, end, {"choices": [], "usage": usage}]:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def target() -> Iterator[Target]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answerer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Target(f"http://127.0.0.1:{server.server_port}", "m", api_key="k")
        server.shutdown()
        thread.join()


def test_the_load_notes_each_token_of_each_client(target: Target) -> None:
    load = Load(clients=2, output_tokens=5, long_count=1, long_output_tokens=2, gap_s=0.05)
    records = run(target, load)
    assert [record.kind for record in records] == ["steady", "steady", "long"]
    assert [len(record.token_s) for record in records] == [5, 5, 2]
    assert [record.completion_tokens for record in records] == [5, 5, 2]
    assert records[2].sent_s >= 0.05
    assert all(record.error is None for record in records)


def test_a_refused_request_is_noted_not_raised(target: Target) -> None:
    record = send(target, "word", 3, started=0.0)
    assert record.error is not None
    assert "400" in record.error
    assert record.token_s == []


def test_prompts_repeat_with_their_seed() -> None:
    assert make_prompt(20, 1) == make_prompt(20, 1) != make_prompt(20, 2)
    assert len(make_prompt(1500, 0).split()) == 1500
