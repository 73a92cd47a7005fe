"""The benchmarks of the engine and of single kernels, on a tiny model; times are not looked at."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import engine
import kernel_attention
import kernel_linears
import single_kernels
from engine_promises import CASES, HYBRID, ONE, PROMPT, Promise, promises_of_engine
from steps import BLOCK, Case, Costs, make_input

from stallfree.model.config import ModelConfig
from stallfree.model.int8 import is_supported
from stallfree.model.weights import read_json

FACTS = ("date", "command", "machine", "threads", "rounds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """Benchmarks say how many threads PyTorch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_benchmark(
    module: Any,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[dict[str, Any], str]:
    """What a benchmark writes and what it prints."""
    result, picture = tmp_path / "new" / "result.json", tmp_path / "new" / "picture.png"
    paths = ["--json", str(result), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", *arguments, *paths])
    assert module.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    made: dict[str, Any] = json.loads(result.read_text())
    assert set(FACTS) < set(made)
    assert made["machine"]["read_gb_per_s"] > 0
    assert made["machine"]["int8_gop_per_s"] > 0
    return made, capsys.readouterr().out


def test_the_engine_benchmark_measures_every_case_and_promise(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", str(folder), "--dtype", "float32", "--threads", "1"]
    made, printed = run_benchmark(engine, arguments, tmp_path, monkeypatch, capsys)
    assert [case["name"] for case in made["cases"]] == [case.name for case in CASES]
    for case in made["cases"]:
        assert 0 < case["min_ms"] <= case["median_ms"]
        assert case["min_ms"] == min(case["times_ms"])
        assert case["floor_ms"] > 0
        assert case["name"] in printed
    assert len(made["promises"]) == 8
    for promise in made["promises"]:
        assert promise["name"] in printed
    last = printed.rindex(made["promises"][-1]["name"])
    assert last > printed.index(PROMPT.name) > 0  # the promises come last
    assert made["loop"]["steps"] > 0
    assert 0 < made["loop"]["share_outside"] < 1
    assert 0 < made["start"]["resident_bytes"] <= made["start"]["peak_bytes"]
    assert len(made["start"]["first_token_s_of_each"]) == 2


@pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")
def test_the_benchmark_of_single_kernels_measures_every_shape(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Compiling attention once more takes 20 s; the tests of the decoder run it.
    monkeypatch.setattr(kernel_attention, "attend_rows", lambda *arguments: time.sleep(0.001))
    arguments = ["--model", str(folder), "--threads", "1"]
    made, printed = run_benchmark(single_kernels, arguments, tmp_path, monkeypatch, capsys)
    linears = {(each["matrix"], each["rows"], each["kernel"]) for each in made["linears"]}
    assert linears == {
        (matrix, rows, kernel)
        for matrix in ("qkv", "output", "gate_up", "down", "head")
        for rows in single_kernels.QUICK_ROWS
        for kernel in kernel_linears.NAMES
    }
    attention = {(each["case"], each["kernel"]) for each in made["attention"]}
    cases = [case.name for case in kernel_attention.CASES]
    assert attention == {(case, kernel) for case in cases for kernel in kernel_attention.NAMES}
    for each in (*made["linears"], *made["attention"]):
        assert 0 < each["min_ms"] <= each["median_ms"]
        assert each["floor_ms"] > 0
    for text in ("qkv: 64 -> 128", "FBGEMM int8", *cases):
        assert text in printed


def test_an_unknown_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (engine, single_kernels):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--model", "/nowhere"])
        assert module.main() == 1
        assert "cannot be measured" in capsys.readouterr().err


def test_a_case_says_what_it_is() -> None:
    assert ONE.name == "1 decode at 64"
    assert HYBRID.name == "8 decodes at 150 + chunk of 64 at 500"
    assert PROMPT.name == "prompt of 1,500"


def test_requests_of_a_batch_share_no_blocks() -> None:
    case = Case(((20, 1), (0, 40), (100, 5)))
    made = make_input(case, case.num_blocks, vocab_size=10)
    assert [(c.first_row, c.start, c.stop) for c in made.chunks] == [
        (0, 20, 21),
        (1, 0, 40),
        (41, 100, 105),
    ]
    blocks = [block for chunk in made.chunks for block in chunk.blocks]
    assert sorted(blocks) == list(range(case.num_blocks))
    assert all(len(chunk.blocks) == -(-chunk.stop // BLOCK) for chunk in made.chunks)
    assert len(made.token_ids) == case.rows == 46


def test_costs_are_those_counted_by_hand(folder: Path) -> None:
    """Of one layer, 64 wide, 128 inside, 4 heads and 2 key heads of 16, 512 tokens."""
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    costs = Costs(config, 1, kv_bytes_per_token=128)
    layer = 128 * 64 + 64 * 64 + 256 * 64 + 64 * 128
    scales = 4 * (128 + 64 + 256 + 64)
    case = Case(((9, 1), (0, 3)))
    embedded = 4 * (64 + 4)
    kv = (10 + 3) * 128
    assert costs.kv_bytes(case) == kv
    assert costs.bytes(case) == layer + scales + 512 * 68 + embedded + kv
    attention = 4 * 64 * (10 + 1 + 2 + 3)
    assert costs.attention_operations(case) == attention
    assert costs.operations(case) == 2 * (4 * layer + 2 * 512 * 64) + attention


def test_promises_compare_with_their_limits() -> None:
    assert Promise("most", 1.0, 1.0).is_met
    assert not Promise("most", 1.1, 1.0).is_met
    assert Promise("least", 1.1, 1.0, at_least=True).is_met
    assert not Promise("least", 0.9, 1.0, at_least=True).is_met
    start = {
        "first_token_s": 3.0,
        "resident_bytes": 30,
        "weight_bytes": 10,
        "kv_cache_bytes": 5,
    }
    loop, first_token, memory = promises_of_engine({"share_outside": 0.01}, start)
    assert (loop.value, first_token.value, memory.value) == (0.01, 3.0, 2.0)
    assert [loop.is_met, first_token.is_met, memory.is_met] == [True, True, False]
