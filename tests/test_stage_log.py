"""What stages did when, and why they idled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from schedulers import request

from stallfree.core.batch import Batch, Chunk
from stallfree.core.bubbles import Bubble
from stallfree.errors import ConfigError
from stallfree.executor.stage_log import StageLog


def batch(prefill: int = 0, decodes: int = 2, context: int = 100) -> Batch:
    chunks = [Chunk(request(f"{i}"), context, 1, True, True) for i in range(decodes)]
    if prefill:
        chunks.append(Chunk(request("new"), 0, prefill, False, False))
    return Batch(chunks)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (batch(prefill=8), batch(prefill=16), Bubble.PB1),
        (batch(), batch(prefill=16), Bubble.PB2),
        (batch(context=100), batch(context=2000), Bubble.PB3),
        (batch(prefill=8), batch(prefill=8), Bubble.UNEVEN),
    ],
)
def test_a_gap_has_the_reason_of_its_batches(first: Batch, second: Batch, reason: Bubble) -> None:
    log = StageLog(2)
    log.submitted(0, first, 0.0)
    log.submitted(1, second, 0.0)
    log.ran(0, 0, 0.0, 1.0)
    log.ran(1, 0, 1.0, 2.0)
    log.ran(0, 1, 1.0, 5.0)
    log.ran(1, 1, 5.0, 6.0)
    assert log.stages[0].busy_s == 5.0
    assert sum(log.stages[0].idle_s.values()) == 0
    assert log.stages[1].busy_s == 2.0
    assert log.stages[1].idle_s[reason] == 3.0
    assert log.stages[1].idle_share == 0.6


def test_time_without_work_is_told_apart() -> None:
    log = StageLog(1)
    log.submitted(0, batch(), 0.0)
    log.ran(0, 0, 0.0, 1.0)
    log.starved(1.5)
    log.starved(2.0)  # since 1.5
    log.submitted(1, batch(), 4.0)
    log.ran(0, 1, 4.5, 5.0)
    assert log.stages[0].idle_s[Bubble.NO_WORK] == 2.5
    assert log.stages[0].idle_s[Bubble.UNEVEN] == 1.0
    assert log.stages[0].idle_share == 1.0 / 2.5


def test_the_trace_has_all_batches_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    log = StageLog(1, path)
    log.submitted(0, batch(), 0.0)
    log.ran(0, 0, 10.0, 11.0)
    log.submitted(1, batch(prefill=16), 11.0)
    log.ran(0, 1, 11.5, 12.0)
    log.close()
    log.close()
    *events, end = json.loads(path.read_text())
    assert end == {}
    assert [each["name"] for each in events] == [
        "2 decodes, 0 tokens of prompts",
        "idle: prefills beside batches without",
        "2 decodes, 16 tokens of prompts",
    ]
    assert [(each["ts"], each["dur"]) for each in events] == [
        (10_000_000, 1_000_000),
        (11_000_000, 500_000),
        (11_500_000, 500_000),
    ]


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace_file is .*: Is a directory"):
        StageLog(1, tmp_path)
