"""The benchmarks of the engine and of single kernels, on a tiny model; times are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from int8_models import matrices
from tiny import save_tiny_model

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import engine
import kernel_attention
import kernel_linears
import server
import single_kernels
from engine_loop import measure_loop
from engine_promises import CASES, HYBRID, ONE, PROMPT
from kernel_attention import _Run
from steps import BLOCK, Case, Costs, Steps, decodes, make_batch, make_input

from stallfree import LLM
from stallfree.errors import ConfigError
from stallfree.executor.output import ExecutorOutput
from stallfree.kernels.int8_matmul import PANEL
from stallfree.model.attention import attend
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8 import is_supported
from stallfree.model.weights import SafetensorsWeights, read_json

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
    assert made["machine"]["reference_gop_per_s"] > 0
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
    assert made["machine"]["reference"] == "oneDNN float32"
    assert 0 < made["share_outside_model"] < 1
    assert "share_outside_model: " in printed
    assert len(made["promises"]) == 8
    for promise in made["promises"]:
        assert promise["name"] in printed
    last = printed.rindex(made["promises"][-1]["name"])
    assert last > printed.index(PROMPT.name) > 0  # the promises come last
    assert made["loop"]["steps"] > 0
    assert 0 < made["loop"]["share_outside"] < 1
    start = made["start"]
    assert 0 < start["resident_bytes"] <= start["peak_bytes"]
    known = start["weight_bytes"] + start["kv_cache_bytes"]
    assert start["overhead_bytes"] == start["resident_bytes"] - known > 0
    assert start["first_token_s"] == start["first_token_s_of_each"][1]
    assert len(start["first_token_s_of_each"]) == 2


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
    ours, others = made["attention"][:2]
    assert 2 * ours["bytes"] == others["bytes"]  # bfloat16 and float32
    assert ours["operations"] == others["operations"]
    assert made["machine"]["reference"] == "FBGEMM int8"
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


def test_a_batch_is_of_requests_in_the_state_that_a_scheduler_leaves_them_in() -> None:
    case = Case(((20, 1), (0, 40), (100, 5), (0, 1)))
    batch = make_batch(case, case.num_blocks, vocab_size=10)
    rows = make_input(case, case.num_blocks, vocab_size=10).chunks
    assert [(c.start, c.stop) for c in batch.chunks] == [(20, 21), (0, 40), (100, 105), (0, 1)]
    assert [chunk.is_decode for chunk in batch.chunks] == [True, False, False, False]
    for chunk, some in zip(batch.chunks, rows, strict=True):
        request = chunk.request
        assert request.is_decode == chunk.is_decode
        assert request.num_computed_tokens == chunk.start
        assert request.num_tokens == chunk.stop
        assert request.block_table == some.blocks
        assert request.params.is_greedy
    assert len(batch.sampling) == 4


def test_a_step_samples_for_every_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    decoder = Decoder(config, SafetensorsWeights(folder), max_positions=512)
    case = Case(((20, 1), (16, 5)))
    steps = Steps(decoder, [case])
    outputs: list[ExecutorOutput] = []
    execute = steps._executor.execute
    monkeypatch.setattr(steps._executor, "execute", lambda batch: outputs.append(execute(batch)))
    total_s, outside_s = steps.run(case)
    assert 0 < outside_s < total_s
    tokens = [sample.token_id for sample in outputs[0].samples]
    assert len(tokens) == 2
    assert all(0 <= token < config.vocab_size for token in tokens)


def test_a_loop_that_never_runs_all_requests_at_once_is_refused(folder: Path) -> None:
    llm = LLM(
        str(folder), dtype="float32", threads=1, kv_cache_memory_bytes=1 << 20, max_num_seqs=20
    )
    with pytest.raises(ConfigError, match="no step of the loop ran all 32 requests"):
        measure_loop(llm.engine)
    assert not llm.engine.has_requests


def test_the_cache_for_the_loop_holds_all_its_requests(folder: Path) -> None:
    num_bytes = engine.loop_kv_bytes(str(folder))
    llm = LLM(str(folder), dtype="float32", threads=1, kv_cache_memory_bytes=num_bytes)
    assert llm.engine.facts.kv_cache_tokens == 32 * (80 + 16)


def test_a_result_says_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = server.machine_facts()
    assert facts["int8_path"] in ("avx512+vnni", "avx512", "avx2", "none")
    assert facts["weight_levels"] == (127 if facts["int8_path"] == "avx512+vnni" else 63)
    assert len(server.LOAD_AVERAGE) == 3
    assert facts["load_average"] == server.LOAD_AVERAGE
    assert facts["commit"]

    def fail(*arguments: Any, **options: Any) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert server.machine_facts()["commit"] == "unknown"


@pytest.mark.slow
@pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")
@pytest.mark.parametrize(
    "case",
    [decodes(3, 1500), Case(((40, 30), (300, 1)))],
    ids=lambda case: case.name,
)
def test_the_kernel_of_the_attention_benchmark_attends(folder: Path, case: Case) -> None:
    """As PyTorch does, with the same keys and values; contexts of two splits, and of one."""
    decoder = single_kernels._decoder(str(folder), threads=2)
    torch.manual_seed(0)
    run = _Run(decoder, case)
    copy_keys_and_values(run)
    run.measure(keep=True)
    config = decoder.config
    stride = decoder._layers.output.weights.shape[2] // PANEL
    heads = config.num_heads * config.head_dim
    rows = torch.from_numpy(decoder._scratch.attended[: case.rows * stride])
    made = rows.view(case.rows, stride)[:, :heads]
    expected = attend(run._queries, run._floats, 0, run._spans).view(case.rows, heads)
    assert made.abs().amax(dim=1).min() > 0
    torch.testing.assert_close(made, expected, rtol=0, atol=0.004)  # 1/256: of bfloat16


def copy_keys_and_values(run: _Run) -> None:
    """From our cache to PyTorch's, of a model whose heads need no padding."""
    ours, others = run._cache, run._floats
    heads, depth = others.keys[0].shape[1:]
    for layer, (keys, values) in enumerate(zip(ours.keys, ours.values, strict=True)):
        columns = matrices(keys, heads, depth, BLOCK).permute(0, 3, 1, 2)
        rows = matrices(values, heads, BLOCK, depth).permute(0, 2, 1, 3)
        others.keys[layer].copy_(columns.reshape(-1, heads, depth))
        others.values[layer].copy_(rows.reshape(-1, heads, depth))


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
