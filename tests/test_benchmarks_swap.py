"""The benchmark of preemption, on a tiny model; times are not looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import save_tiny_model

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import swap
from swap import Load, table


def test_all_three_ways_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    arguments = ["--model", model, "--dtype", "float32", "--threads", "1", "--quick"]
    monkeypatch.setattr(sys, "argv", ["swap.py", *arguments, "--swap-dir", str(tmp_path)])
    assert swap.main() == 0
    shown = capsys.readouterr().out
    assert "the same answers" in shown
    for name in ("recompute", "swap, host memory", "swap, file"):
        assert name in shown


def test_answers_that_differ_are_said() -> None:
    row = dict.fromkeys(("preemptions", "swapped", "blocks_out", "blocks_in", "read_again"), 5)
    rows = {"recompute": {**row, "tokens_per_s": 50.0}, "swap": {**row, "tokens_per_s": 75.0}}
    made = table(Load(), rows, is_same=False)
    assert "ANSWERS DIFFER" in str(made.caption)
    assert list(made.columns[2].cells) == ["1.00", "1.50"]
